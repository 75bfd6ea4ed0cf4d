"""Public fakes for tests of the gateway's door: an intake that remembers, and a client without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from tracelet.gateway.app import build_app
from tracelet.gateway.aside import Aside
from tracelet.gateway.auth import Auth
from tracelet.gateway.callers import Caller, IntakeInfo, Taken
from tracelet.gateway.limits import Limits
from tracelet.gateway.metrics import GatewayMetrics
from tracelet.gateway.reception import DECODERS, Reception
from tracelet.otlp.decode import Decoded


@dataclass
class RememberingIntake:
    """Takes everything and remembers it; `rule` may raise instead."""

    taken: list[tuple[Decoded, Caller]] = field(default_factory=list)
    rule: Callable[[Decoded, Caller], None] = field(default=lambda decoded, caller: None)
    info: IntakeInfo = field(default_factory=IntakeInfo)

    def take(self, decoded: Decoded, caller: Caller) -> Taken:
        self.rule(decoded, caller)
        self.taken.append((decoded, caller))
        return Taken(items=sum(arrival.items for arrival in decoded.arrivals))

    def run_info(self) -> IntakeInfo:
        return self.info


@dataclass
class Answer:
    """What a client got."""

    status: int
    headers: dict[str, str]
    body: bytes


class Doorway:
    """The application over a `RememberingIntake`, and a client of it in this process."""

    def __init__(
        self,
        folder: Path,
        *,
        tokens: str | None = None,
        limits: Limits | None = None,
        aside_bytes: int = 1_000_000,
        decoders: Mapping[str, Callable[[Any], Decoded]] = DECODERS,
    ) -> None:
        self.folder = folder
        self.intake = RememberingIntake()
        path = None
        if tokens is not None:
            path = folder / "tokens.toml"
            path.write_text(tokens)
        self.aside = folder / "unknown"
        self.metrics = GatewayMetrics()
        self.reception = Reception(
            self.intake, Auth(path), limits or Limits(), self.metrics, Aside(self.aside, aside_bytes), decoders=decoders
        )
        self.metrics.watch(
            self.intake.run_info, in_flight=lambda: self.reception.budget.in_flight, tokens_bad=lambda: False
        )
        self._pool = ThreadPoolExecutor(2)
        self.app = build_app(self.reception, self._pool, runs=folder)

    def close(self) -> None:
        self._pool.shutdown()

    def post(
        self, signal: str, body: bytes | Sequence[bytes], headers: Mapping[str, str] | None = None, **more: Any
    ) -> Answer:
        """POST to /v1/<signal>, as protobuf unless `headers` say otherwise; a sequence comes piece by piece."""
        given = {"content-type": "application/x-protobuf", **(headers or {})}
        return self.ask("POST", f"/v1/{signal}", given, [body] if isinstance(body, bytes) else body, **more)

    def get(self, path: str) -> Answer:
        return self.ask("GET", path, {}, [])

    def number(self, name: str) -> float:
        """The value of one series at /metrics, 0 where there is none."""
        for line in self.get("/metrics").body.decode().splitlines():
            if line.startswith(f"tracelet_gateway_{name} "):
                return float(line.rpartition(" ")[2])
        return 0.0

    def ask(
        self, method: str, path: str, headers: Mapping[str, str], body: Sequence[bytes], *, stalls: bool = False
    ) -> Answer:
        """One request; with `stalls` its body never ends."""
        return asyncio.run(self.answered(method, path, headers, list(body), stalls))

    async def answered(
        self, method: str, path: str, headers: Mapping[str, str], pieces: list[bytes], stalls: bool = False
    ) -> Answer:
        """The same, for a test that has a loop of its own."""
        said: list[Any] = []

        async def receive() -> dict[str, Any]:
            if not pieces and stalls:
                await asyncio.Event().wait()
            piece = pieces.pop(0) if pieces else b""
            return {"type": "http.request", "body": piece, "more_body": bool(pieces) or stalls}

        async def send(message: Any) -> None:
            said.append(message)

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()],
            "http_version": "1.1",
            "scheme": "http",
            "server": ("127.0.0.1", 4318),
            "client": ("127.0.0.1", 1),
        }
        await self.app(scope, receive, send)  # type: ignore[arg-type]
        start = said[0]
        return Answer(
            start["status"],
            {name.decode().lower(): value.decode() for name, value in start["headers"]},
            b"".join(message.get("body", b"") for message in said[1:]),
        )


def points_request(run_id: str = "run-1", *, wire: str = "1.0", count: int = 3) -> ExportMetricsServiceRequest:
    """A request with `count` values of one metric of a run, as tracelet sends it."""
    request = ExportMetricsServiceRequest()
    resource = request.resource_metrics.add()
    attributes = {
        "service.name": "p",
        "service.instance.id": "00000000-0000-0000-0000-000000000001",
        "tracelet.project": "p",
        "tracelet.experiment.name": "e",
        "tracelet.run.id": run_id,
        "tracelet.run.name": "e",
        "tracelet.run.attempt": "a" * 16,
        "tracelet.wire.version": wire,
        "host.name": "h",
    }
    for key, text in attributes.items():
        resource.resource.attributes.add(key=key).value.string_value = text
    resource.resource.attributes.add(key="tracelet.rank").value.int_value = 0
    scope = resource.scope_metrics.add()
    scope.scope.name = "tracelet"
    metric = scope.metrics.add(name="loss")
    for step in range(count):
        point = metric.gauge.data_points.add(time_unix_nano=1_800_000_000_000_000_000 + step * 10**6, as_double=step)
        point.attributes.add(key="tracelet.iteration").value.int_value = step
    return request


def service_request(count: int = 2) -> ExportMetricsServiceRequest:
    """Ordinary telemetry of a service that is no run."""
    request = ExportMetricsServiceRequest()
    resource = request.resource_metrics.add()
    resource.resource.attributes.add(key="service.name").value.string_value = "shop"
    scope = resource.scope_metrics.add()
    for number in range(count):
        metric = scope.metrics.add(name=f"requests.{number}")
        metric.sum.data_points.add(time_unix_nano=1, as_int=1)
    return request
