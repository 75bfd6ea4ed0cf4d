"""One OTLP message as its JSON object: the protobuf mapping with hexadecimal ids and numbers for enums."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, TypeVar

__all__ = ["message_dict", "message_of"]

_M = TypeVar("_M")

_IDS = frozenset(("traceId", "spanId", "parentSpanId"))


def message_dict(message: Any) -> dict[str, Any]:
    """A protobuf message of OTLP as its JSON object."""
    from google.protobuf.json_format import MessageToDict

    plain: dict[str, Any] = MessageToDict(message, use_integers_for_enums=True)
    _hexadecimal(plain)
    return plain


def message_of(plain: Mapping[str, Any], message: _M) -> _M:
    """`message` filled with what `message_dict` gave of another one of its kind.

    Raises:
        google.protobuf.json_format.ParseError: it is not of this kind.
    """
    from google.protobuf.json_format import ParseDict, ParseError

    try:
        return ParseDict(_base64(plain), message)  # type: ignore[type-var]
    except (ValueError, AttributeError) as error:
        raise ParseError(str(error)) from error


def _base64(value: Any) -> Any:
    """With the ids as protobuf's own mapping wants them."""
    if isinstance(value, Mapping):
        return {
            key: base64.b64encode(bytes.fromhex(inner)).decode()
            if key in _IDS and isinstance(inner, str)
            else _base64(inner)
            for key, inner in value.items()
        }
    return [_base64(inner) for inner in value] if isinstance(value, list) else value


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
