"""Dead letters on their way once more: from lines of a file to a batch with the original stamps, and back to marks.

    letters that wait -> batch (by writer) -> exporter.begin ... attempt -> taken: marked; refused again: stays

It is a batch like any other of its lane: the journal takes it by the letters' digests before it leaves, so a shipper
that is killed on the way leaves an entry from which the next one makes the same batch again.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from tracelet import codec
from tracelet.errors import SpoolFormatError
from tracelet.exporters.base import Refusal
from tracelet.guard import logger
from tracelet.records import (
    Again,
    ArtifactLogged,
    AttemptEnded,
    Batch,
    ParamsLogged,
    Part,
    PointBatch,
    Record,
    RunInfo,
    SpansReceived,
    TagsSet,
    WriterOpened,
)
from tracelet.shipper.deadletter import VERSION, DeadLetters, Letter, letters_in

if TYPE_CHECKING:
    from tracelet.shipper.batches import Assembled

__all__ = ["AGAIN", "Reship", "is_again", "why_not"]

AGAIN = "again"
"""In a journal's `extra`: the digests of the letters that the batch is made of."""

_LETTERS = 1000  # in a batch; the journal's line holds their digests
_UNREADABLE = ("damage", "frame")
_INT64, _UINT64 = range(-(2**63), 2**63), range(2**64)


def is_again(extra: Mapping[str, Any] | None) -> bool:
    """Whether a batch with this `extra` is made of dead letters."""
    return extra is not None and AGAIN in extra


class Reship:
    """The dead letters of one lane. `wanted`: take up those that wait, each once."""

    def __init__(self, letters: DeadLetters, *, wanted: bool) -> None:
        self._letters = letters
        self._todo: list[Letter] | None = None if wanted else []
        self._openings: dict[str, WriterOpened] = {}

    def next(self, run: RunInfo, folder: str, number: int, max_points: int) -> Assembled | None:
        """The next batch; None once every letter has had its turn."""
        if self._todo is None:
            self._todo, self._openings = self._letters.waiting(), self._letters.openings()
        chosen: list[Letter] = []
        points = 0
        while self._todo and len(chosen) < _LETTERS:
            letter = self._todo[0]
            if letter.what == "point" and chosen and points + len(letter.items) > max_points:
                break
            del self._todo[0]
            if why_not(letter, self._openings) is None:
                chosen.append(letter)
                points += len(letter.items) if letter.what == "point" else 0
        return self._assembled(chosen, run, folder, number) if chosen else None

    def resume(self, run: RunInfo, folder: str, number: int, extra: Mapping[str, Any]) -> Assembled:
        """The batch that was under way when a shipper died."""
        self._openings = self._letters.openings()
        sent = [letter for letter in self._sent(extra) if why_not(letter, self._openings) is None]
        return self._assembled(sent, run, folder, number, extra)

    def settle(self, extra: Mapping[str, Any], refused: Sequence[Refusal]) -> tuple[int, int]:
        """Mark what has been taken; how many points, and how many letters, that is. What was refused again stays."""
        sent = self._sent(extra)
        again = {_key(item.what, facts) for item in refused for facts in _items(item.facts)}
        known = {_key(letter.what, facts) for letter in sent for facts in letter.items}
        # In words that no letter has: nothing tells which one is meant, so all of that kind stay.
        unclear = {item.what for item in refused for facts in _items(item.facts) if _key(item.what, facts) not in known}
        taken = [
            letter
            for letter in sent
            if letter.what not in unclear and not any(_key(letter.what, facts) in again for facts in letter.items)
        ]
        self._letters.mark(taken)
        left = len(sent) - len(taken)
        if left:
            reason = refused[0].reason if refused else "no reason"
            logger.warning("%s: %d dead letters were refused again, the first: %s", self._letters.path, left, reason)
        return sum(letter.count for letter in taken if letter.what == "point"), len(taken)

    def _sent(self, extra: Mapping[str, Any]) -> list[Letter]:
        """The letters of a batch, marked or not: a repeat is the whole batch again, and counts as the whole."""
        wanted = set(extra[AGAIN])
        return [letter for letter in letters_in(self._letters.path) if letter.digest in wanted]

    def _assembled(
        self,
        letters: Sequence[Letter],
        run: RunInfo,
        folder: str,
        number: int,
        extra: Mapping[str, Any] | None = None,
    ) -> Assembled:
        from tracelet.shipper.batches import Assembled  # loads numpy, which who only lists letters can do without

        parts: dict[str, _Part] = {}
        for letter in letters:
            writer = str(letter.at["writer"])
            parts.setdefault(writer, _Part(writer, self._openings[writer])).take(letter)
        batch = Batch(number, run, folder, tuple(part.made() for part in parts.values()), again=True)
        return Assembled(batch, {}, (), {}, extra or {AGAIN: [letter.digest for letter in letters]})


