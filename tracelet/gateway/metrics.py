"""The gateway's own metrics, `tracelet_gateway_*`, in a registry of their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from tracelet.gateway.callers import IntakeInfo, Taken
from tracelet.version import __version__

__all__ = ["GatewayMetrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class GatewayMetrics:
    """Counts what passes the door, and asks the intake for the rest when it is scraped.

    No label comes from a payload, so that nobody outside can make series.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tracelet_gateway_{name}", text, labels, registry=self.registry)

        self._requests = counter("requests", "Requests answered.", "signal", "transport", "code")
        self._refused = counter("refused", "Requests not acknowledged, by reason.", "reason")
        self._items = counter("items_taken", "Data points, log records and spans of runs, acknowledged.", "signal")
        self._foreign = counter("items_foreign", "Items of other services: acknowledged, not kept.", "signal")
        self._unknown = counter("items_unknown_wire", "Items of a wire major that is not known.", "signal")
        self._aside = counter("set_aside", "Requests written aside as they came.", "reason")
        self._lost = counter("set_aside_lost", "Requests acknowledged and lost: the folder for them is full.")
        self._seconds = Histogram(
            "tracelet_gateway_request_seconds",
            "From a request's headers to its answer.",
            ["signal"],
            registry=self.registry,
            buckets=_SECONDS,
        )
        self._bytes = Gauge(
            "tracelet_gateway_in_flight_bytes", "Bytes being received or taken.", registry=self.registry
        )
        self._bad = Gauge(
            "tracelet_gateway_tokens_file_bad",
            "1 while the tokens file can't be read, and the tokens of before are in force.",
            registry=self.registry,
        )
        info = Gauge("tracelet_gateway_build_info", "The release, as a label.", ["version"], registry=self.registry)
        info.labels(__version__).set(1)
        for signal in ("metrics", "logs", "traces"):
            for family in (self._items, self._foreign, self._unknown):
                family.labels(signal)  # a series that is there at 0 can be alerted on
        for reason in ("no token", "wrong token", "expired token", "foreign run", "full", "spool", "fault"):
            self._refused.labels(reason)

    def answered(self, signal: str, transport: str, code: int | str, seconds: float) -> None:
        """Count one answer."""
        self._requests.labels(signal, transport, str(code)).inc()
        self._seconds.labels(signal).observe(seconds)

    def refused(self, reason: str) -> None:
        """Count one request that is not acknowledged."""
        self._refused.labels(reason).inc()

    def took(self, signal: str, taken: Taken, *, foreign: int, unknown: int) -> None:
        """Count what became of one request."""
        self._items.labels(signal).inc(taken.items)
        self._foreign.labels(signal).inc(foreign)
        self._unknown.labels(signal).inc(unknown)

    def put_aside(self, reason: str, kept: bool) -> None:
        """Count a request that was written aside, or had to be written aside and was lost."""
        if kept:
            self._aside.labels(reason).inc()
        else:
            self._lost.inc()

    def watch(
        self,
        info: Callable[[], IntakeInfo],
        *,
        in_flight: Callable[[], int],
        tokens_bad: Callable[[], bool],
        artifact_bytes: Callable[[], int] | None = None,
    ) -> None:
        """Where to ask at each scrape."""
        self._bytes.set_function(in_flight)
        self._bad.set_function(lambda: float(tokens_bad()))
        self.registry.register(_Inside(info, artifact_bytes))

    def text(self) -> bytes:
        """All of it in the text format of Prometheus."""
        return generate_latest(self.registry)


class _Inside:
    """What the intake knows, as metrics."""

    def __init__(self, info: Callable[[], IntakeInfo], artifact_bytes: Callable[[], int] | None) -> None:
        self._info = info
        self._artifact_bytes = artifact_bytes
        self._lock = threading.Lock()
        self._delivered = -1
        self._well_at = time.monotonic()

    def describe(self) -> Iterator[Metric]:
        """Nothing: the registry must not ask an intake that has not begun."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Called at each scrape."""
        info = self._info()
        runs = GaugeMetricFamily("tracelet_gateway_runs", "Runs in the spool, by state.", labels=["state"])
        states = {"running": info.running, "lost": info.lost, "ended": info.runs - info.running - info.lost}
        for state, number in states.items():
            runs.add_metric([state], number)
        yield runs
        gauges: tuple[tuple[str, str, float], ...] = (
            ("spool_bytes", "Bytes of the spool.", info.bytes),
            ("undelivered_records", "Records and points that the destination has not acknowledged.", info.undelivered),
            ("open_runs", "Runs on their way to the destination.", info.open_runs),
            ("waiting_runs", "Runs that wait for their turn.", info.waiting_runs),
            ("mlflow_trouble_runs", "Runs whose delivery doesn't get on.", len(info.trouble)),
            ("mlflow_trouble", "1 while the destination takes nothing of some run.", int(bool(info.trouble))),
            ("mlflow_answered_age_seconds", "For how long nothing has arrived that should.", self._stuck_s(info)),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(f"tracelet_gateway_{name}", text, value=value)
        if self._artifact_bytes is not None:
            yield GaugeMetricFamily(
                "tracelet_gateway_artifact_bytes", "Bytes of artifacts held.", value=self._artifact_bytes()
            )
        for name, text, number in (
            ("points", "Values of metrics taken.", info.points),
            ("repeats", "Arrivals that were stored before, and not again.", info.repeats),
            ("delivered_points", "Points that destinations have taken.", info.delivered),
            ("undeliverable", "Things that the destination will never take; see rejected-*.jsonl.", info.refused),
        ):
            yield CounterMetricFamily(f"tracelet_gateway_{name}", text, value=number)

    def _stuck_s(self, info: IntakeInfo) -> float:
        with self._lock:
            now = time.monotonic()
            if not info.trouble or info.delivered != self._delivered:
                self._well_at = now
            self._delivered = info.delivered
            return now - self._well_at
