"""decode(encode(run)) == run: in any order of requests, repeated, merged, torn apart, as protobuf and as JSON."""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.otlp_batches import MS, RUN, START
from tests.property.test_otlp_rebuild import CALLER, END, STORIES, Story, batches, on_the_wire
from tests.sinks import REQUESTS
from tracelet.otlp.decode import (
    Arrival,
    AttemptEnd,
    Decoded,
    Piece,
    decode_logs,
    decode_metrics,
    decode_traces,
    parse,
    whole,
)
from tracelet.otlp.message_json import message_dict
from tracelet.records import (
    ArtifactLogged,
    AttemptEnded,
    ErrorInfo,
    ParamsLogged,
    Record,
    RunStarted,
    Scalar,
    SpansReceived,
    TagsSet,
)

DECODERS = {"metrics": decode_metrics, "logs": decode_logs, "traces": decode_traces}
Requests = list[tuple[str, Any]]
Typed = tuple[str, str, Scalar]  # key, type, value: 1, 1.0 and True are three values


@dataclass
class Found:
    """What several arrivals say together, whatever their order and however often."""

    samples: dict[str, set[tuple[int, float, int, bool]]] = field(default_factory=lambda: defaultdict(set))
    environment: dict[str, Scalar] = field(default_factory=dict)
    mlflow_tags: dict[str, str] = field(default_factory=dict)
    callers: set[str] = field(default_factory=set)
    params: set[Typed] = field(default_factory=set)
    tags: set[tuple[str, str]] = field(default_factory=set)
    artifacts: set[ArtifactLogged] = field(default_factory=set)
    spans: dict[bytes, Any] = field(default_factory=dict)
    ends: dict[str, AttemptEnd] = field(default_factory=dict)
    started: set[int] = field(default_factory=set)
    pieces: dict[tuple[str, str, str], dict[int, Piece]] = field(default_factory=lambda: defaultdict(dict))

    def arrival(self, arrival: Arrival) -> None:
        assert (arrival.run, arrival.attempt_key, arrival.rank, arrival.instance_id) == (
            RUN,
            "a" * 16,
            0,
            "instance-0",
        )
        if arrival.points is not None:
            points = arrival.points
            for i, number in enumerate(points.metric_ids):
                sample = (points.time_unix_nano[i], points.values[i], points.iterations[i], i in points.dense)
                self.samples[points.names[number]].add(sample)
        for record in arrival.records:
            self.record(record)
        for piece in arrival.pieces:
            pieces = self.pieces[piece.event, piece.key, piece.digest]
            pieces[piece.index] = piece
            if len(pieces) == piece.count:
                text = "".join(pieces[index].text for index in range(1, piece.count + 1))
                assert hashlib.sha256(text.encode()).hexdigest() == piece.digest
                made = whole(piece.event, piece.key, text, piece.time_unix_nano)
                assert made is not None
                self.record(made)
        if arrival.ended is not None:
            self.ends[arrival.ended.told_by] = arrival.ended
        if arrival.started_unix_nano is not None:
            self.started.add(arrival.started_unix_nano)

    def record(self, record: Record) -> None:
        if isinstance(record, RunStarted):
            assert record.run_name in ("", RUN.run_name)
            self.environment |= record.environment
            self.mlflow_tags |= record.mlflow_tags
            if record.traceparent:
                self.callers.add(record.traceparent[:-2])  # whether the caller was sampled is not in a link
        elif isinstance(record, ParamsLogged):
            self.params |= typed(record.params)
        elif isinstance(record, TagsSet):
            self.tags |= set(record.tags.items())
        elif isinstance(record, ArtifactLogged):
            self.artifacts.add(record)
        else:
            assert isinstance(record, SpansReceived)
            from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans

            spans = ResourceSpans.FromString(base64.b64decode(record.resource_spans))
            for scope in spans.scope_spans:
                self.spans |= {span.span_id: span for span in scope.spans}


def typed(values: Any) -> set[Typed]:
    return {(key, type(value).__name__, value) for key, value in values.items()}


