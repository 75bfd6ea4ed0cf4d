"""The body of an OTLP request to its message: protobuf, or JSON with OTLP's own rules."""

from __future__ import annotations

import base64
import json
from typing import Any

from tracelet.errors import Malformed

__all__ = ["Malformed", "is_json", "message_of", "parse"]

_IDS = frozenset(("traceId", "spanId", "parentSpanId", "trace_id", "span_id", "parent_span_id"))
_JSON = "application/json"
_PROTOBUF = ("application/x-protobuf", "application/protobuf")


def parse(signal: str, body: bytes, content_type: str) -> Any:
    """The Export...ServiceRequest in `body`, of `signal` "metrics", "logs" or "traces".

    JSON is OTLP's: trace and span ids in hexadecimal, enums as numbers, unknown fields left out
    (https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding).

    Raises:
        Malformed: not such a message; the text says where, as far as the parser does.
        ValueError: another signal or content type, which no body makes right.

    Examples:
        >>> from tracelet.otlp.decode import parse
        >>> len(parse("logs", b'{"resourceLogs": []}', "application/json; charset=utf-8").resource_logs)
        0
    """
    message = message_of(signal)
    if is_json(content_type):
        return _from_json(signal, message, body)
    if _kind(content_type) not in _PROTOBUF:
        raise ValueError(f"content type {content_type!r} is none of OTLP's: {_PROTOBUF[0]}, {_JSON}")
    from google.protobuf.message import DecodeError

    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise Malformed(f"not an OTLP {signal} request in protobuf: {_first_line(error)}", signal=signal) from error
    return message


def _kind(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def is_json(content_type: str) -> bool:
    """Whether a body of this content type is JSON."""
    return _kind(content_type) == _JSON


def message_of(signal: str) -> Any:
    """An empty Export...ServiceRequest of `signal`.

    Raises:
        ValueError: there is no such signal.
    """
    if signal == "metrics":
        from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

        return ExportMetricsServiceRequest()
    if signal == "logs":
        from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

        return ExportLogsServiceRequest()
    if signal == "traces":
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        return ExportTraceServiceRequest()
    raise ValueError(f"no signal {signal!r}")


def _from_json(signal: str, message: Any, body: bytes) -> Any:
    from google.protobuf.json_format import ParseDict

    try:
        plain = json.loads(body, object_hook=_with_base64_ids)
        if not isinstance(plain, dict):
            raise ValueError("no JSON object")
        ParseDict(plain, message, ignore_unknown_fields=True)
    except Exception as error:
        # Not ParseError alone: of odd types protobuf's reader raises whatever Python does at them (an infinite
        # integer is an OverflowError). Nothing but the body can be at fault here.
        raise Malformed(f"not an OTLP {signal} request in JSON: {_first_line(error)}", signal=signal) from error
    return message


def _with_base64_ids(values: dict[str, Any]) -> dict[str, Any]:
    # OTLP has the ids in hexadecimal where protobuf's own mapping reads base64. In place, while it is read: a second
    # copy of a large body would be the larger half of what it takes.
    for key in _IDS & values.keys():
        if isinstance(values[key], str):
            values[key] = base64.b64encode(bytes.fromhex(values[key])).decode()
    return values


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
