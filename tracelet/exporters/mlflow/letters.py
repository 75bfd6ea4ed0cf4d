"""What MLflow refused, told as it was logged: from its legal names and cut texts back to the records behind them.

A dead letter is sent again through the same mapping, so it holds what goes into the mapping, not what came out of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tracelet.exporters.base import Refusal
from tracelet.exporters.mlflow.mapping import comparable
from tracelet.exporters.mlflow.names import legal_name, legal_path
from tracelet.records import ArtifactLogged, AttemptEnded, Batch, ParamsLogged, SpansReceived, TagsSet

__all__ = ["as_logged"]

_Point = tuple[str, dict[str, Any]]


def as_logged(refusals: Sequence[Refusal], batch: Batch) -> tuple[Refusal, ...]:
    """The refusals with the facts of what `batch` holds, and whose it is; where that isn't found, as they are."""
    points: dict[tuple[str, int], list[_Point]] | None = None
    told = []
    for refusal in refusals:
        found: _Point | None = None
        if refusal.what == "point":
            points = _points(batch) if points is None else points
            found = _point(refusal.facts, points)
        elif refusal.what in ("param", "tag"):
            found = _pair(refusal.what, str(refusal.facts.get("key")), batch)
        elif refusal.what == "artifact" and "text" not in refusal.facts:
            found = _artifact(refusal.facts, batch)
        elif refusal.what == "event":
            found = _end(batch)
        elif refusal.what == "span":
            found = _span(refusal.facts, batch)
        if found is not None:
            refusal = dataclasses.replace(refusal, writer=found[0], facts=found[1])  # noqa: PLW2901
        told.append(refusal)
    return tuple(told)


def _points(batch: Batch) -> dict[tuple[str, int], list[_Point]]:
    """The batch's points by their key in MLflow and their step."""
    found: dict[tuple[str, int], list[_Point]] = {}
    for part in batch.parts:
        points = part.points
        keys = {number: legal_name(name) for number, name in points.names.items()}
        columns = zip(points.metric_ids, points.values, points.iterations, points.time_unix_nano, strict=True)
        for number, value, step, time in columns:
            facts = {
                "name": points.names[number],
                "iteration": step,
                "value": value if value - value == 0 else str(value),  # JSON has no word for NaN and infinities
                "time_unix_nano": time,
            }
            found.setdefault((keys[number], step), []).append((part.writer_id, facts))
    return found


def _point(row: Mapping[str, Any], points: Mapping[tuple[str, int], list[_Point]]) -> _Point | None:
    """The point of a row. Its millisecond may have been moved on past equal rows of other ranks: the nearest is it."""
    wanted = _identity(row["value"])
    same = [
        (writer, facts)
        for writer, facts in points.get((row["key"], row["step"]), ())
        if _identity(float(facts["value"])) == wanted
    ]
    return min(same, key=lambda one: abs(one[1]["time_unix_nano"] // 1_000_000 - row["timestamp_ms"]), default=None)


def _identity(value: float) -> tuple[float, bool]:
    return comparable(value), value - value == 0


def _pair(what: str, key: str, batch: Batch) -> _Point | None:
    last: _Point | None = None
    for writer, pairs, time in _pairs(what, batch):
        for name, value in pairs.items():
            if legal_name(name) == key:
                last = (writer, {"key": name, "value": value, **({} if time is None else {"time_unix_nano": time})})
    return last


def _pairs(what: str, batch: Batch) -> Iterator[tuple[str, Mapping[str, Any], int | None]]:
    for part in batch.parts:
        for record in part.records:
            if isinstance(record, ParamsLogged) and what == "param":
                yield part.writer_id, record.params, record.time_unix_nano
            elif isinstance(record, TagsSet) and what == "tag":
                yield part.writer_id, record.tags, record.time_unix_nano
            elif isinstance(record, AttemptEnded):
                yield part.writer_id, record.params if what == "param" else record.tags, record.end_unix_nano


def _artifact(facts: Mapping[str, Any], batch: Batch) -> _Point | None:
    for part in batch.parts:
        for record in part.records:
            if isinstance(record, ArtifactLogged) and legal_path(record.path) == facts.get("path"):
                if "stored" in facts and (record.stored, record.source) != (facts["stored"], facts["source"]):
                    continue
                return part.writer_id, dataclasses.asdict(record)
    return None


def _end(batch: Batch) -> _Point | None:
    for part in batch.parts:
        for record in part.records:
            if isinstance(record, AttemptEnded):
                return part.writer_id, {
                    "status": record.status,
                    "start_unix_nano": record.start_unix_nano,
                    "end_unix_nano": record.end_unix_nano,
                }
    return None


def _span(facts: Mapping[str, Any], batch: Batch) -> _Point | None:
    for part in batch.parts:
        if any(isinstance(record, SpansReceived) for record in part.records):
            return part.writer_id, dict(facts)
    return None
