"""OTLP over gRPC: OTel's own exporter resolves address, headers, TLS and timeout, and makes the channel.

Our bytes go through its channel as they are (`_channel`, `_headers`, `_timeout`: private, so looked for). Where they
are not found, the message goes through its `export` with the hook `_translate_data` overridden, which then says less
about an answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import grpc
from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.util.re import parse_env_headers

from tracelet.exporters.otlp_http import accepted
from tracelet.exporters.otlp_wire import WIRE_HEADER, Options, Reply, redacted_headers, said, suppressed
from tracelet.exporters.retry_after import granted
from tracelet.guard import logger

__all__ = ["GrpcSender"]

_EXPORTERS: Mapping[str, Any] = {"metrics": OTLPMetricExporter, "traces": OTLPSpanExporter, "logs": OTLPLogExporter}
_REQUESTS: Mapping[str, Any] = {
    "metrics": ExportMetricsServiceRequest,
    "traces": ExportTraceServiceRequest,
    "logs": ExportLogsServiceRequest,
}
_METHODS = {
    "metrics": "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
    "traces": "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
    "logs": "/opentelemetry.proto.collector.logs.v1.LogsService/Export",
}
# gRPC's reconnect back-off grows to 120 s and lives in a pool of the whole process: after an outage of 300 s the
# stock exporter stayed dark for 107 s more. The one of its resolver can't be bounded, see `_UNRESOLVED`.
_CHANNEL_OPTIONS = (
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
)
_LATER = frozenset(
    (
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    )
)
_REFUSED = frozenset(
    (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.ALREADY_EXISTS)
)
_UNTRUSTED = re.compile(r"CERTIFICATE_VERIFY_FAILED|Hostname Verification", re.IGNORECASE)  # gRPC's own words
# A channel asks for a name that was not there after 1 s, 1.6 s ... 120 s, whoever calls it: after two minutes without
# the name one stayed dark for 50 s more. A new channel asks at once.
_UNRESOLVED = re.compile(r"errors resolving|resolution failed|lookup failed", re.IGNORECASE)  # gRPC's own words
_COMPRESSIONS = {"gzip": grpc.Compression.Gzip, "none": grpc.Compression.NoCompression}


class GrpcSender:
    """Sends requests of one signal over gRPC."""

    def __init__(self, options: Options) -> None:
        self._signal = options.signal
        self._sieve = options.sieve()
        kind = _EXPORTERS[options.signal]
        self._hooked = type(f"Encoded{kind.__name__}", (kind,), {"_translate_data": _as_is, "_count_data": _one})
        with redacted_headers():
            self._exporter = self._hooked(
                endpoint=options.endpoint,
                headers=_headers(options),
                timeout=options.timeout_s,
                compression=_compression(options),
                channel_options=_CHANNEL_OPTIONS,
            )
        endpoint = options.endpoint or options.variable("ENDPOINT") or ""
        # `collector:4317` means TLS to OTel's exporter, which surprises; the message says so when it fails.
        plain = not urlsplit(endpoint).netloc and endpoint != "" and options.variable("INSECURE") is None
        self._hint = f" ({endpoint} has no scheme, so TLS is used: write http://{endpoint} for none)" if plain else ""
        self._call = self._raw_call()

    def _raw_call(self) -> Any:
        channel = getattr(self._exporter, "_channel", None)
        if not isinstance(channel, grpc.Channel) or not hasattr(self._exporter, "_headers"):
            return None
        return channel.unary_unary(_METHODS[self._signal])

    def send(self, body: bytes) -> Reply:
        """Send one encoded request, once."""
        with suppressed():
            if self._call is None:
                return self._through_hooks(body)
            try:
                content = self._call(
                    body,
                    metadata=(*(self._exporter._headers or ()), WIRE_HEADER),
                    timeout=getattr(self._exporter, "_timeout", 10.0),
                )
            except grpc.RpcError as error:
                return self._read(error)
        return accepted(self._signal, content, "application/x-protobuf", self._clean, "the OTLP receiver")

    def close(self) -> None:
        """Let the channel go."""
        self._exporter.shutdown()

    def _clean(self, text: str) -> str:
        return said(text, self._sieve)

    def _through_hooks(self, body: bytes) -> Reply:
        result = self._exporter.export(_REQUESTS[self._signal].FromString(body))
        if result.name == "SUCCESS":
            return Reply("accepted")
        return Reply("later", "the OTLP receiver did not take a request (the SDK's own log has the reason)")

    def _read(self, error: Any) -> Reply:
        code: grpc.StatusCode = error.code()
        details = error.details() or ""
        words = self._clean(f"gRPC {code.name}: {details}")
        if code is grpc.StatusCode.INTERNAL and details == "Invalid metadata":  # gRPC's own word, nothing was sent
            return Reply("later", "a header's name or value isn't legal in gRPC (a line break in a token?)", loud=True)
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
            return Reply("too_large", words)
        if code in _LATER and _UNTRUSTED.search(details):
            # gRPC calls this unavailable like any outage, but no waiting mends it.
            hint = "the receiver's certificate doesn't hold: check it, and OTEL_EXPORTER_OTLP_CERTIFICATE"
            return Reply("later", f"{words}; {hint}", loud=True)
        if code in _LATER:
            unresolved = code is grpc.StatusCode.UNAVAILABLE and _UNRESOLVED.search(details) is not None
            return Reply("later", words + self._hint, after_s=_retry_delay(error), unresolved=unresolved)
        if code in _REFUSED:
            return Reply("refused", words)
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            hint = "check the headers (OTEL_EXPORTER_OTLP_HEADERS)"
            return Reply("later", f"{words}; {hint}", loud=True, credentials=True)
        if code in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.NOT_FOUND):
            hint = f"is the address right, and does the receiver take {self._signal}?"
            return Reply("later", f"{words}; {hint}", loud=True, elsewhere=True)
        return Reply("fault", words)


def _as_is(_self: Any, data: Any) -> Any:
    return data


def _one(_self: Any, _data: Any) -> int:
    return 1


def _headers(options: Options) -> tuple[tuple[str, str], ...] | None:
    """Headers given as arguments, over those of the variables, as OTel's HTTP exporter (not its gRPC one) merges."""
    if not options.headers:
        return None
    named = parse_env_headers(options.variable("HEADERS") or "", liberal=True)
    return tuple({**named, **options.headers}.items())


