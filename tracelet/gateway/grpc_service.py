"""OTLP over gRPC: the three Export services, in the event loop of the HTTP server.

Each `Export` is handled as a stream of one message, which is the same on the wire: so credentials are looked at before
the message is read, and reading has a time limit. gRPC's own decompression is off, since it knows no limit for what a
small message inflates to: the compressed bytes arrive here, and a protobuf message can't begin with gzip's or zlib's
first byte (0x1f is no field's tag; 0x78 is the tag of field 15, and a request has none).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from grpc import aio

from tracelet.gateway.app import GRPC_CODES, PROTOBUF
from tracelet.gateway.limits import BUSY_AGAIN_S, Encoding, Refused
from tracelet.gateway.places import Crowded, Places
from tracelet.gateway.reception import Reception, Sent, Signal
from tracelet.guard import guard

__all__ = ["GrpcDoor"]

_SERVICES: Mapping[str, Signal] = {
    "opentelemetry.proto.collector.metrics.v1.MetricsService": "metrics",
    "opentelemetry.proto.collector.logs.v1.LogsService": "logs",
    "opentelemetry.proto.collector.trace.v1.TraceService": "traces",
}
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_STREAMS = 100  # of one connection at once; a client keeps further calls to itself until then
_GRPC_FRAME = 64 * 1024  # what gRPC counts of a message beside its body, and some air


class GrpcDoor:
    """The gRPC server over `reception`; it has no port yet. To be made in the event loop that will serve it."""

    def __init__(self, reception: Reception, pool: ThreadPoolExecutor) -> None:
        """Blocking work runs in `pool`."""
        limits = reception.limits
        longest = max(limits.max_body, limits.max_compressed) + _GRPC_FRAME
        self.server = aio.server(
            options=[
                ("grpc.max_receive_message_length", longest),
                ("grpc.max_concurrent_streams", _STREAMS),
                ("grpc.per_message_decompression", 0),
                ("grpc.so_reuseport", 0),  # two gateways on one port are a mistake, not a load balancer
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # a collector's keepalive is no attack
            ]
        )
        self._service = _Service(reception, pool)
        for name, signal in _SERVICES.items():
            method = grpc.stream_unary_rpc_method_handler(self._service.export(signal))
            self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"Export": method}),))

    async def close(self, grace_s: float) -> None:
        """Finish what is being taken, within `grace_s`; calls that still have to send their message are told to go."""
        self._service.places.close()
        await self.server.stop(grace_s)


class _Service:
    def __init__(self, reception: Reception, pool: ThreadPoolExecutor) -> None:
        self._reception = reception
        self._pool = pool
        limits = reception.limits
        # A message is whole in memory before it is seen: so only as many are received at once as there is room for.
        self.places = Places(
            max(4, limits.max_in_flight // max(limits.max_body, 1)),
            crowded_s=limits.crowded_s,
            max_waiting=limits.max_requests,
        )

    def export(self, signal: Signal) -> Callable[..., Any]:
        """The method `Export` of one service."""

        async def endpoint(_: object, context: Any) -> bytes:
            started = time.monotonic()
            metadata = {
                str(name).lower(): value if isinstance(value, str) else value.decode("latin-1")
                for name, value in context.invocation_metadata() or ()
            }
            metrics = self._reception.metrics
            try:
                await self._receive(signal, metadata, context)
            except Refused as error:
                refused = self._reception.toward(error, metadata)
            except asyncio.CancelledError:  # its deadline is over, or it has hung up
                metrics.refused("client left")
                raise
            except Exception as error:  # noqa: BLE001 - a fault of ours: INTERNAL would make a collector drop its data
                metrics.refused("fault")
                guard.note(f"take a request of {signal}", error)
                refused = Refused(
                    503, "fault", "the gateway met a fault; its log says more", retry_after_s=BUSY_AGAIN_S
                )
            else:
                metrics.answered(signal, "grpc", "OK", time.monotonic() - started)
                return b""  # an empty Export*ServiceResponse: full success
            code = _CODES[GRPC_CODES[refused.http]]
            metrics.answered(signal, "grpc", code.name, time.monotonic() - started)
            await context.abort(code, refused.message, (("grpc-status-details-bin", _details(refused)),))
            raise AssertionError("abort raises")

        return endpoint

    async def _receive(self, signal: Signal, metadata: Mapping[str, str], context: Any) -> None:
        with self._reception.request(metadata) as taking:
            message = await self._message(context)
            taking.held.add(len(message))
            await taking.taken(Sent(signal, message, _encoding(message), PROTOBUF), self._pool)

    async def _message(self, context: Any) -> bytes:
        limits = self._reception.limits
        try:
            async with asyncio.timeout(limits.body_timeout_s), self.places.one():
                message = await context.read()
        except Crowded as error:
            if self._reception.stopping.is_set():
                raise self._reception.is_stopping() from None
            raise Refused(503, "busy", f"this call makes way: {error}", retry_after_s=BUSY_AGAIN_S) from None
        except TimeoutError:
            # Retryable by the OTLP specification, as is UNAVAILABLE.
            raise Refused(408, "slow", "the message did not arrive in time", retry_after_s=BUSY_AGAIN_S) from None
        if message is aio.EOF:
            raise Refused(400, "malformed", "the call ended without a message")
        return bytes(message)


def _encoding(message: bytes) -> Encoding:
    if message.startswith(b"\x1f\x8b"):
        return "gzip"
    if message[:1] == b"\x78" and len(message) > 1 and int.from_bytes(message[:2], "big") % 31 == 0:
        return "deflate"
    return "identity"


def _details(refused: Refused) -> bytes:
    status = Status(code=GRPC_CODES[refused.http], message=refused.message)
    if refused.retry_after_s is not None:
        info = RetryInfo()
        info.retry_delay.FromTimedelta(_timedelta(refused.retry_after_s))
        status.details.add().Pack(info)
    content: bytes = status.SerializeToString()
    return content


def _timedelta(seconds: float) -> Any:
    from datetime import timedelta

    return timedelta(seconds=seconds)
