"""The mapping to MLflow as the OpenTelemetry SDK's own exporters, for programs that build their own pipeline."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from opentelemetry.sdk._logs.export import LogRecordExporter, LogRecordExportResult
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from tracelet import settings
from tracelet.backends import MLflow
from tracelet.destinations import to_destination
from tracelet.exporters.mlflow.sdk_runs import Missing, Runs, leave, shared
from tracelet.guard import guard, logger
from tracelet.otlp.decode import Decoded, decode_logs, decode_metrics, decode_traces

if TYPE_CHECKING:
    from opentelemetry.sdk._logs import ReadableLogRecord
    from opentelemetry.sdk.metrics.export import MetricsData
    from opentelemetry.sdk.trace import ReadableSpan

__all__ = ["MLflowLogExporter", "MLflowMetricExporter", "MLflowSpanExporter"]


class _Exporting:
    """What the three have in common: decoded requests to MLflow, in a bounded time."""

    def __init__(self, tracking_uri: str | None, timeout_s: float) -> None:
        given = settings.from_process({"tracking_uri": tracking_uri})
        self._destination, self._secrets = to_destination(MLflow(given.tracking_uri), given.environ, given.cwd)
        # MLflow's own default lets one request take two minutes, longer than the SDK waits for all of them.
        limit = min(timeout_s, _seconds(given.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT"), timeout_s))
        self._environ = {**given.environ, "MLFLOW_HTTP_REQUEST_TIMEOUT": str(limit)}
        self._timeout_s = timeout_s
        self._pid: int | None = None
        self._runs: Runs | None = None
        self._is_shut = False
        self.foreign = 0

    def send(self, decoded: Decoded, timeout_s: float) -> bool:
        """Whether MLflow has all of `decoded` that is a run's."""
        until = time.monotonic() + timeout_s
        beside = decoded.foreign + sum(decoded.unknown.values()) + sum(len(each.pieces) for each in decoded.arrivals)
        if beside:
            self.foreign += beside
            guard.limited(
                "foreign to MLflow",
                "%d items so far are none of a run's (%s) and were left out of MLflow;"
                " tracelet.otlp.resource_attributes makes a run's Resource",
                self.foreign,
                ", ".join([*decoded.reasons, *decoded.unknown]) or "pieces of long values",
            )
        sent = True
        for arrival in decoded.arrivals:
            if self._is_shut:
                missing: Missing | None = Missing(arrival.items, "the exporter has been shut down")
            else:
                missing = self._all_runs().deliver(arrival, until)
            if missing is not None:
                sent = False
                run_id = arrival.run.run_id
                # Each time, not once a minute: what it tells of is gone.
                logger.warning("%d items of run %s are not in MLflow: %s", missing.items, run_id, missing.why)
        return sent

    def shut_down(self) -> None:
        """Nothing goes out any more; may be called again."""
        self._is_shut = True
        runs, self._runs = self._runs, None
        if runs is not None and self._pid == os.getpid():
            leave(runs)

    def _all_runs(self) -> Runs:
        if self._runs is None or self._pid != os.getpid():
            self._pid = os.getpid()
            self._runs = shared(self._destination, self._secrets, self._environ)
        return self._runs


def _seconds(text: str | None, default: float) -> float:
    try:
        return float(text or default)
    except ValueError:
        return default


class MLflowSpanExporter(SpanExporter):
    """Spans below a run's Resource to MLflow's traces, linked to the run; entry point `mlflow` of the SDK.

    `tracking_uri`: an MLflow server or database, MLFLOW_TRACKING_URI if it is None. `foreign`: how many spans were
    none of a run's, and left out.

    `export` returns SUCCESS only when MLflow has all of a run's spans, after at most about `timeout_s`. There is no
    spool here: what failed, and what waits in the SDK's queue when the process dies, is lost, and MLflow being down
    for longer than that is enough. Where that matters use `tracelet.start_logging`, or send OTLP to the gateway.

    Raises:
        ConfigError: an address that can't be right.

    Examples:
        >>> from tracelet.exporters.mlflow.sdk import MLflowSpanExporter
        >>> MLflowSpanExporter("http://mlflow.example:5000").foreign
        0
    """

    def __init__(self, tracking_uri: str | None = None, *, timeout_s: float = 30.0) -> None:
        self._to_mlflow = _Exporting(tracking_uri, timeout_s)
        self._timeout_s = timeout_s

    @property
    def foreign(self) -> int:
        """How many spans were none of a run's so far."""
        return self._to_mlflow.foreign

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send these spans now; see the class."""
        from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans

        sent = self._to_mlflow.send(decode_traces(encode_spans(spans)), self._timeout_s)
        return SpanExportResult.SUCCESS if sent else SpanExportResult.FAILURE

    def shutdown(self) -> None:
        """Let the connections go; later exports fail."""
        self._to_mlflow.shut_down()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """True: nothing waits in here."""
        return True


class MLflowMetricExporter(MetricExporter):
    """Gauges of scope `tracelet` below a run's Resource to the run's metrics; entry point `mlflow` of the SDK.

    The attribute `tracelet.iteration` becomes MLflow's step. The SDK's gauge keeps one value for each set of
    attributes between two exports, so log each iteration once. Else as `MLflowSpanExporter`.
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        *,
        timeout_s: float = 30.0,
        preferred_temporality: Any = None,
        preferred_aggregation: Any = None,
    ) -> None:
        super().__init__(preferred_temporality, preferred_aggregation)
        self._to_mlflow = _Exporting(tracking_uri, timeout_s)
        self._timeout_s = timeout_s

    @property
    def foreign(self) -> int:
        """How many data points were none of a run's so far."""
        return self._to_mlflow.foreign

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> MetricExportResult:
        """Send these data points now, in at most `timeout_millis`; see the class."""
        from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics

        timeout_s = min(self._timeout_s, timeout_millis / 1_000)
        sent = self._to_mlflow.send(decode_metrics(encode_metrics(metrics_data)), timeout_s)
        return MetricExportResult.SUCCESS if sent else MetricExportResult.FAILURE

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        """Let the connections go; later exports fail."""
        self._to_mlflow.shut_down()

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        """True: nothing waits in here."""
        return True


class MLflowLogExporter(LogRecordExporter):
    """Log events of the wire contract below a run's Resource to the run: params, tags, its end; entry point `mlflow`.

    They come from a logger named `tracelet`; other log records are counted in `foreign`. Else as `MLflowSpanExporter`.
    """

    def __init__(self, tracking_uri: str | None = None, *, timeout_s: float = 30.0) -> None:
        self._to_mlflow = _Exporting(tracking_uri, timeout_s)
        self._timeout_s = timeout_s

    @property
    def foreign(self) -> int:
        """How many log records were none of a run's so far."""
        return self._to_mlflow.foreign

    def export(self, batch: Sequence[ReadableLogRecord]) -> LogRecordExportResult:
        """Send these events now; see the class."""
        from opentelemetry.exporter.otlp.proto.common._log_encoder import encode_logs

        sent = self._to_mlflow.send(decode_logs(encode_logs(batch)), self._timeout_s)
        return LogRecordExportResult.SUCCESS if sent else LogRecordExportResult.FAILURE

    def shutdown(self) -> None:
        """Let the connections go; later exports fail."""
        self._to_mlflow.shut_down()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """True: nothing waits in here."""
        return True
