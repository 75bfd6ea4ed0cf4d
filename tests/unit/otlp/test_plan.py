"""A batch on the wire: events, spans, counters and end markers, as the wire contract's tables have them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from tests.otlp_batches import MS, RUN, START, batch, opened
from tests.sinks import REQUESTS, attributes
from tracelet import ids
from tracelet.otlp.plan import Ledger, Plan, heartbeat_load, plan
from tracelet.records import (
    ArtifactLogged,
    AttemptEnded,
    Batch,
    ErrorInfo,
    FlushAsked,
    Heartbeat,
    ParamsLogged,
    Part,
    RankEnded,
    Record,
    RunStarted,
    Scalar,
    SpanEnded,
    SpanStarted,
    StateNoted,
    TagsSet,
    WriterEnded,
)

KEY = "a" * 16
END = START + 10**10


def sent(planned: Plan, signal: str) -> list[Any]:
    return [REQUESTS[signal].FromString(load.encode()) for load in planned.loads if load.signal == signal]


def events(records: Iterable[Record]) -> list[Any]:
    messages = sent(plan(batch((), records), Ledger()), "logs")
    return [r for m in messages for r in m.resource_logs[0].scope_logs[0].log_records]


def spans(planned: Plan) -> list[Any]:
    return [s for m in sent(planned, "traces") for s in m.resource_spans[0].scope_spans[0].spans]


def metrics(planned: Plan, scope: str) -> list[tuple[Any, Any]]:
    """Resource attributes and metric, of one scope."""
    return [
        (attributes(m.resource_metrics[0].resource), metric)
        for m in sent(planned, "metrics")
        for s in m.resource_metrics[0].scope_metrics
        if s.scope.name == scope
        for metric in s.metrics
    ]


def ended(
    status: str = "FINISHED",
    *,
    error: ErrorInfo | None = None,
    params: Mapping[str, Scalar] | None = None,
    open_spans: tuple[SpanStarted, ...] = (),
    series: Mapping[str, tuple[tuple[str, int], ...]] | None = None,
    newest: bool = True,
) -> AttemptEnded:
    return AttemptEnded(status, START, END, newest, error, params or {}, {"team": "ml"}, open_spans, series or {})


# ---- events -----------------------------------------------------------------------------------------------------


def test_an_event_names_itself_its_run_and_its_place_in_the_trace() -> None:
    (record,) = events([RunStarted(START, "bold-hawk", {"process.pid": 4711}, {})])
    assert record.event_name == "tracelet.run.started"
    assert attributes(record) == {"tracelet.event": "tracelet.run.started", "process.pid": 4711}
    assert record.time_unix_nano == record.observed_time_unix_nano == START
    assert record.trace_id.hex() == ids.trace_id(RUN.run_id, KEY)
    assert record.span_id.hex() == ids.root_span_id(RUN.run_id, KEY)
    assert record.body.string_value == "run bold-hawk of vision / cnn started"


def test_params_and_tags_are_events_with_a_body_a_person_reads() -> None:
    params, tags = events(
        [ParamsLogged(START, {"lr": 0.1, "n": 3, "aug": True, "o": "adam"}), TagsSet(START, {"team": "ml"})]
    )
    assert attributes(params) == {
        "tracelet.event": "tracelet.params",
        "tracelet.param.lr": 0.1,
        "tracelet.param.n": 3,
        "tracelet.param.aug": True,
        "tracelet.param.o": "adam",
    }
    assert params.body.string_value == "params: lr=0.1, n=3, aug=True, o=adam"
    assert attributes(tags) == {"tracelet.event": "tracelet.tags", "tracelet.tag.team": "ml"}


@pytest.mark.parametrize(("count", "size"), [(50, 1), (51, 1), (1000, 10), (40, 1_900), (3, 2_000)])
def test_no_event_is_larger_than_loki_takes(count: int, size: int) -> None:
    params = {f"key{i}": "é" * (size // 2) + "x" * (size % 2) for i in range(count)}
    found = events([ParamsLogged(START, params)])
    seen: dict[str, Any] = {}
    for record in found:
        own = {k: v for k, v in attributes(record).items() if k.startswith("tracelet.param.")}
        assert len(own) <= 50
        assert sum(len(k) + len(v.encode()) for k, v in own.items()) <= 16_000
        seen |= own
    assert seen == {f"tracelet.param.{k}": v for k, v in params.items()}
    if len(found) > 1:
        assert [attributes(r)["tracelet.event.part"] for r in found] == list(range(1, len(found) + 1))
        assert {attributes(r)["tracelet.event.parts"] for r in found} == {len(found)}


def test_a_long_value_is_whole_in_its_chunks() -> None:
    value = "".join(chr(0x4E00 + i % 5000) for i in range(60_000))
    first, *chunks = events([ParamsLogged(START, {"config": value, "lr": 0.1})])
    own = attributes(first)
    assert own["tracelet.param.config"] == value[:256]
    assert own["tracelet.digest.param.config"].startswith("sha256:")
    assert own["tracelet.param.lr"] == 0.1
    assert all(len(chunk.body.string_value.encode()) <= 32_000 for chunk in chunks)
    assert "".join(chunk.body.string_value for chunk in chunks) == value
    for index, chunk in enumerate(chunks, 1):
        assert attributes(chunk) == {
            "tracelet.event": "tracelet.params",
            "tracelet.chunk.key": "tracelet.param.config",
            "tracelet.chunk.index": index,
            "tracelet.chunk.count": len(chunks),
            "tracelet.chunk.digest": own["tracelet.digest.param.config"],
        }


def test_an_artifact_is_described_and_its_bytes_stay_here() -> None:
    copied = ArtifactLogged(START, "models/a b.pth", "/data/a b.pth", "artifacts/1", 12345, "ab" * 32, "text/plain")
    reference = ArtifactLogged(START, "big", "/data/big", None, 2**40, None, "application/octet-stream")
    first, second = events([copied, reference])
    assert attributes(first) == {
        "tracelet.event": "tracelet.artifact",
        "tracelet.artifact.name": "models/a b.pth",
        "tracelet.artifact.uri": "file:///data/a%20b.pth",
        "tracelet.artifact.digest": "sha256:" + "ab" * 32,
        "tracelet.artifact.size": 12345,
        "tracelet.artifact.media_type": "text/plain",
    }
    assert "tracelet.artifact.digest" not in attributes(second)


def test_records_that_are_the_spools_own_are_not_sent() -> None:
    assert not events([WriterEnded(START, "FINISHED", "stop"), FlushAsked(START), opened()])


# ---- the end of an attempt --------------------------------------------------------------------------------------


def test_the_root_span_has_params_tags_status_and_the_callers_link() -> None:
    caller = "00-" + "c" * 32 + "-" + "d" * 16 + "-01"
    started = plan(batch((), [RunStarted(START, "bold-hawk", {}, {}, caller)]), Ledger())
    params: dict[str, Scalar] = {f"p{i}": i for i in range(500)}
    (root,) = spans(plan(batch((), [ended(params=params)], number=2), Ledger.from_json(started.after.to_json())))
    assert root.name == "run bold-hawk"
    assert root.trace_id.hex() == ids.trace_id(RUN.run_id, KEY)
    assert root.span_id.hex() == ids.root_span_id(RUN.run_id, KEY)
    assert root.parent_span_id == b""
    assert (root.start_time_unix_nano, root.end_time_unix_nano) == (START, END)
    assert root.status.code == Status.STATUS_CODE_UNSET
    values = attributes(root)
    assert values["tracelet.tag.team"] == "ml"
    assert {k: v for k, v in values.items() if k.startswith("tracelet.param.")} == {
        f"tracelet.param.{k}": v for k, v in params.items()
    }
    (link,) = root.links
    assert (link.trace_id.hex(), link.span_id.hex()) == ("c" * 32, "d" * 16)


@pytest.mark.parametrize("caller", ["", "nonsense", "00-" + "0" * 32 + "-" + "d" * 16 + "-01", "00-x-y-01"])
def test_a_malformed_traceparent_is_no_link(caller: str) -> None:
    started = plan(batch((), [RunStarted(START, "r", {}, {}, caller)]), Ledger())
    (root,) = spans(plan(batch((), [ended()]), started.after))
    assert not root.links


def test_a_failed_run_ends_its_open_phases_and_carries_the_exception() -> None:
    error = ErrorInfo("ValueError", "shape", "Traceback ...")
    phase = SpanStarted("1" * 16, ids.root_span_id(RUN.run_id, KEY), "epoch 3", START + MS, {"epoch": 3})
    planned = plan(batch((), [ended("FAILED", error=error, open_spans=(phase,))]), Ledger())
    left_open, root = spans(planned)
    assert left_open.name == "epoch 3"
    assert left_open.end_time_unix_nano == END
    for span in (left_open, root):
        assert span.status.code == Status.STATUS_CODE_ERROR
        assert attributes(span)["error.type"] == "ValueError"
    (exception,) = root.events
    assert attributes(exception) == {
        "exception.type": "ValueError",
        "exception.message": "shape",
        "exception.stacktrace": "Traceback ...",
    }
    (record,) = [r for m in sent(planned, "logs") for r in m.resource_logs[0].scope_logs[0].log_records]
    assert record.event_name == "tracelet.run.ended"
    assert record.severity_text == "ERROR"
    assert attributes(record)["tracelet.run.state"] == "FAILED"
    assert record.body.string_value == "run bold-hawk FAILED after 10.0 s: ValueError: shape"


def test_a_killed_run_names_its_status_as_error_type() -> None:
    (root,) = spans(plan(batch((), [ended("KILLED")]), Ledger()))
    assert attributes(root)["error.type"] == "KILLED"
    assert root.status.code == Status.STATUS_CODE_ERROR


def test_params_beyond_a_spans_room_are_cut_to_digests_then_counted() -> None:
    long = {"config": "x" * 2_001}
    many = {f"p{i:04}": "y" * 1_000 for i in range(2_000)}
    (root,) = spans(plan(batch((), [ended(params=long | many)]), Ledger()))
    values = attributes(root)
    assert values["tracelet.param.config"] == "x" * 256
    assert values["tracelet.digest.param.config"].startswith("sha256:")
    assert values["tracelet.param.p0000"] == "y" * 1_000
    cut = [k for k in many if values.get(f"tracelet.param.{k}") == "y" * 256]
    assert cut
    assert all(f"tracelet.digest.param.{k}" in values for k in cut)
    present = sum(1 for k in many if f"tracelet.param.{k}" in values)
    assert values["tracelet.params.omitted"] == 2_000 - present
    assert root.ByteSize() < 900_000


def test_a_phases_long_texts_are_whole_in_events_and_its_request_is_small() -> None:
    root = ids.root_span_id(RUN.run_id, KEY)
    attributes_given = {f"text{i}": f"{i}" + "é" * 100_000 for i in range(20)} | {"n": 3}
    error = ErrorInfo("ValueError", "m" * 500_000, "begin" + "s" * 500_000 + "end")
    story = (SpanStarted("1" * 16, root, "epoch", START, attributes_given), SpanEnded("1" * 16, START + MS, error))
    planned = plan(batch((), story), Ledger())
    (span,) = spans(planned)
    assert span.ByteSize() < 900_000
    (exception,) = span.events
    assert attributes(exception)["exception.message"] == "m" * 8_000
    assert attributes(exception)["exception.stacktrace"].endswith("end")
    assert attributes(exception)["tracelet.digest.exception.stacktrace"].startswith("sha256:")
    whole: dict[str, str] = {}
    for message in sent(planned, "logs"):
        for record in message.resource_logs[0].scope_logs[0].log_records:
            assert record.event_name == "tracelet.span"
            assert record.span_id.hex() == "1" * 16
            key = attributes(record)["tracelet.chunk.key"]
            whole[key] = whole.get(key, "") + record.body.string_value
    assert attributes(span)["n"] == 3
    assert whole == {k: v for k, v in attributes_given.items() if k != "n"} | {
        "exception.message": error.message,
        "exception.stacktrace": error.stacktrace,
    }


def test_the_root_span_of_the_largest_run_fits_a_request() -> None:
    many = {f"p{i:04}": "y" * 1_000 for i in range(2_000)}
    error = ErrorInfo("E" * 63_000, "é" * 31_000, "s" * 63_000)
    (root,) = spans(plan(batch((), [ended("FAILED", error=error, params=many)]), Ledger()))
    assert root.ByteSize() < 880_000  # and its Resource


def test_another_rank_is_a_child_of_the_root_without_params() -> None:
    planned = plan(batch((), [ended(params={"lr": 1})], opening=opened(rank=2)), Ledger())
    (span,) = spans(planned)
    assert span.name == "rank 2"
    assert span.parent_span_id.hex() == ids.root_span_id(RUN.run_id, KEY)
    assert "tracelet.param.lr" not in attributes(span)


def test_a_ranks_end_is_its_span_its_open_phases_and_its_series_and_nothing_about_the_run() -> None:
    phase = SpanStarted("1" * 16, ids.rank_span_id(RUN.run_id, KEY, 2), "epoch", START + MS)
    begun = plan(batch((), [RunStarted(START, "r", {}, {}, f"00-{'c' * 32}-{'d' * 16}-01")]), Ledger())
    rank = RankEnded("KILLED", START, END, None, (phase,), {"w" * 16: (("loss", START),)})
    planned = plan(batch((), [rank], opening=opened(2), number=2), begun.after)
    left_open, span = spans(planned)
    assert (left_open.name, left_open.parent_span_id) == ("epoch", span.span_id)
    assert (span.name, attributes(span)["tracelet.run.state"], len(span.links)) == ("rank 2", "KILLED", 0)
    assert span.parent_span_id.hex() == ids.root_span_id(RUN.run_id, KEY)
    assert not sent(planned, "logs")
    assert not metrics(planned, "tracelet.run")
    assert [metric.name for _, metric in metrics(planned, "tracelet")] == ["loss"]


def test_an_attempts_end_where_rank_0_is_not_is_no_event() -> None:
    elsewhere = dataclasses.replace(ended("FAILED", newest=False), speaks=False)
    planned = plan(batch((), [elsewhere], opening=opened(2)), Ledger())
    assert [span.name for span in spans(planned)] == ["rank 2"]
    assert not sent(planned, "logs")


def test_a_word_that_a_run_is_lost_is_in_the_status_and_is_no_heartbeat() -> None:
    def told(metrics_of: list[tuple[Any, Any]]) -> dict[str, str]:
        return {
            metric.name: str(attributes(point).get("tracelet.run.state", ""))
            for _, metric in metrics_of
            for point in metric.gauge.data_points
            if point.as_double
        }

    planned = plan(batch((), [StateNoted(START, "LOST")]), Ledger(beat=START + 30_000 * MS))
    found = metrics(planned, "tracelet.run")
    assert told(found) == {"tracelet.run.status": "LOST"}
    ((at,),) = ({p.time_unix_nano for p in metric.gauge.data_points} for _, metric in found)
    assert planned.after.beat == at > START + 30_000 * MS
    beat = heartbeat_load(batch(), Heartbeat(START, "LOST", None, {}), Ledger())
    message = REQUESTS["metrics"].FromString(beat.encode())
    names = {metric.name for metric in message.resource_metrics[0].scope_metrics[0].metrics}
    assert "tracelet.run.heartbeat" not in names
    assert "tracelet.run.status" in names


def test_every_live_series_gets_an_end_marker_after_its_last_point_under_its_own_resource() -> None:
    one, two = opened(), opened(rank=1, instance="instance-1")
    both = Batch(
        1,
        RUN,
        "/nowhere",
        tuple(
            Part(writer, opening, (), batch().parts[0].points)
            for writer, opening in (("w1", one), ("w2", two), ("w3", one))
        ),
    )
    known = Ledger.from_json(plan(both, Ledger()).after.to_json())
    series = {
        "w1": (("loss", START), ("acc", START + MS)),
        "w2": (("loss", START + 5 * MS),),
        "w3": (("loss", START + 9 * MS),),
    }
    planned = plan(batch((), [ended(series=series)], writer="w1", number=2), known)
    found = {
        (resource["service.instance.id"], metric.name): point
        for resource, metric in metrics(planned, "tracelet")
        for point in metric.gauge.data_points
    }
    assert {key: point.time_unix_nano for key, point in found.items()} == {
        ("instance-0", "loss"): START + 10 * MS,
        ("instance-0", "acc"): START + 2 * MS,
        ("instance-1", "loss"): START + 6 * MS,
    }
    for point in found.values():
        assert point.flags == 1
        assert point.WhichOneof("value") is None
        assert not point.attributes


def test_the_final_state_comes_after_the_last_heartbeat_and_only_from_the_newest_attempt() -> None:
    ledger = Ledger(beat=END + 60 * MS)
    own = [m for _, m in metrics(plan(batch((), [ended("FAILED")]), ledger), "tracelet.run")]
    found = {m.name: m for m in own}
    assert "tracelet.run.info" not in found  # a heartbeat has said it
    states = {attributes(p)["tracelet.run.state"]: p for p in found["tracelet.run.status"].gauge.data_points}
    assert {name: p.as_double for name, p in states.items()} == {
        "RUNNING": 0,
        "FINISHED": 0,
        "FAILED": 1,
        "KILLED": 0,
        "LOST": 0,
    }
    assert states["FAILED"].time_unix_nano == END + 61 * MS
    gone = [p for m in own if m.name == "tracelet.run.heartbeat" for p in m.gauge.data_points]
    assert [(p.time_unix_nano, p.as_double, p.flags) for p in gone] == [
        (END + 61 * MS, (END + 61 * MS) / 1e9, 0),
        (END + 62 * MS, 0, 1),
    ]
    older = plan(batch((), [ended("FAILED", newest=False)]), ledger)
    final = [p for _, m in metrics(older, "tracelet.run") for p in m.gauge.data_points if not p.flags]
    assert not final


def test_an_attempt_that_was_over_before_its_first_heartbeat_says_at_its_end_who_it_is_and_when_it_began() -> None:
    own = [m for _, m in metrics(plan(batch((), [ended("KILLED")]), Ledger()), "tracelet.run")]
    said = {m.name: p for m in own for p in m.gauge.data_points if not p.flags}
    assert {name: p.as_double for name, p in said.items() if name.endswith(".time")} == {
        "tracelet.run.start.time": START / 1e9,
        "tracelet.run.attempt.start.time": START / 1e9,
    }
    assert attributes(said["tracelet.run.info"])["tracelet.run.attempt.start"] == START
    assert {p.time_unix_nano for p in said.values()} == {END}
    gone = {m.name: p.time_unix_nano for m in own for p in m.gauge.data_points if p.flags}
    ends = ("tracelet.run.heartbeat", "tracelet.run.start.time", "tracelet.run.attempt.start.time")
    assert gone == dict.fromkeys(ends, END + MS)
    older = plan(batch((), [ended("KILLED", newest=False)]), Ledger())
    assert not [m for _, m in metrics(older, "tracelet.run")]


def test_the_state_of_an_older_attempt_ends_without_a_word() -> None:
    planned = plan(batch((), [ended("FAILED", newest=False)]), Ledger(beat=START))
    (states,) = [m.gauge.data_points for _, m in metrics(planned, "tracelet.run") if m.name == "tracelet.run.status"]
    assert len(states) == 5
    assert all(point.flags == 1 and point.WhichOneof("value") is None for point in states)


def test_an_info_that_learns_mlflows_run_id_ends_the_one_without() -> None:
    ledger = Ledger()

    def beat(at: int, known: dict[str, str]) -> Any:
        heartbeat = Heartbeat(at, "RUNNING", None, known)
        message = REQUESTS["metrics"].FromString(heartbeat_load(batch(), heartbeat, ledger).encode())
        ledger.beaten(heartbeat)
        (scope,) = message.resource_metrics[0].scope_metrics
        (info,) = [metric for metric in scope.metrics if metric.name == "tracelet.run.info"]
        return {attributes(point).get("tracelet.mlflow.run_id"): point.flags for point in info.gauge.data_points}

    assert beat(START, {}) == {None: 0}
    assert beat(START + 30_000 * MS, {}) == {None: 0}
    assert beat(START + 60_000 * MS, {"mlflow-12345678": "abc"}) == {"abc": 0, None: 1}
    ledger = Ledger.from_json(ledger.to_json())
    assert beat(START + 90_000 * MS, {"mlflow-12345678": "abc"}) == {"abc": 0}


# ---- the counter of values that are no numbers ------------------------------------------------------------------


def test_nonfinite_values_are_counted_by_key_and_the_count_goes_on() -> None:
    first = plan(batch([("loss", math.nan, 0), ("loss", math.inf, 1), ("acc", 0.5, 1)]), Ledger())
    again = Ledger.from_json(first.after.to_json())
    second = plan(batch([("acc", -math.inf, 2), ("loss", math.nan, 2)], start=START + 50 * MS, number=2), again)
    ((_, one),) = metrics(first, "tracelet.run")
    ((_, two),) = metrics(second, "tracelet.run")
    assert one.name == "tracelet.metric.nonfinite"
    assert one.sum.is_monotonic
    assert one.sum.aggregation_temporality == AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
    (point,) = one.sum.data_points
    assert (point.as_int, point.time_unix_nano, point.start_time_unix_nano) == (2, START + MS, START)
    assert {attributes(p)["tracelet.metric.key"]: p.as_int for p in two.sum.data_points} == {"acc": 1, "loss": 3}


def test_the_counter_ends_with_its_metric() -> None:
    first = plan(batch([("loss", math.nan, 0), ("acc", 0.5, 1)]), Ledger())
    series = {"w" * 16: (("loss", START), ("acc", START + MS))}
    last = plan(batch((), [ended(series=series)], number=2), first.after)
    ((resource, counter),) = [
        found for found in metrics(last, "tracelet.run") if found[1].name == "tracelet.metric.nonfinite"
    ]
    (point,) = counter.sum.data_points
    assert resource["service.instance.id"] == "instance-0"
    assert (point.flags, point.WhichOneof("value"), point.time_unix_nano) == (1, None, START + MS)
    assert attributes(point) == {"tracelet.metric.key": "loss"}


def test_finite_values_whose_sum_overflows_are_not_counted() -> None:
    assert not metrics(plan(batch([("loss", 1.7e308, 0), ("loss", 1.7e308, 1)]), Ledger()), "tracelet.run")


def test_a_plan_leaves_the_ledger_as_it_was() -> None:
    ledger = Ledger()
    before = ledger.to_json()
    plan(batch([("loss", math.nan, 0)], [SpanStarted("1" * 16, "2" * 16, "epoch", START)]), ledger)
    assert ledger.to_json() == before
