"""A batch in MLflow's terms: metric rows with the witness that proves their arrival, params, tags, whole texts.

Pure: the same batch and the same memory of the run always give the same plan. Nothing is sent from here.
"""

from __future__ import annotations

import hashlib
import math
import os.path
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tracelet.exporters.artifact_names import event_mark
from tracelet.exporters.base import Refusal
from tracelet.exporters.mlflow.limits import (
    KEY_CHARS,
    METRICS_PER_REQUEST,
    PARAM_VALUE_CHARS,
    POINTS_PER_BATCH,
    REQUEST_BYTES,
    RUN_NAME_CHARS,
    SQL_INFINITY,
    TAG_VALUE_CHARS,
)
from tracelet.exporters.mlflow.names import capped, encodable, file_name, legal_name, legal_path, shorten, text_of
from tracelet.exporters.mlflow.transport import Latest, MetricRow
from tracelet.otlp import semconv
from tracelet.records import (
    ArtifactLogged,
    AttemptEnded,
    Batch,
    ErrorInfo,
    ParamsLogged,
    RunStarted,
    Scalar,
    SpansReceived,
    StateNoted,
    TagsSet,
    WriterOpened,
)

__all__ = [
    "ATTEMPT_TAG",
    "PROJECT_TAG",
    "RUN_NAME_TAG",
    "RUN_TAG",
    "STATE_TAG",
    "Plan",
    "Witness",
    "attempt_mark",
    "attempt_order",
    "changed_param_tag",
    "chunk_of",
    "comparable",
    "highest",
    "is_newer",
    "is_older",
    "legal_tags",
    "marker_row",
    "metric_rows",
    "plan_of",
    "reference_tag",
    "witness_of",
]

RUN_TAG = "tracelet.run.id"
ATTEMPT_TAG = "tracelet.run.attempt"  # of the newest attempt that MLflow knows: see attempt_mark
_MARK = re.compile(r"(?P<order>[0-9]+)-(?P<key>.*)", re.DOTALL | re.ASCII)
STATE_TAG = "tracelet.state"  # LOST while nothing has been heard of a run for long; else there is none
RUN_NAME_TAG = "tracelet.run.name"  # the whole name of a run or a project that is too long for MLflow
PROJECT_TAG = "tracelet.project"
NAME_TAG = "tracelet.name."  # + legal name: the name as it was logged
PARAM_TAG = "tracelet.param."  # + key: the param's last value, where it is not the first
INFINITE_TAG = "tracelet.infinite."  # + key: says what 1.8e308 means in this metric
ARTIFACT_TAG = "tracelet.artifact."  # + path: where its bytes are, and why not here
ERROR_TAG = "tracelet.error."  # + type, message, stacktrace
MARKER = "system/tracelet/batch/"  # + 8 digits of the folder: a metric that rises with each batch that needs it

_INFINITE = f"infinite values of this metric are stored by MLflow as +/-{SQL_INFINITY!r}"
_NAME_TAG = "mlflow.runName"
_RESERVED = (RUN_TAG, ATTEMPT_TAG, STATE_TAG)

Witness = MetricRow
"""A row of the batch that becomes its key's latest value: it is there exactly if the batch is."""


@dataclass(slots=True)
class Plan:
    """What a batch's records mean for params and tags; metric rows and artifacts stand beside it."""

    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)  # artifact path -> a whole text that had to be cut
    artifacts: list[tuple[ArtifactLogged, str]] = field(default_factory=list)  # and the event's mark
    refusals: list[Refusal] = field(default_factory=list)
    ended: AttemptEnded | None = None
    spans: list[str] = field(default_factory=list)  # serialized ResourceSpans, in base64
    state: StateNoted | None = None  # the latest that was noted


# ---- points ------------------------------------------------------------------------------------------------------


