"""Records to frame payloads and back: one byte of kind beside UTF-8 JSON, readable without this code.

JSON because these records are few and outlive versions; NaN and infinities are written as the three tokens Python's
json uses (NaN, Infinity, -Infinity). Unknown keys are ignored on reading, so a newer minor version can be read.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from tracelet.errors import SpoolFormatError
from tracelet.records import (
    ArtifactLogged,
    ErrorInfo,
    FlushAsked,
    MetricNamed,
    ParamsLogged,
    Record,
    RunStarted,
    SpanEnded,
    SpansReceived,
    SpanStarted,
    StateNoted,
    TagsSet,
    WriterEnded,
    WriterOpened,
)

__all__ = ["KINDS", "decode", "encode", "kind_of"]

# The numbers are in files and never change their meaning; docs/reference/spool-format.md lists them.
KINDS: Mapping[int, type[Any]] = {
    1: WriterOpened,
    2: RunStarted,
    3: MetricNamed,
    4: ParamsLogged,
    5: TagsSet,
    6: SpanStarted,
    7: SpanEnded,
    8: ArtifactLogged,
    9: FlushAsked,
    10: WriterEnded,
    11: SpansReceived,
    12: StateNoted,
}
_NUMBERS = {kind: number for number, kind in KINDS.items()}
_FIELDS = {kind: frozenset(f.name for f in dataclasses.fields(kind)) for kind in KINDS.values()}
_TYPES: Mapping[str, tuple[type, ...]] = {  # of the fields of the records above, as they are annotated
    "int": (int,),
    "int | None": (int, type(None)),
    "str": (str,),
    "str | None": (str, type(None)),
    "ErrorInfo | None": (ErrorInfo, type(None)),
    "Mapping[str, Scalar]": (dict,),
    "Mapping[str, str]": (dict,),
}
_TIMES = range(2**64)  # what OTLP has room for; the exporters' messages raise on any other
_VALUES: Mapping[str, tuple[type, ...]] = {
    "Mapping[str, Scalar]": (str, int, float, type(None)),
    "Mapping[str, str]": (str,),
}


def kind_of(kind: type[Any]) -> int:
    """The frame kind (a byte) of a record's type."""
    return _NUMBERS[kind]


def encode(record: Record) -> tuple[int, bytes]:
    """Kind and payload of the frame that holds `record`."""
    fields: dict[str, Any] = {name: getattr(record, name) for name in _FIELDS[type(record)]}
    error = fields.get("error")
    if error is not None:
        fields["error"] = {"type": error.type, "message": error.message, "stacktrace": error.stacktrace}
    # surrogatepass: a name taken from a file name or argv may hold lone surrogates; ASCII escapes carry them.
    text = json.dumps(fields, ensure_ascii=True, separators=(",", ":"), sort_keys=True, default=dict)
    return _NUMBERS[type(record)], text.encode("ascii")


def decode(kind: int, payload: bytes) -> Record | None:
    """The record of a frame, or None for a kind that a newer version added.

    Raises:
        SpoolFormatError: the payload is not what this kind holds.
    """
    record = KINDS.get(kind)
    if record is None:
        return None
    try:
        fields = json.loads(payload)
        known = {name: value for name, value in fields.items() if name in _FIELDS[record]}
        if known.get("error") is not None:
            known["error"] = ErrorInfo(**known["error"])
        made = record(**known)
        _check(made)
        return made  # type: ignore[no-any-return]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SpoolFormatError(
            f"a frame of kind {kind} ({record.__name__}) can't be read: {error}", kind=kind
        ) from error


def _check(record: Any) -> None:
    """Whose checksum is right was written as it stands, but not for certain by us: who ships relies on the types."""
    for field in dataclasses.fields(record):
        value: Any = getattr(record, field.name)
        types: Any = _TYPES[str(field.type)]
        if not isinstance(value, types):
            raise TypeError(f"{field.name} is a {type(value).__name__}")
        if field.name.endswith("_unix_nano") and value is not None and value not in _TIMES:
            raise ValueError(f"{field.name} is {value}, which is no time in nanoseconds")
        wanted = _VALUES.get(str(field.type))
        if wanted is not None:
            for one in value.values():
                if not isinstance(one, wanted):
                    raise TypeError(f"{field.name} holds a {type(one).__name__}")
    error = getattr(record, "error", None)
    if error is not None and not all(isinstance(one, str) for one in (error.type, error.message, error.stacktrace)):
        raise TypeError("error holds something other than text")
