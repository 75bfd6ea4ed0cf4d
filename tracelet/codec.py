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
        return record(**known)  # type: ignore[no-any-return]
    except (ValueError, TypeError, AttributeError) as error:
        raise SpoolFormatError(
            f"a frame of kind {kind} ({record.__name__}) can't be read: {error}", kind=kind
        ) from error
