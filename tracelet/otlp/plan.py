"""A batch to the loads that carry it, and the few facts that have to outlive the batch.

Making loads is deterministic: the same batch with the same note gives the same bytes, in this process or after a
restart. What a batch needs of earlier ones (running totals, starts of spans that end in it) is in its note, which the
journal keeps beside it; so a repeat comes out right whether or not the ledger saw the first try.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tracelet import codec, ids
from tracelet.otlp import run_metrics, semconv
from tracelet.otlp.encode import (
    EventsLoad,
    Load,
    MetricsLoad,
    PointsLoad,
    ResourceBytes,
    SpansLoad,
    loads_of,
    of_writer,
    resource_bytes,
)
from tracelet.otlp.events import Position, events_of, in_pieces
from tracelet.otlp.spans import ended_span, final_spans, too_long
from tracelet.records import (
    Again,
    ArtifactLogged,
    AttemptEnded,
    Batch,
    ErrorInfo,
    Heartbeat,
    ParamsLogged,
    Part,
    PointBatch,
    RankEnded,
    Record,
    RunInfo,
    RunStarted,
    Scalar,
    SpanEnded,
    SpanStarted,
    StateNoted,
    TagsSet,
    WriterOpened,
)

__all__ = ["Ledger", "Plan", "heartbeat_load", "plan"]


@dataclass(slots=True)
class Ledger:
    """What later batches need of earlier ones; JSON in the journal between them."""

    resources: dict[str, Mapping[str, Scalar]] = field(default_factory=dict)  # instance id -> Resource
    writers: dict[str, str] = field(default_factory=dict)  # writer id -> instance id
    traceparents: dict[str, str] = field(default_factory=dict)  # attempt key -> the incoming one
    open_spans: dict[str, dict[str, Any]] = field(default_factory=dict)  # span id -> fields of its SpanStarted
    nonfinite: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)  # instance -> key -> total, last ns
    beat: int = 0  # time of the last heartbeat sent
    told: dict[str, str] = field(default_factory=dict)  # destination id -> the run's id there, as that heartbeat had it

    @classmethod
    def from_json(cls, memory: Mapping[str, Any]) -> Ledger:
        """The ledger that `to_json` gave."""
        return cls(
            resources=dict(memory.get("resources", {})),
            writers=dict(memory.get("writers", {})),
            traceparents=dict(memory.get("traceparents", {})),
            open_spans=dict(memory.get("open_spans", {})),
            nonfinite={
                instance: {key: (total, last) for key, (total, last) in keys.items()}
                for instance, keys in memory.get("nonfinite", {}).items()
            },
            beat=memory.get("beat", 0),
            told=dict(memory.get("told", {})),
        )

    def to_json(self) -> dict[str, Any]:
        """JSON from which `from_json` makes this ledger again."""
        return {
            "resources": dict(self.resources),
            "writers": dict(self.writers),
            "traceparents": dict(self.traceparents),
            "open_spans": dict(self.open_spans),
            "nonfinite": {
                instance: {key: list(pair) for key, pair in keys.items()} for instance, keys in self.nonfinite.items()
            },
            "beat": self.beat,
            "told": dict(self.told),
        }

    def beaten(self, heartbeat: Heartbeat) -> None:
        """This heartbeat has been sent."""
        if heartbeat.time_unix_nano > self.beat:
            self.beat, self.told = heartbeat.time_unix_nano, dict(heartbeat.backend_ids)

    def after(self, planned: Plan) -> Ledger:
        """The ledger once a plan is through; a heartbeat may have been sent since the plan was made."""
        new = planned.after.copy()
        if self.beat > new.beat:
            new.beat, new.told = self.beat, self.told
        return new

    def copy(self) -> Ledger:
        """A ledger that can change without this one."""
        return Ledger.from_json(self.to_json())


@dataclass(frozen=True, slots=True)
class Plan:
    """A batch ready to be sent: its loads in order, what the journal keeps, and the ledger once it is through."""

    loads: tuple[Load, ...]
    note: dict[str, Any]
    after: Ledger


def plan(batch: Batch, ledger: Ledger, note: Mapping[str, Any] | None = None) -> Plan:
    """The loads of `batch`, in sending order: a writer's points, then its events, then its spans."""
    work = _Work(batch.run, ledger.copy(), note or {}, again=batch.again)
    loads = [of_writer(load, part.writer_id) for part in batch.parts for load in work.part(part)]
    return Plan(tuple(loads), work.note, work.ledger)


