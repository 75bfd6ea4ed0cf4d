"""What travels from training code to a destination: the frozen records, and points as columns.

Everything logged but metric values is one of these records; each is one frame in the spool (`codec` writes and reads
them). Metric values are `PointBatch`es, columns over buffers. No I/O, no clock, no environment here.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "Again",
    "AttemptEnded",
    "ArtifactLogged",
    "Batch",
    "ErrorInfo",
    "FlushAsked",
    "Heartbeat",
    "MetricNamed",
    "ParamsLogged",
    "Part",
    "PointBatch",
    "RankEnded",
    "Record",
    "RunInfo",
    "RunStarted",
    "Scalar",
    "SpanEnded",
    "SpanStarted",
    "SpansReceived",
    "StateNoted",
    "TagsSet",
    "WriterEnded",
    "WriterOpened",
]

Scalar = str | int | float | bool

FINISHED, FAILED, KILLED, RUNNING, LOST = "FINISHED", "FAILED", "KILLED", "RUNNING", "LOST"


# ---- frames: each of these is one frame of a writer -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WriterOpened:
    """The first frame of every writer: who writes, and the Resource all its records belong to."""

    time_unix_nano: int
    role: str  # "first" (its END or death decides status and end), "child" (fork, spawn), "overflow"
    pid: int
    rank: int
    attempt_key: str
    attempt_started_unix_nano: int
    resource: Mapping[str, Scalar]  # exactly the attributes of the wire contract


@dataclass(frozen=True, slots=True)
class RunStarted:
    """What is known of a run at its start, written once an attempt by its first writer of rank 0."""

    time_unix_nano: int
    run_name: str
    environment: Mapping[str, Scalar]  # git, packages, argv, python: attributes of the `run.started` event
    mlflow_tags: Mapping[str, str]  # the tags MLflow's own client would have set (user, source, git commit)
    traceparent: str | None = None  # an incoming W3C traceparent: becomes a link of the root span


@dataclass(frozen=True, slots=True)
class MetricNamed:
    """Metric id `metric_id` of this writer means `name`; written before the id is first used."""

    metric_id: int
    name: str


@dataclass(frozen=True, slots=True)
class ParamsLogged:
    """Params, flattened to dotted keys; a value is a scalar, or JSON text for anything else."""

    time_unix_nano: int
    params: Mapping[str, Scalar]


@dataclass(frozen=True, slots=True)
class TagsSet:
    """Tags of the run; the last value of a key stands."""

    time_unix_nano: int
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """An exception, as OpenTelemetry's `exception.*` attributes have it."""

    type: str
    message: str
    stacktrace: str


@dataclass(frozen=True, slots=True)
class SpanStarted:
    """A phase began; written so that a killed run still shows the phase it died in."""

    span_id: str
    parent_span_id: str
    name: str
    start_unix_nano: int
    attributes: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SpanEnded:
    """A phase ended, well (`error` is None) or by an exception."""

    span_id: str
    end_unix_nano: int
    error: ErrorInfo | None = None


@dataclass(frozen=True, slots=True)
class ArtifactLogged:
    """A file of the run: where it shall be named `path` in the run's artifacts, and where its bytes are now.

    `stored` is a path relative to the spool folder (our copy), or None for a reference to `source`. `uri` is for what
    came over the wire: where the sender says that the bytes are; `source` is then empty.
    """

    time_unix_nano: int
    path: str
    source: str  # absolute path at the time of the call
    stored: str | None
    size: int
    sha256: str | None  # hexadecimal; None for a reference, whose digest is taken at upload
    media_type: str
    mtime_ns: int | None = None  # of a reference, compared before and after the upload
    inode: int | None = None
    uri: str | None = None


@dataclass(frozen=True, slots=True)
class SpansReceived:
    """Spans that came over the wire and go on as they are: OTLP `ResourceSpans`, one Resource, in base64."""

    time_unix_nano: int
    resource_spans: str


@dataclass(frozen=True, slots=True)
class StateNoted:
    """What a gateway or another host's shipper knows of a run it can't see: LOST after a long silence, RUNNING
    once it speaks again. No end."""

    time_unix_nano: int
    state: str


@dataclass(frozen=True, slots=True)
class FlushAsked:
    """Somebody waits: what stands before this leaves at once instead of waiting for a full batch."""

    time_unix_nano: int


@dataclass(frozen=True, slots=True)
class WriterEnded:
    """The END of a writer: its last slot. Only a writer of role "first" carries a status."""

    time_unix_nano: int
    status: str | None  # FINISHED, FAILED, KILLED; None for other roles
    seen_by: str  # "stop", "with", "exit", "exit-code", "signal"
    error: ErrorInfo | None = None
    exit_code: int | None = None