def why_not(letter: Letter, openings: Mapping[str, WriterOpened]) -> str | None:
    """Why a letter can't be sent again, or None if it can."""
    if not letter.line:
        return "the line can't be read"
    if letter.version is None:
        return "an earlier release wrote it, without what it takes to send it again"
    if letter.version != VERSION:
        return f"it is of version {letter.version!r}, which this release doesn't know"
    if letter.what in _UNREADABLE:
        return "it could not be read from the spool: there is nothing to send"
    writer = letter.at.get("writer")
    if not isinstance(writer, str) or writer not in openings:
        return "nothing tells which process logged it"
    try:
        part = _Part("", openings[writer])
        part.take(letter)
        for record in part.records:
            if type(record) in codec.KINDS.values():  # its fields have the types that exporters rely on
                codec.decode(*codec.encode(record))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, SpoolFormatError) as error:
        return f"its facts don't say what was logged ({type(error).__name__}: {error})"
    return None


@dataclass
class _Part:
    """The things of one writer."""

    writer: str
    opened: WriterOpened
    records: list[Record] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)
    times: array[int] = field(default_factory=lambda: array("Q"))
    values: array[float] = field(default_factory=lambda: array("d"))
    iterations: array[int] = field(default_factory=lambda: array("q"))
    metric_ids: array[int] = field(default_factory=lambda: array("I"))
    dense: set[int] = field(default_factory=set)

    def take(self, letter: Letter) -> None:
        """Put one letter's things in.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it doesn't hold what its kind needs.
        """
        for facts in letter.items:
            if letter.what == "point" and "message" not in facts:
                self._point(facts)
            else:
                self.records.append(_record(letter, facts))

    def made(self) -> Part:
        """The part of a batch."""
        names = {number: name for name, number in self.ids.items()}
        points = PointBatch(names, self.times, self.values, self.iterations, self.metric_ids, frozenset(self.dense))
        return Part(self.writer, self.opened, tuple(self.records), points)

    def _point(self, facts: Mapping[str, Any]) -> None:
        name, time, iteration, value = facts["name"], facts["time_unix_nano"], facts["iteration"], facts["value"]
        if not isinstance(name, str) or not name or not _is_in(time, _UINT64) or not _is_in(iteration, _INT64):
            raise ValueError("a point has a name, a time and an iteration")
        value = float(value)  # NaN and infinities are texts: JSON has no word for them
        if facts.get("dense"):
            self.dense.add(len(self.values))
        self.times.append(time)
        self.values.append(value)
        self.iterations.append(iteration)
        self.metric_ids.append(self.ids.setdefault(name, len(self.ids)))


def _is_in(value: object, numbers: range) -> bool:
    return isinstance(value, int) and value in numbers  # a float in a range is looked for one by one, for years


def _record(letter: Letter, facts: Mapping[str, Any]) -> Record:
    time = facts.get("time_unix_nano", letter.time_unix_nano)
    if "message" in facts:
        from tracelet.otlp.encode import loads_of, resource_bytes

        loads_of(resource_bytes({}), [facts])  # a message that is none would be found by nobody who can pass it over
        return Again(letter.what, facts)
    match letter.what:
        case "param" if isinstance(facts["value"], (str, int, float, bool)):
            return ParamsLogged(time, {str(facts["key"]): facts["value"]})
        case "tag":
            return TagsSet(time, {str(facts["key"]): str(facts["value"])})
        case "artifact" if "text" in facts:
            return Again(letter.what, {"path": str(facts["path"]), "text": str(facts["text"])})
        case "artifact":
            return ArtifactLogged(**{each.name: facts[each.name] for each in fields(ArtifactLogged)})
        case "span":
            return SpansReceived(time, str(facts["resource_spans"]))
        case "event":
            start, end = int(facts["start_unix_nano"]), int(facts["end_unix_nano"])
            if start not in _UINT64 or end not in _UINT64:
                raise ValueError(f"{start} to {end} are no times in nanoseconds")
            return AttemptEnded(
                status=str(facts["status"]),
                start_unix_nano=start,
                end_unix_nano=end,
                newest=True,
                error=None,
                params={},
                tags={},
                open_spans=(),
                series={},
            )
    raise ValueError(f"nothing is known of a {letter.what}")


def _items(facts: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    items = facts.get("items")
    return items if isinstance(items, list) else (facts,)


def _key(what: str, facts: Mapping[str, Any]) -> str:
    return json.dumps([what, facts], sort_keys=True, default=str)