def heartbeat_load(batch: Batch, heartbeat: Heartbeat, ledger: Ledger) -> MetricsLoad:
    """The run's state now, after the heartbeats that `ledger` knows of."""
    opened = batch.parts[0].opened
    told = ledger.told if ledger.beat else None
    return MetricsLoad(
        resource_bytes(opened.resource), tuple(run_metrics.heartbeat_metrics(batch.run, opened, heartbeat, told))
    )


class _Work:
    """One planning: reads the ledger where the note says nothing, and writes down in the note what it read."""

    def __init__(self, run: RunInfo, ledger: Ledger, note: Mapping[str, Any], *, again: bool) -> None:
        self.run = run
        self.again = again
        self.ledger = ledger
        self.note: dict[str, Any] = {"beat": note.get("beat", ledger.beat)}
        for instance, keys in note.get("nonfinite", {}).items():
            self.ledger.nonfinite.setdefault(instance, {}).update({key: (t, last) for key, (t, last) in keys.items()})
        self.ledger.open_spans.update(note.get("open_spans", {}))

    def part(self, part: Part) -> Iterator[Load]:
        opened = part.opened
        instance = _instance(opened)
        self.ledger.resources[instance] = opened.resource
        self.ledger.writers[part.writer_id] = instance
        resource = resource_bytes(opened.resource)
        if len(part.points):
            yield PointsLoad.of(resource, part.points)
        # What goes out again was counted when it was refused.
        counters = [] if self.again else self._nonfinite(instance, opened, part.points)
        if counters:
            yield MetricsLoad(resource, tuple(counters))
        where = Position(
            ids.trace_id(self.run.run_id, opened.attempt_key), ids.root_span_id(self.run.run_id, opened.attempt_key)
        )
        events = [
            event
            for record in part.records
            if isinstance(record, (RunStarted, ParamsLogged, TagsSet, ArtifactLogged, AttemptEnded))
            for event in events_of(record, self.run, where)
        ]
        spans = [span for record in part.records for span in self._spans(opened, record, events)]
        if events:
            yield EventsLoad(resource, tuple(events))
        if spans:
            yield SpansLoad(resource, tuple(spans))
        for record in part.records:
            if isinstance(record, StateNoted):
                # A moment after the last heartbeat; and what comes next is a moment after this.
                self.ledger.beat = max(record.time_unix_nano, self.note["beat"] + run_metrics.MILLISECOND)
                yield MetricsLoad(resource, tuple(run_metrics.status(self.ledger.beat, record.state)))
            if isinstance(record, AttemptEnded):
                yield from self._ended(resource, opened, record)
            if isinstance(record, (AttemptEnded, RankEnded)):
                yield from self._series_ended(opened, record)
        yield from loads_of(resource, [record.facts for record in part.records if isinstance(record, Again)])

    def _spans(self, opened: WriterOpened, record: Record, events: list[Any]) -> Iterator[Any]:
        """The spans that `record` lets out; what they have no room for is appended to `events`."""
        if isinstance(record, RunStarted) and record.traceparent:
            self.ledger.traceparents[opened.attempt_key] = record.traceparent
        elif isinstance(record, SpanStarted):
            fields = dataclasses.asdict(record)
            fields["attributes"] = dict(record.attributes)
            self.ledger.open_spans[record.span_id] = fields
        elif isinstance(record, SpanEnded):
            begun = self.ledger.open_spans.pop(record.span_id, None)
            if begun is None:  # its start was lost with a damaged frame: nothing could be sent but a bare id
                return
            self.note.setdefault("open_spans", {})[record.span_id] = begun
            start = SpanStarted(**begun)
            events += self._pieces(opened, start, record.error, record.end_unix_nano)
            yield ended_span(self.run, opened, start, record.end_unix_nano, record.error)
        elif isinstance(record, (AttemptEnded, RankEnded)):
            for phase in record.open_spans:
                self.ledger.open_spans.pop(phase.span_id, None)
                events += self._pieces(opened, phase, None, record.end_unix_nano)
            yield from final_spans(self.run, opened, record, self.ledger.traceparents.get(opened.attempt_key))

    def _pieces(self, opened: WriterOpened, start: SpanStarted, error: ErrorInfo | None, time: int) -> list[Any]:
        where = Position(ids.trace_id(self.run.run_id, opened.attempt_key), start.span_id)
        return in_pieces(semconv.EVENT_SPAN, time, too_long(start, error), where, failed=error is not None)

    def _nonfinite(self, instance: str, opened: WriterOpened, points: PointBatch) -> list[Any]:
        total_of_all = sum(points.values)
        if total_of_all - total_of_all == 0:  # finite, so every value is
            return []
        found: dict[str, list[int]] = {}
        # value - value is zero for every finite value and NaN for the others.
        for i, value in enumerate(points.values):
            if value - value != 0:
                found.setdefault(points.names[points.metric_ids[i]], []).append(points.time_unix_nano[i])
        totals = self.ledger.nonfinite.setdefault(instance, {}) if found else {}
        metrics = []
        for key, times in found.items():
            total, last = totals.get(key, (0, 0))
            self.note.setdefault("nonfinite", {}).setdefault(instance, {})[key] = [total, last]
            time = max(*times, last + run_metrics.MILLISECOND)
            totals[key] = (total + len(times), time)
            metrics.append(run_metrics.nonfinite(key, opened.attempt_started_unix_nano, time, total + len(times)))
        return metrics

    def _ended(self, resource: ResourceBytes, opened: WriterOpened, ended: AttemptEnded) -> Iterator[Load]:
        # After the last heartbeat, which may be later than the end: the shipper goes on while it drains.
        time = max(ended.end_unix_nano, self.note["beat"] + run_metrics.MILLISECOND)
        beaten, own = bool(self.note["beat"]), []
        if ended.newest:
            own += run_metrics.last_words(self.run, opened, time, ended.status, first=not beaten)
        elif beaten:
            own += run_metrics.status_ended(time)
        if beaten or ended.newest:
            names = [semconv.RUN_HEARTBEAT, semconv.RUN_START_TIME, semconv.ATTEMPT_START_TIME]
            if beaten:
                names.append(semconv.LAST_ITERATION_TIME)
            own += run_metrics.end_markers((name, time) for name in names)
        if own:
            yield MetricsLoad(resource, tuple(own))

    def _series_ended(self, opened: WriterOpened, ended: AttemptEnded | RankEnded) -> Iterator[Load]:
        by_instance: dict[str, list[tuple[str, int]]] = {}
        for writer, series in ended.series.items():
            by_instance.setdefault(self.ledger.writers.get(writer, _instance(opened)), []).extend(series)
        for instance, names_and_times in by_instance.items():
            attributes = self.ledger.resources.get(instance, opened.resource)
            markers = run_metrics.end_markers(names_and_times)
            if markers:
                yield MetricsLoad(resource_bytes(attributes), tuple(markers), semconv.SCOPE)
            counted = self.ledger.nonfinite.get(instance, {})
            if counted:
                counters = (run_metrics.nonfinite_ended(key, last) for key, (_, last) in counted.items())
                yield MetricsLoad(resource_bytes(attributes), tuple(counters))


def _instance(opened: WriterOpened) -> str:
    named = opened.resource.get(semconv.SERVICE_INSTANCE_ID)
    return str(named) if named else codec.encode(opened)[1].decode()
