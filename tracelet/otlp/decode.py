"""OTLP requests back to records and points, by the tables of the wire contract; pure, the other half of `plan`.

    Resource ─ owner_of ─┬─ foreign or unknown: counted
                         └─ Arrival ─┬─ metrics: Columns (the user's points), the run's own state
                                     ├─ logs: Events (params, tags, artifacts, start and end, pieces of long values)
                                     └─ traces: Spans (as they are; params, tags and end of the root span)

Takes every minor version of the wire's major one: attributes it doesn't know stay on the Resource, in the spans and in
the start's environment. Never raises, whatever a well-formed message holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from tracelet.otlp import semconv
from tracelet.otlp.arrival import Arrival, AttemptEnd, Decoded, Piece
from tracelet.otlp.decode_body import Malformed, parse
from tracelet.otlp.decode_events import ENDS, Events, whole
from tracelet.otlp.decode_points import Columns, count_points
from tracelet.otlp.decode_resource import Owner, Tally, owner_of
from tracelet.otlp.decode_spans import Spans
from tracelet.records import LOST, PointBatch, Record

if TYPE_CHECKING:
    from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

__all__ = [
    "Arrival",
    "AttemptEnd",
    "Decoded",
    "Malformed",
    "Piece",
    "decode_logs",
    "decode_metrics",
    "decode_traces",
    "parse",
    "whole",
]


def decode_metrics(request: ExportMetricsServiceRequest) -> Decoded:
    """What a metrics request says: the user's points, and of the run's own gauges its start and its last state.

    Of a point, `tracelet.iteration` is 0 where it is missing, as MLflow has it.
    """
    tally, arrivals = Tally(), []
    for resource in request.resource_metrics:
        counts = [sum(map(count_points, scope.metrics)) for scope in resource.scope_metrics]
        items = sum(counts)
        owner = owner_of(resource.resource, items, tally)
        if owner is None:
            continue
        columns, state = Columns(), _State()
        before = tally.foreign
        for scope, count in zip(resource.scope_metrics, counts, strict=True):
            if scope.scope.name == semconv.SCOPE:
                for metric in scope.metrics:
                    columns.add(metric, tally)
            elif scope.scope.name == semconv.RUN_SCOPE:
                for metric in scope.metrics:
                    state.add(metric)
            else:
                tally.add_foreign("another scope", count)
        items -= tally.foreign - before
        if items:
            firsts = (columns.first(), *state.times)
            points = columns.batch()
            arrivals.append(
                _arrival(owner, items, firsts, points=points, started=state.started, ended=state.ended, lost=state.lost)
            )
    return _decoded(arrivals, tally)


def decode_logs(request: ExportLogsServiceRequest) -> Decoded:
    """What a logs request says: params, tags, artifacts, start and end, and pieces of long values.

    A value whose pieces are all here is a record of its own, after the event that has its beginning.
    """
    tally, arrivals = Tally(), []
    for resource in request.resource_logs:
        items = sum(len(scope.log_records) for scope in resource.scope_logs)
        owner = owner_of(resource.resource, items, tally)
        if owner is None:
            continue
        before = tally.foreign
        events = Events(owner, tally)
        ours = []
        for scope in resource.scope_logs:
            if scope.scope.name == semconv.SCOPE:
                ours.append(scope.log_records)
            else:
                tally.add_foreign("another scope", len(scope.log_records))
        events.take(chain.from_iterable(ours))
        items -= tally.foreign - before
        if items:
            arrivals.append(
                _arrival(
                    owner,
                    items,
                    events.times,
                    records=events.records,
                    pieces=events.pieces,
                    started=events.started,
                    ended=events.ended,
                )
            )
    return _decoded(arrivals, tally)


def decode_traces(request: ExportTraceServiceRequest) -> Decoded:
    """What a traces request says: the spans as they are, all that are below a run's Resource, whatever their scope.

    The root span's params, tags and end come as records too, for stacks that send traces alone.
    """
    tally, arrivals = Tally(), []
    for resource in request.resource_spans:
        items = sum(len(scope.spans) for scope in resource.scope_spans)
        owner = owner_of(resource.resource, items, tally)
        if owner is None or not items:
            continue
        spans = Spans(owner)
        spans.take(resource)
        arrivals.append(
            _arrival(owner, items, spans.times, records=spans.records, started=spans.started, ended=spans.ended)
        )
    return _decoded(arrivals, tally)


class _State:
    """What the metrics of scope `tracelet.run` say of an attempt.

    Its start is taken from the info's attribute, in whole ns; the gauges of starts say the same, for queries.
    """

    def __init__(self) -> None:
        self.times: list[int] = []
        self.started: int | None = None
        self.ended: AttemptEnd | None = None
        self.lost = False

    def add(self, metric: Any) -> None:
        points = metric.gauge.data_points if metric.WhichOneof("data") == "gauge" else ()
        for point in points:
            if point.flags & 1:
                continue
            self.times.append(point.time_unix_nano)
            for attribute in point.attributes:
                if attribute.key == semconv.ATTEMPT_STARTED and metric.name == semconv.RUN_INFO:
                    self.started = max(attribute.value.int_value, 0) or self.started
                elif attribute.key == semconv.STATE and metric.name == semconv.RUN_STATUS:
                    self._state(attribute.value.string_value, point)

    def _state(self, state: str, point: Any) -> None:
        is_in = point.as_double == 1.0 or point.as_int == 1
        self.lost = self.lost or (is_in and state == LOST)
        if is_in and state in ENDS and (self.ended is None or point.time_unix_nano >= self.ended.end_unix_nano):
            self.ended = AttemptEnd(state, point.time_unix_nano, None, "status")


def _arrival(
    owner: Owner,
    items: int,
    times: Iterable[int],
    *,
    points: PointBatch | None = None,
    records: Sequence[Record] = (),
    pieces: tuple[Piece, ...] = (),
    started: int | None,
    ended: AttemptEnd | None,
    lost: bool = False,
) -> Arrival:
    return Arrival(
        run=owner.run,
        attempt_key=owner.attempt_key,
        rank=owner.rank,
        instance_id=owner.instance_id,
        resource=owner.resource,
        points=points,
        records=tuple(records),
        pieces=pieces,
        started_unix_nano=started,
        first_unix_nano=min(filter(None, times), default=0),
        ended=ended,
        items=items,
        lost=lost,
    )


def _decoded(arrivals: Sequence[Arrival], tally: Tally) -> Decoded:
    return Decoded(tuple(arrivals), tally.foreign, tally.unknown, tally.reasons)