def read(requests: Requests) -> Found:
    found = Found()
    for signal, message in requests:
        decoded: Decoded = DECODERS[signal](message)
        assert decoded.unknown == {}
        for arrival in decoded.arrivals:
            found.arrival(arrival)
    return found


def merged(requests: Requests) -> Requests:
    """One request a signal, as a collector's batches are."""
    out = {}
    for signal, message in requests:
        if signal in out:
            out[signal].MergeFrom(message)
        else:
            out[signal] = REQUESTS[signal]()
            out[signal].CopyFrom(message)
    return list(out.items())


def torn(requests: Requests) -> Requests:
    """Each log record in a request of its own."""
    out: Requests = []
    for signal, message in requests:
        if signal != "logs":
            out.append((signal, message))
            continue
        (resource,) = message.resource_logs
        (scope,) = resource.scope_logs
        for record in scope.log_records:
            one = REQUESTS["logs"]()
            one.CopyFrom(message)
            del one.resource_logs[0].scope_logs[0].log_records[:]
            one.resource_logs[0].scope_logs[0].log_records.append(record)
            out.append((signal, one))
    return out


def as_json(requests: Requests) -> Requests:
    return [
        (signal, parse(signal, json.dumps(message_dict(message)).encode(), "application/json"))
        for signal, message in requests
    ]


def as_protobuf(requests: Requests) -> Requests:
    return [
        (signal, parse(signal, message.SerializeToString(), "application/x-protobuf")) for signal, message in requests
    ]


@given(story=STORIES, seed=st.integers(0, 2**32), how=st.sampled_from([merged, torn, as_json, as_protobuf]))
@settings(max_examples=80, deadline=None)
def test_a_run_is_decoded_from_its_requests_in_any_order(story: Story, seed: int, how: Any) -> None:
    chance = random.Random(seed)
    made = batches(story)
    sent = on_the_wire(made)
    requests = [*how(sent), *chance.choices(sent, k=2)]
    chance.shuffle(requests)
    found = read(requests)

    samples: dict[str, set[tuple[int, float, int, bool]]] = defaultdict(set)
    clock = START
    for _, rows, _ in story.pieces:
        for name, value, iteration, dense in rows:
            samples[name].add((clock, value, iteration, dense))
            clock += MS
    assert found.samples == {k: v for k, v in samples.items() if not k.startswith("tracelet.")}
    assert (found.environment, found.mlflow_tags) == (story.environment, story.mlflow_tags)
    assert found.callers == {CALLER[:-2]}
    assert found.started == {START}
    records = [record for _, _, records in story.pieces for record in records]
    assert found.params == set().union(*(typed(r.params) for r in records if isinstance(r, ParamsLogged)))
    assert found.tags == set().union(*(set(r.tags.items()) for r in records if isinstance(r, TagsSet)))
    assert {(a.path, a.size, a.sha256, a.media_type) for a in found.artifacts} == {
        (a.path, a.size, a.sha256, a.media_type) for a in records if isinstance(a, ArtifactLogged) and inside(a.path)
    }
    assert all(len(pieces) == pieces[1].count for pieces in found.pieces.values())
    check_end(found, made[-1].parts[0].records[0])
    sent_spans = (s for signal, m in sent if signal == "traces" for s in m.resource_spans[0].scope_spans[0].spans)
    assert found.spans == {span.span_id: span for span in sent_spans}


def inside(path: str) -> bool:
    return not path.startswith("/") and ".." not in path.split("/")


def check_end(found: Found, ended: Any) -> None:
    assert isinstance(ended, AttemptEnded)
    assert {end.status for end in found.ends.values()} == {ended.status}
    assert set(found.ends) == {"event", "span", "status"}
    assert found.ends["event"].end_unix_nano == found.ends["span"].end_unix_nano == END
    for told_by, limit in (("event", 2_000), ("span", 64_000)):
        error = found.ends[told_by].error
        assert (error is None) == (ended.error is None)
        if isinstance(ended.error, ErrorInfo) and isinstance(error, ErrorInfo):
            for name in ("type", "message", "stacktrace"):
                if len(getattr(ended.error, name).encode()) <= limit:
                    assert getattr(error, name) == getattr(ended.error, name)
