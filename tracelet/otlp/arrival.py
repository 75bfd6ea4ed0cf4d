"""What an OTLP request says of runs, once it is decoded: frozen values, no protobuf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tracelet.records import ErrorInfo, PointBatch, Record, RunInfo, Scalar

__all__ = ["Arrival", "AttemptEnd", "Decoded", "Piece"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a value too long for an attribute, whose other parts are in other requests.

    The whole has `count` pieces, `index` from 1; `digest` is the whole's sha256 in hexadecimal.
    """

    event: str  # the event's name
    key: str  # the attribute the whole is the value of
    index: int
    count: int
    digest: str
    text: str
    time_unix_nano: int
    span_id: str


@dataclass(frozen=True, slots=True)
class AttemptEnd:
    """How an attempt ended, and who says so.

    `told_by`: "event" (exact, the error with it), "span" (exact), or "status" (the gauge: a time shortly after, and no
    error).
    """

    status: str  # FINISHED, FAILED or KILLED
    end_unix_nano: int
    error: ErrorInfo | None
    told_by: str


@dataclass(frozen=True, slots=True)
class Arrival:
    """What one Resource of a request says of one rank of a run."""

    run: RunInfo
    attempt_key: str
    rank: int
    instance_id: str
    resource: Mapping[str, Scalar]  # all attributes, those that collectors added included
    points: PointBatch | None  # the user's values; the ends of series are left out
    records: tuple[Record, ...]  # RunStarted, ParamsLogged, TagsSet, ArtifactLogged, SpansReceived
    pieces: tuple[Piece, ...]
    started_unix_nano: int | None  # when the attempt started, where this request says so
    first_unix_nano: int  # the earliest time in it; 0 where it has none
    ended: AttemptEnd | None
    items: int  # data points, log records or spans it stands for
    lost: bool = False  # its sender has heard nothing of the run for long: no sign of life


@dataclass(slots=True)
class Decoded:
    """What one request says: of runs, and how many of its items are not a run's.

    `foreign`: items of Resources that are no run's, of other scopes beside ours, and of ours that the contract has no
    place for; `reasons` says how many for which. `unknown`: items by the wire version that this release can't read.
    """

    arrivals: tuple[Arrival, ...] = ()
    foreign: int = 0
    unknown: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, int] = field(default_factory=dict)