def metric_rows(batch: Batch) -> list[MetricRow]:
    """The batch's points as rows; equal rows of different writers (two ranks) are kept apart by a millisecond."""
    rows: list[MetricRow] = []
    for part in batch.parts:
        points = part.points
        keys = {number: legal_name(name) for number, name in points.names.items()}
        rows.extend(
            (keys[number], value, time_ns // 1_000_000, step)
            for number, value, time_ns, step in zip(
                points.metric_ids, points.values, points.time_unix_nano, points.iterations, strict=True
            )
        )
    if len(rows) > POINTS_PER_BATCH:
        raise ValueError(f"a batch for MLflow holds at most {POINTS_PER_BATCH} points, this one {len(rows)}")
    return rows if sum(1 for part in batch.parts if len(part.points)) < 2 else _apart(rows)


def _apart(rows: list[MetricRow]) -> list[MetricRow]:
    seen: set[tuple[str, int, int, float, bool]] = set()
    out = []
    for row in rows:
        key, value, ms, step = row
        while (identity := (key, ms, step, comparable(value), math.isnan(value))) in seen:
            ms += 1
        seen.add(identity)
        out.append((key, value, ms, step))
    return out


def comparable(value: float) -> float:
    """`value` as MLflow compares it: NaN counts as 0, infinity as the largest double."""
    return 0.0 if value != value else max(-SQL_INFINITY, min(SQL_INFINITY, value))  # noqa: PLR0124 NaN alone differs


def highest(rows: Iterable[MetricRow]) -> dict[str, tuple[Latest, MetricRow]]:
    """For each key the row that MLflow would call the latest, with what it is compared by."""
    best: dict[str, tuple[Latest, MetricRow]] = {}
    for row in rows:
        key, value, ms, step = row
        held = best.get(key)
        if held is None or (step, ms) >= held[0][:2]:
            order = (step, ms, comparable(value))
            if held is None or order > held[0]:
                best[key] = (order, row)
    return best


def witness_of(rows: Sequence[MetricRow], latest: Mapping[str, Latest]) -> Witness | None:
    """A row that raises its key's latest value, or None if the batch raises none (late steps)."""
    for key, (order, row) in highest(rows).items():
        known = latest.get(key)
        if known is None or order[:2] > known[:2]:
            return row
    return None


def marker_row(batch: Batch, rows: Sequence[MetricRow]) -> Witness:
    """The row that proves a batch which raises no latest value: value is the number of points, step the batch's."""
    where = hashlib.sha256(os.path.basename(batch.folder.rstrip("/")).encode("utf-8", "surrogateescape")).hexdigest()
    return (MARKER + where[:8], float(len(rows)), max(row[2] for row in rows), batch.number)


# ---- everything else ---------------------------------------------------------------------------------------------


def plan_of(batch: Batch, rows: Sequence[MetricRow], params: Mapping[str, str], tags: Mapping[str, str]) -> Plan:
    """What to send of the batch's records to a run that holds `params` and `tags`; what it has is left out."""
    plan = _Planner(params, tags)
    for part in batch.parts:
        plan.note_names(part.points.names[number] for number in dict.fromkeys(part.points.metric_ids))
        for record in part.records:
            if isinstance(record, ParamsLogged):
                plan.add_params(record.params)
            elif isinstance(record, TagsSet):
                plan.add_tags(record.tags)
            elif isinstance(record, ArtifactLogged):
                plan.add_artifact(record)
            elif isinstance(record, RunStarted):
                plan.add_run_tags(record)
            elif isinstance(record, SpansReceived):
                plan.made.spans.append(record.resource_spans)
            elif isinstance(record, StateNoted):
                plan.note_state(record)
            elif isinstance(record, AttemptEnded):
                plan.made.ended = record
                plan.add_params(record.params)
                plan.add_tags(record.tags)
                # What went wrong is the newest attempt's to say, and of its ranks that one's whose end is the run's.
                if record.speaks and not is_newer(tags.get(ATTEMPT_TAG), part.opened):
                    plan.add_error(record.error)
    for key in {row[0] for row in rows if math.isinf(row[1])}:
        plan.set_tag(legal_name(INFINITE_TAG + key), _INFINITE)
    return plan.finish()


def legal_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags for the creation of a run: legal, and short; what this changes is set anew, and kept, by the plan."""
    return {legal_name(key): text_of(value)[:TAG_VALUE_CHARS] for key, value in tags.items() if key not in _RESERVED}


def changed_param_tag(key: str) -> str:
    """The tag that holds a param's last value where it differs from the first, which MLflow keeps."""
    return legal_name(PARAM_TAG + key)


def reference_tag(path: str) -> str:
    """The tag that says where an artifact is whose bytes did not come to MLflow."""
    return legal_name(ARTIFACT_TAG + path)


def chunk_of(pairs: Mapping[str, str], most: int) -> list[tuple[str, str]]:
    """The first pairs, at most `most` and of at most REQUEST_BYTES together (at least one)."""
    chosen: list[tuple[str, str]] = []
    size = 0
    for key, value in pairs.items():
        size += 32 + len(key.encode()) + len(value.encode())
        if len(chosen) == most or (chosen and size > REQUEST_BYTES):
            break
        chosen.append((key, value))
    return chosen


def attempt_mark(opened: WriterOpened) -> str:
    """The value of ATTEMPT_TAG for the attempt of a writer: its order and its key."""
    return f"{attempt_order(opened)}-{opened.attempt_key}"


def is_newer(mark: str | None, opened: WriterOpened) -> bool:
    """Whether the attempt of an ATTEMPT_TAG value came after a writer's."""
    return _compared(mark, opened) > 0


def is_older(mark: str | None, opened: WriterOpened) -> bool:
    """Whether the attempt of an ATTEMPT_TAG value came before a writer's; of a value nobody knows, yes."""
    return _compared(mark, opened) < 0


def _compared(mark: str | None, opened: WriterOpened) -> int:
    """-1, 0 or 1: the mark's attempt is the earlier one, the same, or the later one.

    Orders of one attempt may differ (hosts, a start that was first guessed from what came), so the key decides what
    one attempt is.
    """
    found = _MARK.fullmatch(mark or "")
    if found is None:
        return -1
    if found["key"] == opened.attempt_key:
        return 0
    known, mine = int(found["order"]), attempt_order(opened)
    return (known > mine) - (known < mine)


def attempt_order(opened: WriterOpened) -> int:
    """What attempts of a run are sorted by: what the sender says, else the start."""
    order = opened.resource.get(semconv.ATTEMPT_ORDER)
    return order if type(order) is int and order > 0 else opened.attempt_started_unix_nano


class _Planner:
    """Folds records in order: a param's first value stands, its later ones become a tag; a tag's last value stands."""

    def __init__(self, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        self.made = Plan()
        self._params = params
        self._tags = tags

    def add_params(self, params: Mapping[str, Scalar]) -> None:
        self.note_names(params)
        for name, value in params.items():
            key = legal_name(name)
            text = self._fit(text_of(value), PARAM_VALUE_CHARS, "params", key)
            known = self._params.get(key, self.made.params.get(key))
            changed = changed_param_tag(key)
            if known is None:
                self.made.params[key] = text
            elif text != known or changed in self._tags or changed in self.made.tags:
                self.set_tag(changed, text)  # fits: a tag may be longer than a param

    def add_tags(self, tags: Mapping[str, str]) -> None:
        self.note_names(tags)
        for name, value in tags.items():
            if name in _RESERVED:
                reason = f"the tag {name} is tracelet's own: the run is found again by it"
                self.made.refusals.append(Refusal("tag", reason, {"key": name, "value": value}))
                continue
            key = legal_name(name)
            self.set_tag(key, self._fit(text_of(value), TAG_VALUE_CHARS, "tags", key))

    def add_artifact(self, artifact: ArtifactLogged) -> None:
        path = legal_path(artifact.path)
        if path != artifact.path:
            self.set_tag(
                legal_name(NAME_TAG + path), self._fit(encodable(artifact.path), TAG_VALUE_CHARS, "tags", path)
            )
        self.made.artifacts.append((replace(artifact, path=path), event_mark(artifact.time_unix_nano, artifact.path)))

    def add_run_tags(self, started: RunStarted) -> None:
        """A resumed run keeps the user, source and commit it was made with, as with MLflow's own client; what a run
        that was made before its start was known lacks, it gets now."""
        tags = started.mlflow_tags
        self.add_tags({k: v for k, v in tags.items() if k != _NAME_TAG and legal_name(k) not in self._tags})
        nameless = self._tags.get(_NAME_TAG) is not None and self._tags[_NAME_TAG] == self._tags.get(RUN_TAG)
        name = encodable(started.run_name or tags.get(_NAME_TAG, ""))
        if nameless and name:  # nobody named it meanwhile: it still has its id for a name
            self.set_tag(_NAME_TAG, capped(name, RUN_NAME_CHARS))  # renames the run, too
            if len(name) > RUN_NAME_CHARS:
                self.set_tag(RUN_NAME_TAG, name[:TAG_VALUE_CHARS])

    def note_state(self, noted: StateNoted) -> None:
        """The latest by its time: LOST and the word that ends it stand with different writers, in any order."""
        known = self.made.state
        if known is None or noted.time_unix_nano >= known.time_unix_nano:
            self.made.state = noted

    def add_error(self, error: ErrorInfo | None) -> None:
        if error is None:
            return
        for name in ("type", "message", "stacktrace"):
            text = self._fit(encodable(getattr(error, name)), TAG_VALUE_CHARS, "tags", ERROR_TAG + name)
            if text:
                self.set_tag(ERROR_TAG + name, text)

    def note_names(self, names: Iterable[str]) -> None:
        for name in names:
            key = legal_name(name)
            if key != name:
                tag = NAME_TAG + key
                self.set_tag(tag, self._fit(encodable(name), TAG_VALUE_CHARS, "tags", tag))

    def set_tag(self, key: str, value: str) -> None:
        # Even if the run is known to have it: an earlier record of this batch may have said otherwise.
        self.made.tags[key] = value

    def finish(self) -> Plan:
        self.made.tags = {key: value for key, value in self.made.tags.items() if self._tags.get(key) != value}
        return self.made

    def _fit(self, text: str, limit: int, kind: str, key: str) -> str:
        if len(text) <= limit:
            return text
        path = f"tracelet/{kind}/{file_name(key)}"
        self.made.texts[path] = text
        return shorten(text, limit, path)


assert len(NAME_TAG) + 200 <= KEY_CHARS  # a changed name's tag is never too long itself
assert POINTS_PER_BATCH < METRICS_PER_REQUEST
