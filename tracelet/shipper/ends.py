"""The last batch of an attempt at a destination: made from a few facts that the journal keeps, the same every time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tracelet.records import AttemptEnded, Batch, Part
from tracelet.shipper.batches import Assembled, empty_points, instance_of
from tracelet.shipper.roster import Roster, frames_of
from tracelet.shipper.stamps import State, series_key
from tracelet.shipper.status import Fold, Verdict
from tracelet.spool.reader import SpoolReader

if TYPE_CHECKING:
    from tracelet.shipper.site import Site
    from tracelet.spool.store import Attempt

__all__ = ["ending_from", "ending_of"]


def ending_of(site: Site, reader: SpoolReader, attempt: Attempt, verdict: Verdict) -> dict[str, Any]:
    """What the end of `attempt` is made from, as JSON.

    Of each writer the number of frames that count: a child that is still alive may add some before a repeat.
    """
    writers = site.roster.writers_of(attempt.key)
    return {
        "attempt": attempt.key,
        "started_unix_nano": attempt.started_unix_nano,
        "newest": site.speaks_for(attempt) and site.is_newest(attempt),
        "verdict": verdict.to_json(),
        "frames": {writer: sum(1 for _ in frames_of(reader, writer)) for writer in writers},
    }


def ending_from(
    site: Site, reader: SpoolReader, states: Mapping[str, State], number: int, extra: Mapping[str, Any]
) -> Assembled:
    """The batch that holds the attempt's end, from what `ending_of` gave."""
    roster, key = site.roster, str(extra["attempt"])
    first = roster.first_of(key)
    assert first is not None, "an attempt without a writer has no end to be told"
    fold = Fold()
    for writer, count in extra["frames"].items():
        fold.take(writer, (record for _, record in zip(range(count), frames_of(reader, writer), strict=False)))
    verdict = Verdict.from_json(extra["verdict"])
    record = AttemptEnded(
        status=verdict.status,
        start_unix_nano=extra["started_unix_nano"],
        end_unix_nano=verdict.end_unix_nano,
        newest=extra["newest"],
        error=verdict.error,
        params=fold.params,
        tags=fold.tags,
        open_spans=tuple(fold.open_spans.values()),
        series=_series(roster, fold, states),
    )
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