# ---- made by the shipper, never in the spool --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """An attempt is over at this destination: everything before it has been delivered."""

    status: str
    start_unix_nano: int
    end_unix_nano: int
    newest: bool  # only the newest attempt of a run may set the run's status
    error: ErrorInfo | None
    params: Mapping[str, Scalar]  # last value of each key
    tags: Mapping[str, str]
    open_spans: tuple[SpanStarted, ...]  # phases that never ended
    series: Mapping[str, tuple[tuple[str, int], ...]]  # writer id -> its metric names, each with its last stamp (ns)
    speaks: bool = True  # its end may be the run's; not that of a host's lowest rank where rank 0 is on another host


@dataclass(frozen=True, slots=True)
class RankEnded:
    """One more rank of an attempt is over at this destination: the end of its span, not the run's."""

    status: str
    start_unix_nano: int
    end_unix_nano: int
    error: ErrorInfo | None
    open_spans: tuple[SpanStarted, ...]  # its phases that never ended
    series: Mapping[str, tuple[tuple[str, int], ...]]  # as an attempt's, of its own writers


@dataclass(frozen=True, slots=True)
class Again:
    """One thing that its destination refused, in the form in which it was refused: it goes out once more as it is.

    For what can't be made of a record again: an OTLP message (`facts` have `signal`, `scope` and `message`, its JSON
    object), or for MLflow a text that had to be a file (`path`, `text`).
    """

    what: str
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The run's state now, sent again every 30 s; never journaled, a missed one is not repeated."""

    time_unix_nano: int
    state: str
    last_iteration_unix_nano: int | None
    backend_ids: Mapping[str, str]  # destination id -> the run's id there, when known
    run_started_unix_nano: int | None = None  # its first attempt that is known on this host; None: this attempt


# ---- points -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PointBatch:
    """Points of one writer in slot order, as four columns of equal length, each a C array of 8 (ids: 4) bytes.

    `dense` holds the indices of points that Prometheus can't take (see the wire contract). `stamped` times are
    strictly rising milliseconds for each name; the raw ones are as the clock gave them.
    """

    names: Mapping[int, str]
    time_unix_nano: array[int]  # typecode "Q"
    values: array[float]  # typecode "d"
    iterations: array[int]  # typecode "q"
    metric_ids: array[int]  # typecode "I"
    dense: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.values)

    @classmethod
    def from_records(cls, records: bytes | memoryview, names: Mapping[int, str]) -> PointBatch:
        """Columns of `records`, a whole number of 32-byte point records (time, value, iteration, id, marker)."""
        view = memoryview(records).cast("B")
        times, values, iterations, ids = array("Q"), array("d"), array("q"), array("I")
        # A strided slice of a cast view copies a column at C speed, without numpy.
        times.frombytes(view.cast("Q")[0::4].tobytes())
        values.frombytes(view.cast("d")[1::4].tobytes())
        iterations.frombytes(view.cast("q")[2::4].tobytes())
        ids.frombytes(view.cast("I")[6::8].tobytes())
        return cls(names, times, values, iterations, ids)

    def slice(self, start: int, end: int) -> PointBatch:
        """The points [start, end), for a request that had to be split."""
        return PointBatch(
            self.names,
            self.time_unix_nano[start:end],
            self.values[start:end],
            self.iterations[start:end],
            self.metric_ids[start:end],
            frozenset(i - start for i in self.dense if start <= i < end),
        )


# ---- what an exporter is handed ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunInfo:
    """The facts of a run that every destination needs before anything else."""

    run_id: str
    project: str
    experiment_name: str
    run_name: str


@dataclass(frozen=True, slots=True)
class Part:
    """What one writer contributes to a batch: its frames' records in slot order, and its points."""

    writer_id: str
    opened: WriterOpened
    records: tuple[Record, ...]
    points: PointBatch


@dataclass(frozen=True, slots=True)
class Batch:
    """What leaves for one destination at once; the same number always has the same content, bit for bit."""

    number: int
    run: RunInfo
    folder: str  # the spool folder, for artifacts' bytes
    parts: tuple[Part, ...]
    again: bool = False  # of what was refused before, by a person's wish: it has been counted, and is not left out


Record = (
    WriterOpened
    | RunStarted
    | MetricNamed
    | ParamsLogged
    | TagsSet
    | SpanStarted
    | SpanEnded
    | ArtifactLogged
    | SpansReceived
    | StateNoted
    | FlushAsked
    | WriterEnded
    | AttemptEnded
    | RankEnded
    | Again
)
