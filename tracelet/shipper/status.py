"""What a run has come to: its records folded into a state, and how an attempt's end is decided.

The decision is made once, by whichever shipper sees the end first, and written into the manifest; every destination
and every later shipper takes it from there.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tracelet.records import (
    FAILED,
    FINISHED,
    KILLED,
    ErrorInfo,
    MetricNamed,
    ParamsLogged,
    Record,
    Scalar,
    SpanEnded,
    SpanStarted,
    TagsSet,
    WriterEnded,
)

__all__ = ["PROVISIONAL", "Fold", "Verdict", "decide"]

PROVISIONAL = frozenset({"exit", "exit-code"})
"""Ends seen from inside an interpreter that is still on its way out: its exit code has the last word."""

_STOPPED_BY = frozenset({signal.SIGINT, signal.SIGKILL, signal.SIGTERM})


@dataclass
class Fold:
    """The state that the records of an attempt add up to."""

    params: dict[str, Scalar] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    open_spans: dict[str, SpanStarted] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)  # writer -> its metric names, as they came

    def take(self, writer: str, records: Iterable[Record | None], *, whole: bool = True) -> None:
        """Add the records of one writer, in its order; the last value of a param or tag stands.

        Not `whole`: its params and tags alone, since its phases and series end with its own rank.
        """
        for record in records:
            match record:
                case ParamsLogged():
                    self.params.update(record.params)
                case TagsSet():
                    self.tags.update(record.tags)
                case _ if not whole:
                    continue
                case SpanStarted():
                    self.open_spans[record.span_id] = record
                case SpanEnded():
                    self.open_spans.pop(record.span_id, None)
                case MetricNamed():
                    self.names.setdefault(writer, []).append(record.name)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How and when an attempt ended, as the manifest keeps it."""

    status: str
    end_unix_nano: int
    seen_by: str  # of the END record, or "death"
    error: ErrorInfo | None = None
    exit_code: int | None = None
    rank: int | None = None  # whose end it is; None: not known (an older release, or what came over the wire)

    def to_json(self) -> dict[str, Any]:
        """The form in the manifest."""
        error = self.error
        return {
            "status": self.status,
            "end_unix_nano": self.end_unix_nano,
            "seen_by": self.seen_by,
            "error": None
            if error is None
            else {"type": error.type, "message": error.message, "stacktrace": error.stacktrace},
            "exit_code": self.exit_code,
            "rank": self.rank,
        }

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Verdict:
        """The inverse of `to_json`; fields of a newer version are ignored."""
        error = kept.get("error")
        return cls(
            kept["status"],
            kept["end_unix_nano"],
            kept.get("seen_by", "death"),
            None if error is None else ErrorInfo(error["type"], error["message"], error.get("stacktrace", "")),
            kept.get("exit_code"),
            kept.get("rank"),
        )


def decide(ended: WriterEnded | None, *, exit_code: int | None, gone_unix_nano: int) -> Verdict:
    """How an attempt ended, from its first writer's END (None: it died without one) and its process's exit code.

    An END is believed, except one that was written while the interpreter was already leaving: then a non-zero exit
    code (None: nobody told) makes a FINISHED run FAILED, and zero takes back a failure that was only a guess from
    `sys.exit`. A process that was stopped by a signal after such an END is KILLED, like one without an END.
    """
    if ended is None:
        return Verdict(KILLED, gone_unix_nano, "death", exit_code=exit_code)
    status = ended.status or FINISHED
    code = ended.exit_code
    if ended.seen_by in PROVISIONAL and exit_code is not None:
        code = exit_code
        if exit_code == 0 and ended.seen_by == "exit-code":
            status = FINISHED
        elif exit_code != 0 and status == FINISHED:
            status = KILLED if -exit_code in _STOPPED_BY else FAILED
    error = ended.error if status != FINISHED else None
    return Verdict(status, ended.time_unix_nano, ended.seen_by, error, code)