def _compression(options: Options) -> grpc.Compression | None:
    """What to hand to OTel's exporter, which takes gzip from its variables and raises on anything else, even none."""
    wanted = (options.compression or options.variable("COMPRESSION") or "").lower()
    if wanted in _COMPRESSIONS:
        return _COMPRESSIONS[wanted]
    if wanted:
        logger.warning("OTLP over gRPC can't compress with %r: sending uncompressed", wanted)
    return grpc.Compression.NoCompression


def _retry_delay(error: Any) -> float | None:
    """The server's RetryInfo, from either of the two trailers it is found in; None of one that can't be read."""
    from google.protobuf.message import DecodeError
    from google.rpc.error_details_pb2 import RetryInfo
    from google.rpc.status_pb2 import Status

    trailers = {item[0]: item[1] for item in error.trailing_metadata() or ()}
    found = RetryInfo()
    try:
        if "google.rpc.retryinfo-bin" in trailers:
            found.ParseFromString(trailers["google.rpc.retryinfo-bin"])
        else:
            status = Status.FromString(trailers.get("grpc-status-details-bin", b""))
            if not any(detail.Unpack(found) for detail in status.details if detail.Is(RetryInfo.DESCRIPTOR)):
                return None
    except DecodeError:
        return None
    return granted(found.retry_delay.seconds + found.retry_delay.nanos / 1e9)
