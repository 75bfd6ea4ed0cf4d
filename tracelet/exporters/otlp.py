"""The OTLP exporter: metrics, traces and logs of a run to a collector or a backend that speaks OTLP."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from tracelet.exporters.artifact_store import place_for
from tracelet.exporters.base import Answer, Delivered
from tracelet.exporters.otlp_artifacts import with_addresses
from tracelet.exporters.otlp_delivery import OtlpDelivery
from tracelet.exporters.otlp_wire import Options, Reply, Sender, fingerprint, options_for, remembered
from tracelet.guard import logger
from tracelet.otlp.encode import SIGNALS
from tracelet.otlp.plan import Ledger, Plan, heartbeat_load, plan
from tracelet.records import Batch, Heartbeat, RunInfo

__all__ = ["OTLPExporter"]

_CONTROL_BYTES = 64_000  # of the requests that passed, one that is cheap to repeat is kept


class OTLPExporter:
    """Sends what a run logs, straight from its records, over http/protobuf or gRPC.

    `spec` and `secrets` are as `tracelet.destinations` makes them; what they leave open comes from the
    OTEL_EXPORTER_OTLP_* variables, read by OpenTelemetry's own exporters from this process's environment, of which
    `environ` is a view.

    A repeat of a batch has the same bytes, which OTLP receivers that keep points by series and time take without
    effect. What the receiver refuses for good is found by halving, and named.

    Raises:
        ConfigError: a protocol that isn't http/protobuf or grpc, or no place for artifacts (`artifact_store`).
    """

    max_points = 16_000  # 0.75 MB in one request, below Kafka's record limit; 8 MB with Prometheus' labels
    linger_s = 1.0
    rising_limit_s: float | None = 60.0

    def __init__(self, spec: Mapping[str, Any], secrets: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        signals = spec.get("signals")
        self._signals = tuple(SIGNALS if signals is None else signals)
        self._options = {signal: options_for(signal, spec, secrets, environ) for signal in self._signals}
        self._place = place_for(remembered(spec, secrets) | dict(environ)) if "logs" in self._signals else None
        self._senders: dict[str, Sender] = {}
        self._files: dict[str, tuple[object, ...]] = {}
        self._headers: dict[str, tuple[object, ...]] = {}
        self._ledger = Ledger()
        self._passed: dict[str, bytes] = {}  # by signal, a request that was accepted
        self._age_s: float | None = spec.get("window_age_s")
        self._old = 0  # points sent that a Prometheus behind the receiver would not take any more
        self._run_id = "RUN"
        left_out = [signal for signal in SIGNALS if signal not in self._signals]
        if left_out:
            logger.info("OTLP: %s not sent, since no endpoint is set for them", " and ".join(left_out))

    def open(self, run: RunInfo, memory: Mapping[str, Any]) -> Answer:
        """OTLP has nothing to open; `memory` is what later batches need of earlier ones."""
        self._ledger = Ledger.from_json(memory)
        self._run_id = run.run_id
        return Delivered()

    def memory(self) -> Mapping[str, Any]:
        """What later batches need of those that are through: see `tracelet.otlp.plan.Ledger`."""
        return self._ledger.to_json()

    def begin(self, batch: Batch, note: Mapping[str, Any] | None = None) -> OtlpDelivery:
        """Prepare a batch; with `note`, make the very bytes that were made before."""
        batch, uploads, kept = with_addresses(batch, self._place, note)
        planned = plan(batch, self._ledger, note)
        planned.note.update(kept)
        loads = [load for load in planned.loads if load.signal in self._signals]
        return OtlpDelivery(
            loads,
            planned.note,
            self._send,
            self._control,
            lambda: self._through(planned, self._old_points(batch)),
            uploads=uploads,
        )

    def beat(self, batch: Batch, heartbeat: Heartbeat) -> None:
        """Send the run's state, once."""
        if "metrics" not in self._signals:
            return
        if self._send("metrics", heartbeat_load(batch, heartbeat, self._ledger).encode()).kind == "accepted":
            self._ledger.beaten(heartbeat)

    def close(self) -> None:
        """Let the connections go, and say what the receiver may not have passed on."""
        if self._old and self._age_s is not None:
            logger.info(
                "%s points of run %s were older than %g h when they were sent: if the receiver passes them on to a"
                " Prometheus, they will not be there; `tracelet export --format openmetrics %s` makes a file for it",
                f"{self._old:,}",
                self._run_id,
                self._age_s / 3600,
                self._run_id,
            )
            self._old = 0
        for signal in tuple(self._senders):
            self._drop(signal)

    def _through(self, planned: Plan, old: int) -> None:
        self._ledger = self._ledger.after(planned)
        self._old += old

    def _old_points(self, batch: Batch) -> int:
        """How many of its points the window of a Prometheus leaves out; who the receiver is, nobody here knows."""
        if self._age_s is None or "metrics" not in self._signals:
            return 0
        oldest = time.time_ns() - round(self._age_s * 1e9)
        columns = [part.points.time_unix_nano for part in batch.parts if len(part.points)]
        # Mostly the ends of a column tell: points stand in the order in which they were logged.
        return sum(sum(at < oldest for at in times) for times in columns if times[0] < oldest or times[-1] < oldest)

    def _send(self, signal: str, body: bytes) -> Reply:
        options = self._options[signal]
        if signal in self._senders and self._headers.get(signal) != fingerprint(options.headers_file):
            self._drop(signal)  # a token renewed in time: not one request is refused
        sender = self._senders.get(signal)
        if sender is None:
            self._files[signal] = fingerprint(*options.files())
            self._headers[signal] = fingerprint(options.headers_file)
            try:
                sender = self._senders[signal] = _sender(options.ready())
            except (RuntimeError, ValueError, OSError) as error:
                # OTel's exporters raise these for a credential provider, number or file in their variables that is
                # not right now, and so does the file with headers; it may be right after somebody has looked.
                return Reply("later", f"OTLP can't be set up: {error}", loud=True)
        reply = sender.send(body)
        if reply.kind == "accepted":
            if signal not in self._passed or len(body) <= _CONTROL_BYTES:
                self._passed[signal] = body
        elif (
            reply.credentials
            or reply.unresolved
            or (reply.kind == "later" and self._files[signal] != fingerprint(*options.files()))
        ):
            # Certificates, headers and credential providers are read, and names asked for, when a sender is made: the
            # next try has new ones.
            self._drop(signal)
        return reply

    def _control(self, signal: str) -> bool:
        """Whether the receiver answers a request that it took before; called a duplicate is an answer too."""
        known = self._passed.get(signal)
        return known is not None and self._send(signal, known).kind in ("accepted", "refused")

    def _drop(self, signal: str) -> None:
        self._senders.pop(signal).close()


def _sender(options: Options) -> Sender:
    # Each transport takes 60 to 100 ms to import: only the one that is used is.
    if options.protocol == "grpc":
        from tracelet.exporters.otlp_grpc import GrpcSender

        return GrpcSender(options)
    from tracelet.exporters.otlp_http import HttpSender

    return HttpSender(options)
