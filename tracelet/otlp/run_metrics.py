"""The run's own gauges and counters (scope `tracelet.run`), and the end markers of the user's series."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from tracelet import ids
from tracelet.otlp import semconv
from tracelet.otlp.encode import attributes
from tracelet.otlp.encode_points import wire_text
from tracelet.records import LOST, Heartbeat, RunInfo, Scalar, WriterOpened

if TYPE_CHECKING:
    from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

__all__ = [
    "MILLISECOND",
    "end_marker",
    "end_markers",
    "heartbeat_metrics",
    "last_words",
    "nonfinite",
    "nonfinite_ended",
    "status",
    "status_ended",
]

MILLISECOND = 1_000_000  # Prometheus tells two points of a series apart only from here on
_NO_RECORDED_VALUE = 1  # DataPointFlags.FLAG_NO_RECORDED_VALUE


def _gauge(name: str, time: int, value: float, unit: str = "", values: Mapping[str, Scalar] | None = None) -> Metric:
    from opentelemetry.proto.metrics.v1.metrics_pb2 import Gauge, Metric, NumberDataPoint

    point = NumberDataPoint(time_unix_nano=time, as_double=value, attributes=attributes(values or {}))
    return Metric(name=name, unit=unit, gauge=Gauge(data_points=[point]))


def status(time: int, state: str) -> list[Metric]:
    """`tracelet.run.status`: 1 for the state the run is in, 0 for each of the others."""
    return [
        _gauge(semconv.RUN_STATUS, time, float(each == state), values={semconv.STATE: each}) for each in semconv.STATES
    ]


def status_ended(time: int) -> list[Metric]:
    """The end of `tracelet.run.status` where another attempt has the word."""
    return [_ended(semconv.RUN_STATUS, time, {semconv.STATE: each}) for each in semconv.STATES]


def heartbeat_metrics(
    run: RunInfo, opened: WriterOpened, heartbeat: Heartbeat, told: Mapping[str, str] | None = None
) -> list[Metric]:
    """What is sent again every 30 s, since Prometheus forgets a series after 5 minutes.

    `told`: the backend ids of the heartbeat before, None if this is the first. Where they were others, that info's
    series gets its end, since two of them side by side would make every join on the run fail for 5 minutes.
    """
    time = heartbeat.time_unix_nano
    info = _info(run, opened, heartbeat.backend_ids)
    metrics = [
        _gauge(semconv.RUN_INFO, time, 1.0, values=info),
        *status(time, heartbeat.state),
        # That nothing is heard of a run is no sign of life of it.
        *([] if heartbeat.state == LOST else [_moment(semconv.RUN_HEARTBEAT, time, time)]),
        *_starts(opened, time, heartbeat.run_started_unix_nano),
    ]
    if told is not None and (before := _info(run, opened, told)) != info:
        metrics.append(_ended(semconv.RUN_INFO, time, before))
    if heartbeat.last_iteration_unix_nano is not None:
        metrics.append(_moment(semconv.LAST_ITERATION_TIME, time, heartbeat.last_iteration_unix_nano))
    return metrics


def last_words(run: RunInfo, opened: WriterOpened, time: int, state: str, *, first: bool) -> list[Metric]:
    """The state a run ended in, with a last heartbeat: until when it lived can then be asked of one series.

    `first`: nothing was said of the attempt before, since it was over when it could be sent. Then who it is goes along.
    """
    metrics = [*status(time, state), _moment(semconv.RUN_HEARTBEAT, time, time)]
    if first:
        metrics += [_gauge(semconv.RUN_INFO, time, 1.0, values=_info(run, opened, {})), *_starts(opened, time, None)]
    return metrics


def _moment(name: str, time: int, said: int) -> Metric:
    return _gauge(name, time, said / 1e9, "s")


def _starts(opened: WriterOpened, time: int, run_started: int | None) -> list[Metric]:
    """As numbers, since a label can't be compared or subtracted: which attempt is the newest, how long a run took."""
    attempt = opened.attempt_started_unix_nano
    return [
        _moment(semconv.RUN_START_TIME, time, attempt if run_started is None else run_started),
        _moment(semconv.ATTEMPT_START_TIME, time, attempt),
    ]


def _info(run: RunInfo, opened: WriterOpened, backend_ids: Mapping[str, str]) -> dict[str, Scalar]:
    info: dict[str, Scalar] = {
        semconv.PROJECT: run.project,
        semconv.EXPERIMENT_NAME: run.experiment_name,
        semconv.RUN_NAME: run.run_name,
        semconv.RUN_ATTEMPT: opened.resource.get(semconv.RUN_ATTEMPT, opened.attempt_key),
        semconv.ATTEMPT_STARTED: opened.attempt_started_unix_nano,
        semconv.HOST_NAME: opened.resource.get(semconv.HOST_NAME, ""),
        semconv.SERVICE_NAME: opened.resource.get(semconv.SERVICE_NAME, run.project),
        semconv.TRACE_ID: ids.trace_id(run.run_id, opened.attempt_key),
    }
    for destination, run_id in backend_ids.items():
        if destination.startswith("mlflow"):
            info[semconv.MLFLOW_RUN_ID] = run_id
    return info


def nonfinite(key: str, start: int, time: int, total: int) -> Metric:
    """How many NaN and infinite values metric `key` has had so far: some backends drop the values themselves."""
    from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality, Metric, NumberDataPoint, Sum

    point = NumberDataPoint(
        start_time_unix_nano=start,
        time_unix_nano=time,
        as_int=total,
        attributes=attributes({semconv.METRIC_KEY: key}),
    )
    temporality = AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
    return Metric(
        name=semconv.NONFINITE,
        sum=Sum(data_points=[point], aggregation_temporality=temporality, is_monotonic=True),
    )


def nonfinite_ended(key: str, last: int) -> Metric:
    """The end of that counter for metric `key`."""
    metric = nonfinite(key, 0, last + MILLISECOND, 0)
    (point,) = metric.sum.data_points
    point.ClearField("start_time_unix_nano")
    point.ClearField("as_int")
    point.flags = _NO_RECORDED_VALUE
    return metric


def end_marker(name: str, last: int) -> Metric:
    """The point that says a series has ended: dashboards and alerts stop at once instead of after 5 minutes."""
    return _ended(wire_text(name), last + MILLISECOND)


def _ended(name: str, time: int, values: Mapping[str, Scalar] | None = None) -> Metric:
    from opentelemetry.proto.metrics.v1.metrics_pb2 import Gauge, Metric, NumberDataPoint

    point = NumberDataPoint(time_unix_nano=time, flags=_NO_RECORDED_VALUE, attributes=attributes(values or {}))
    return Metric(name=name, gauge=Gauge(data_points=[point]))


def end_markers(series: Iterable[tuple[str, int]]) -> list[Metric]:
    """One end marker for each name, after the latest of its times."""
    latest: dict[str, int] = {}
    for name, last in series:
        latest[name] = max(last, latest.get(name, 0))
    return [end_marker(name, last) for name, last in latest.items()]
