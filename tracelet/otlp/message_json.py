"""One OTLP message as its JSON object: the protobuf mapping with hexadecimal ids and numbers for enums."""

from __future__ import annotations

import base64
from typing import Any

__all__ = ["message_dict"]

_IDS = frozenset(("traceId", "spanId", "parentSpanId"))


def message_dict(message: Any) -> dict[str, Any]:
    """A protobuf message of OTLP as its JSON object."""
    from google.protobuf.json_format import MessageToDict

    plain: dict[str, Any] = MessageToDict(message, use_integers_for_enums=True)
    _hexadecimal(plain)
    return plain


def _hexadecimal(value: Any) -> None:
    # Protobuf's own mapping writes bytes as base64; OTLP wants the ids in hexadecimal.
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in _IDS and isinstance(inner, str):
                value[key] = base64.b64decode(inner).hex()
            else:
                _hexadecimal(inner)
    elif isinstance(value, list):
        for inner in value:
            _hexadecimal(inner)
