"""Attributes read back, and whose Resource it is: a run's rank, nobody's of ours, or of a wire version to come."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tracelet import ids
from tracelet.errors import ConfigError
from tracelet.otlp import semconv
from tracelet.records import RunInfo, Scalar

__all__ = ["Owner", "Tally", "attribute_map", "owner_of", "scalar"]

_ATTEMPT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ONLY_ATTEMPT = "0" * 16  # of a Resource that names none: a program that made its own
_RANKS = range(2**31)
_NAMED_VERSIONS = 16
_DEPTH = 32
_NESTED = ("array_value", "kvlist_value")
_MAJOR = semconv.WIRE_VERSION.partition(".")[0]


@dataclass(frozen=True, slots=True)
class Owner:
    """The rank of a run's attempt that a Resource belongs to."""

    run: RunInfo
    attempt_key: str
    rank: int
    instance_id: str
    resource: Mapping[str, Scalar]


@dataclass(slots=True)
class Tally:
    """Counts what of a request is not a run's, and why."""

    foreign: int = 0
    unknown: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)

    def add_foreign(self, reason: str, items: int = 1) -> None:
        """`items` that no run takes. A reason is one of ours, never a text from the request: it becomes a label."""
        if items:
            self.foreign += items
            self.reasons[reason] = self.reasons.get(reason, 0) + items

    def add_unknown(self, version: str, items: int) -> None:
        """`items` of a wire version this release can't read."""
        if version not in self.unknown and len(self.unknown) >= _NAMED_VERSIONS:
            version = "others"
        self.unknown[version] = self.unknown.get(version, 0) + items


def scalar(value: Any) -> Scalar:
    """An AnyValue as a scalar: lists and maps as JSON text, bytes in base64, nothing at all as an empty text."""
    kind = value.WhichOneof("value")
    if kind in ("string_value", "int_value", "double_value", "bool_value"):
        plain: Scalar = getattr(value, kind)
        return plain
    if kind == "bytes_value":
        return base64.b64encode(value.bytes_value).decode()
    if kind in _NESTED:
        return json.dumps(_plain(value, _DEPTH), ensure_ascii=False)
    return ""  # also of a kind that only another signal has (an index into a profile's table), or a newer OTLP


def _plain(value: Any, depth: int) -> Any:
    kind = value.WhichOneof("value")
    if depth == 0:
        return "..."  # a protobuf parser allows a hundred levels; nobody reads that far
    if kind == "array_value":
        return [_plain(each, depth - 1) for each in value.array_value.values]
    if kind == "kvlist_value":
        return {each.key: _plain(each.value, depth - 1) for each in value.kvlist_value.values}
    return None if kind is None else scalar(value)


def attribute_map(attributes: Iterable[Any]) -> dict[str, Scalar]:
    """OTLP attributes by name; of a name that stands there twice, the last."""
    return {each.key: scalar(each.value) for each in attributes}


def owner_of(resource: Any, items: int, tally: Tally) -> Owner | None:
    """Whose `items` these are; None, and counted, if no run of ours that this release can read.

    A Resource is a run's if it has `tracelet.run.id`. What else it lacks (a program that made its own may leave out
    all but that) follows from it: project from `service.name`, the experiment from the project; the name stays empty.
    """
    own = attribute_map(resource.attributes)
    run_id = own.get(semconv.RUN_ID)
    if run_id is None:
        tally.add_foreign("no run id", items)
        return None
    version = own.get(semconv.RESOURCE_WIRE_VERSION, semconv.WIRE_VERSION)
    if not isinstance(version, str) or version.partition(".")[0] != _MAJOR:
        tally.add_unknown(str(version)[:32], items)
        return None
    reason = _fault(own, run_id)
    if reason is not None:
        tally.add_foreign(reason, items)
        return None
    assert isinstance(run_id, str)
    attempt = str(own.get(semconv.RUN_ATTEMPT) or _ONLY_ATTEMPT)
    rank = _rank(own)
    assert rank is not None
    project = _text(own, semconv.PROJECT) or _text(own, "service.name") or "unknown"
    experiment = _text(own, semconv.EXPERIMENT_NAME) or project
    return Owner(
        RunInfo(run_id, project, experiment, _text(own, semconv.RUN_NAME)),
        attempt,
        rank,
        _text(own, semconv.SERVICE_INSTANCE_ID) or ids.instance_id(run_id, attempt, rank),
        own,
    )


def _fault(own: Mapping[str, Scalar], run_id: Scalar) -> str | None:
    """Why a Resource with a run id is no run's: what names folders and traces has to be what it should be."""
    try:
        ids.valid_run_id(run_id)  # type: ignore[arg-type]  # anything may have come
    except ConfigError:
        return "run id that can't name a run"
    attempt = own.get(semconv.RUN_ATTEMPT)
    if attempt is not None and (not isinstance(attempt, str) or (attempt and not _ATTEMPT.fullmatch(attempt))):
        return "attempt key that can't be one"
    return "rank that can't be one" if _rank(own) is None else None


def _rank(own: Mapping[str, Scalar]) -> int | None:
    rank = own.get(semconv.RANK, 0)
    if isinstance(rank, str) and len(rank) <= 10 and rank.isascii() and rank.isdecimal():
        rank = int(rank)  # OTEL_RESOURCE_ATTRIBUTES knows texts only
    return rank if type(rank) is int and rank in _RANKS else None


def _text(own: Mapping[str, Scalar], name: str) -> str:
    value = own.get(name)
    return value if isinstance(value, str) else ""
