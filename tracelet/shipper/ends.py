"""The last batch of an attempt or a rank: made from a few facts that the journal keeps, the same every time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tracelet.records import AttemptEnded, Batch, Part, RankEnded, StateNoted
from tracelet.shipper.batches import Assembled, empty_points, instance_of
from tracelet.shipper.roster import Roster, frames_of
from tracelet.shipper.stamps import State, series_key
from tracelet.shipper.status import Fold, Verdict
from tracelet.spool.reader import SpoolReader

if TYPE_CHECKING:
    from tracelet.shipper.site import End, Site
    from tracelet.spool.store import Attempt

__all__ = ["ending_from", "ending_of", "word_of"]


def word_of(attempt: Attempt, state: str, noted_unix_nano: int) -> dict[str, Any]:
    """What the word that a run is silent, or speaks again, is made from: no end, and told in the same way."""
    mark = f"{attempt.key}/{state} {noted_unix_nano}"
    return {"attempt": attempt.key, "mark": mark, "noted": state, "noted_unix_nano": noted_unix_nano}


def ending_of(site: Site, reader: SpoolReader, attempt: Attempt, end: End) -> dict[str, Any]:
    """What `end`, which is decided, is made from, as JSON.

    Of each writer the number of frames that count: a child that is still alive may add some before a repeat, and a
    rank may come late.
    """
    assert end.decided is not None, "an end is told once it is known"
    roster = site.roster
    writers = roster.writers_of(attempt.key)
    others = {other.rank for other in site.ends_of(attempt.key) if other.mark != end.mark}
    if end.mark != attempt.key:
        writers = mine = [writer for writer in writers if roster.opened[writer].rank == end.rank]
    else:
        mine = [writer for writer in writers if roster.opened[writer].rank not in others]
    first = roster.first_of(attempt.key, end.rank)
    # A rank 0 that came after another's end was decided speaks alone, also where that end has not been told yet.
    speaks = end.rank == 0 or (end.whole and 0 not in others and site.speaks_for(attempt))
    return {
        "attempt": attempt.key,
        "mark": end.mark,
        "rank": end.rank,
        "whole": end.whole,
        "speaks": speaks,
        "started_unix_nano": attempt.started_unix_nano
        if end.whole or first is None
        else roster.opened[first].time_unix_nano,
        "newest": end.whole and speaks and site.is_newest(attempt),
        "verdict": end.decided.verdict.to_json(),
        "frames": {writer: sum(1 for _ in frames_of(reader, writer)) for writer in writers},
        "mine": mine,
    }


def ending_from(
    site: Site, reader: SpoolReader, states: Mapping[str, State], number: int, extra: Mapping[str, Any]
) -> Assembled:
    """The batch that holds the end, from what `ending_of` gave; also from what an older release kept."""
    roster, key = site.roster, str(extra["attempt"])
    first = roster.first_of(key, extra.get("rank"))
    assert first is not None, "an attempt without a writer has no end to be told"
    if "noted" in extra:
        word = StateNoted(extra["noted_unix_nano"], str(extra["noted"]))
        said = Part(first, roster.opened[first], (word,), empty_points())
        return Assembled(Batch(number, site.run, str(site.folder), (said,)), {}, (), {}, extra)
    mine = extra.get("mine", extra["frames"])
    fold = Fold()
    for writer, count in extra["frames"].items():
        records = (record for _, record in zip(range(count), frames_of(reader, writer), strict=False))
        fold.take(writer, records, whole=writer in mine)
    verdict = Verdict.from_json(extra["verdict"])
    common: dict[str, Any] = {
        "status": verdict.status,
        "start_unix_nano": extra["started_unix_nano"],
        "end_unix_nano": verdict.end_unix_nano,
        "error": verdict.error,
        "open_spans": tuple(fold.open_spans.values()),
        "series": _series(roster, fold, states),
    }
    record: AttemptEnded | RankEnded
    if extra.get("whole", True):
        record = AttemptEnded(
            **common, newest=extra["newest"], params=fold.params, tags=fold.tags, speaks=extra.get("speaks", True)
        )
    else:
        record = RankEnded(**common)
    part = Part(first, roster.opened[first], (record,), empty_points())
    batch = Batch(number, site.run, str(site.folder), (part,))
    return Assembled(batch, {}, (), {}, extra)


def _series(roster: Roster, fold: Fold, states: Mapping[str, State]) -> dict[str, tuple[tuple[str, int], ...]]:
    """Each series under the first writer that named it: rank and attempt share theirs among their writers."""
    seen: set[str] = set()
    found: dict[str, tuple[tuple[str, int], ...]] = {}
    for writer, names in fold.names.items():
        mine: list[tuple[str, int]] = []
        for name in names:
            key = series_key(instance_of(roster.opened[writer]), name)
            if key in states and key not in seen:
                seen.add(key)
                mine.append((name, states[key][0] * 1_000_000))
        if mine:
            found[writer] = tuple(mine)
    return found
