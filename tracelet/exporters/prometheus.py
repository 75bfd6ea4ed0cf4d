"""The Prometheus exporter: a run's metrics straight to the OTLP receiver of a Prometheus, without a collector."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

from tracelet.exporters.base import Answer, Delivered
from tracelet.exporters.otlp_delivery import OtlpDelivery
from tracelet.exporters.otlp_wire import Reply, fingerprint
from tracelet.exporters.prometheus_http import PrometheusSender
from tracelet.guard import guard, logger
from tracelet.otlp.encode import Load, MetricsLoad
from tracelet.otlp.plan import Ledger, Plan, heartbeat_load, plan
from tracelet.otlp.prometheus import LeftOut, Window, for_prometheus
from tracelet.records import Batch, Heartbeat, RunInfo

__all__ = ["PrometheusExporter"]

_EVER = Window(0, 2**64)


class PrometheusExporter:
    """Sends a run's metrics as the series that the collector's file would make of them.

    Params, tags, spans and artifacts have no place in Prometheus and are left to other destinations. Points that the
    server's window would refuse are not sent, since one of them costs its whole request: they are counted in
    `memory()["left_out"]`, and said. What the server refuses nevertheless is found by halving, and named. A repeat of
    a batch has the same bytes.

    `spec` and `secrets` are as `tracelet.destinations` makes them; of `environ` the TRACELET_PROMETHEUS_* files count
    where those of the specification aren't here, and nothing of the OTEL_* variables, which are about another receiver.
    """

    max_points = 16_000
    linger_s = 1.0
    rising_limit_s: float | None = 60.0

    def __init__(
        self,
        spec: Mapping[str, Any],
        secrets: Mapping[str, Any],
        environ: Mapping[str, str],
        *,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._spec, self._secrets, self._environ = spec, secrets, environ
        self._prefix = str(spec["prefix"])
        self._age_s, self._ahead_s = float(spec["window_age_s"]), float(spec["window_ahead_s"])
        self._now_ns = now_ns
        self._sender: PrometheusSender | None = None
        self._headers: tuple[object, ...] | None = None  # the state of the file with headers when the sender was made
        self._certificates: tuple[object, ...] = ()  # and that of the certificates
        self._ledger = Ledger()
        self._left_out = LeftOut()
        self._said = LeftOut()
        self._run: RunInfo | None = None
        self._passed: bytes | None = None  # a request that was accepted

    def open(self, run: RunInfo, memory: Mapping[str, Any]) -> Answer:
        """Prometheus has nothing to open; `memory` is what later batches need of earlier ones."""
        self._run = run
        self._ledger = Ledger.from_json(memory)
        self._left_out = self._said = LeftOut(**memory.get("left_out", {}))
        return Delivered()

    def memory(self) -> Mapping[str, Any]:
        """What later batches need of those that are through, and how many points were `left_out`, by reason."""
        memory = self._ledger.to_json()
        if self._left_out:
            memory["left_out"] = dataclasses.asdict(self._left_out)
        return memory

    def begin(self, batch: Batch, note: Mapping[str, Any] | None = None) -> OtlpDelivery:
        """Prepare a batch; with `note`, make the very bytes that were made before, by the window of then."""
        planned = plan(batch, self._ledger, note)
        window = self._window() if note is None or "window" not in note else Window(*note["window"])
        loads: list[Load] = []
        left_out = LeftOut()
        if batch.again:
            window = _EVER  # what is wished for is asked for: the server's no is better than none
        for load in planned.loads:
            if batch.again and isinstance(load, MetricsLoad):
                loads.append(load)  # it was refused in the form in which it is sent
            elif load.signal == "metrics":
                shaped, out = for_prometheus(load, self._prefix, window)
                loads += shaped
                left_out += out
        kept = {**planned.note, "window": [window.oldest, window.newest]}
        return OtlpDelivery(loads, kept, self._send, self._control, lambda: self._through(planned, left_out))

    def beat(self, batch: Batch, heartbeat: Heartbeat) -> None:
        """Send the run's state, once."""
        loads, _ = for_prometheus(heartbeat_load(batch, heartbeat, self._ledger), self._prefix, self._window())
        if all(self._send("metrics", load.encode()).kind == "accepted" for load in loads):
            self._ledger.beaten(heartbeat)

    def close(self) -> None:
        """Let the connection go."""
        if self._left_out != self._said:
            self._said = self._left_out
            logger.warning("%s", self._words())
        self._drop()

    def _window(self) -> Window:
        now = self._now_ns()
        return Window(now - round(self._age_s * 1e9), now + round(self._ahead_s * 1e9))

    def _through(self, planned: Plan, left_out: LeftOut) -> None:
        self._ledger = self._ledger.after(planned)
        if left_out:
            if not self._left_out:
                self._said = left_out
                self._left_out += left_out
                logger.warning("%s", self._words())
                return
            self._left_out += left_out
            guard.limited("left out of prometheus", "%s", self._words())

    def _words(self) -> str:
        """What is not in Prometheus so far, why, and what helps."""
        out, run = self._left_out, self._run.run_id if self._run is not None else "RUN"
        reasons = [
            f"{count:,} {why}"
            for count, why in (
                (out.too_old, f"older than {self._age_s / 3600:g} h"),
                (out.ahead, f"more than {self._ahead_s / 60:g} min ahead of this clock"),
                (out.dense, "logged too fast for a millisecond of their own"),
            )
            if count
        ]
        said = f"so far {' and '.join(reasons)}: these points of run {run} are not sent to Prometheus, which would"
        helps = f"`tracelet export --format openmetrics {run}` makes a file that it can load, whatever the age"
        return f"{said} refuse them" + (f"; {helps}" if out.too_old or out.ahead else "")

    def _send(self, signal: str, body: bytes) -> Reply:
        del signal  # metrics, always
        files = PrometheusSender.files(self._spec, self._environ)
        headers = fingerprint(files.pop("headers_file"))
        certificates = fingerprint(*files.values())
        if headers != self._headers:
            self._drop()  # a token renewed in time: not one request is refused
        if self._sender is None:
            self._headers, self._certificates = headers, certificates
            try:
                self._sender = PrometheusSender.of(self._spec, self._secrets, self._environ)
            except (ValueError, OSError) as error:
                return Reply("later", f"the headers for Prometheus can't be read: {error}", loud=True)
        reply = self._sender.send(body)
        if reply.kind == "accepted":
            self._passed = body
        elif reply.credentials or (reply.kind == "later" and certificates != self._certificates):
            self._drop()
        return reply

    def _control(self, signal: str) -> bool:
        """Whether the server answers a request that it took before."""
        return self._passed is not None and self._send(signal, self._passed).kind in ("accepted", "refused")

    def _drop(self) -> None:
        if self._sender is not None:
            self._sender.close()
            self._sender = None
