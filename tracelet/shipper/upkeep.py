"""Keeps the folder in order while it is shipped: spares ahead, seals, what is delivered moved away, copies deleted."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

from tracelet.errors import SpoolError
from tracelet.exporters.base import Refusal
from tracelet.guard import guard
from tracelet.records import ArtifactLogged
from tracelet.shipper.batches import Assembled
from tracelet.shipper.deadletter import DeadLetters
from tracelet.shipper.roster import frames_of
from tracelet.shipper.site import Site
from tracelet.spool import keep, leftovers, store
from tracelet.spool.cursor import sync_journals
from tracelet.spool.disk import may_map
from tracelet.spool.files import SPARES
from tracelet.spool.reader import Position, SpoolReader

__all__ = ["Upkeep", "keep_rule", "max_bytes"]

_SPARE_AFTER_SLOTS = 4096  # a run that never gets there never rolls, and needs no 2 MiB lying ready


class Destination(Protocol):
    """What a destination's lane tells of itself."""

    @property
    def id(self) -> str:
        """Its id in the manifest."""
        ...

    @property
    def positions(self) -> Mapping[str, Position]:
        """How far it has acknowledged each writer."""
        ...


class Upkeep:
    """The housekeeping of one folder. `artifact_gone` may be called from any thread, the rest from one."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._reader = SpoolReader(site.folder, pages=site.pages)
        self._sealed: dict[str, int] = {}  # writer -> all its segments up to this one are sealed
        self._kept: set[str] = set()  # copies of artifacts that some destination refused
        self._arrived: dict[str, set[str]] = {}  # copy -> destinations that have it
        self._lock = threading.Lock()
        self._swept = False
        self._spares = may_map(site.folder) and not site.received  # a gateway appends, and would take none

    def round(self, lanes: Sequence[Destination]) -> None:
        """Do what is due; what fails (a full disk) is due again at the next round."""
        site = self._site
        if not self._swept:
            self._swept = True
            self._sweep()
        positions = [lane.positions for lane in lanes]
        alive = [writer for writer in site.writers if not site.is_over(writer)]
        if self._spares and any(_about_to_roll(where.get(writer)) for where in positions for writer in alive):
            store.make_spares(site.folder, max_bytes=max_bytes(site.manifest.attempts))
        if not alive:
            self.drop_spares()
        self._seal_all()
        if any(site.folder.glob("*.seal")):
            with self._known_to_all(lanes) as known:
                if known:
                    store.move_delivered(site.folder, positions)

    @contextlib.contextmanager
    def _known_to_all(self, lanes: Iterable[Destination]) -> Iterator[bool]:
        """Whether these are all for whom the run is kept; within the block nobody else is named."""
        with store.held_manifest(self._site.folder):
            manifest = store.read_manifest(self._site.folder)
            yield manifest is not None and keep.readers_of(manifest) <= {lane.id for lane in lanes}

    def _sweep(self) -> None:
        """What shippers before this one, and programs, were killed over."""
        deaths = self._site.deaths
        if not deaths.from_elsewhere:
            leftovers.sweep(self._site.folder, now_s=time.time(), ask_locks=deaths.by_locks)

    def _seal_all(self) -> None:
        if any(self._sealed.get(writer) != -1 for writer in self._site.writers):
            segments = self._reader.all_segments()
            for writer in self._site.writers:
                self._seal(writer, segments.get(writer, []))

    def _seal(self, writer: str, segments: list[int]) -> None:
        """Seal what nobody writes to any more: all but the last segment, and that one too once the writer is over."""
        if self._sealed.get(writer) == -1:
            return
        over = self._site.deaths.is_surely_dead(writer)  # a seal over what is still being written is damage
        done = self._sealed.get(writer, 0)
        for segment in segments if over else segments[:-1]:
            if segment <= done:
                continue
            if not store.seal(self._site.folder, writer, segment, dead=over, pages=self._site.pages):
                return
            self._sealed[writer] = segment
        if over:
            self._sealed[writer] = -1

    def drop_spares(self) -> None:
        """Nobody will roll any more."""
        for name in SPARES:
            (self._site.folder / name).unlink(missing_ok=True)

    # ---- artifacts ------------------------------------------------------------------------------------------------

    def delivered(self, lane: str, assembled: Assembled, refused: Iterable[Refusal]) -> None:
        """Delete the copies that the last destination now has; one that a destination refused stays."""
        refused_copies = {str(item.facts.get("stored")) for item in refused if item.what == "artifact"}
        for part in assembled.batch.parts:
            for record in part.records:
                if not isinstance(record, ArtifactLogged) or record.stored is None:
                    continue
                with self._lock:
                    arrived = self._arrived.setdefault(record.stored, set())
                    arrived.add(lane)
                    if record.stored in refused_copies:
                        self._kept.add(record.stored)
                    if record.stored not in self._kept and self._drop_copy(record.stored, arrived):
                        del self._arrived[record.stored]

    def _drop_copy(self, stored: str, arrived: AbstractSet[str]) -> bool:
        """Delete a copy, unless somebody still wants it, who may have been named since the last look."""
        site = self._site
        if not arrived >= _takes_files(site.manifest) or not self._may_forget():
            return False
        try:
            with store.held_manifest(site.folder):
                manifest = store.read_manifest(site.folder)
                if manifest is None or not arrived >= _takes_files(manifest):
                    return False
                return self._forget([stored])
        except (OSError, SpoolError):  # no reason to hold up the destination: at the end of the run it is tried again
            return False

    def finish(self, lanes: Sequence[Destination], rule: keep.KeepRule, now_s: float) -> None:
        """The run is delivered everywhere: what is left goes to delivered/, and from there what `rule` doesn't keep.

        Nothing goes where somebody was named meanwhile.
        """
        site = self._site
        self.drop_spares()
        refused = self._refused_copies()
        self._sweep()
        self._seal_all()
        copies = self._copies(refused)
        if copies and not self._may_forget():
            copies = []
        with self._known_to_all(lanes) as known:
            if known:
                self._forget(copies)
                store.move_delivered(site.folder, [lane.positions for lane in lanes], over=site.writers)
        root = site.folder.parent.parent
        keep.retain([run.folder for run in store.list_runs(root)], rule, now_s=now_s)

    def _copies(self, refused: Collection[str]) -> list[str]:
        """The copies that are still there, and that no dead letter waits for."""
        named = (record.stored for writer in self._site.writers for record in frames_of(self._reader, writer)
                 if isinstance(record, ArtifactLogged) and record.stored is not None)  # fmt: skip
        return [stored for stored in named if stored not in refused and (self._site.folder / stored).exists()]

    def _may_forget(self) -> bool:
        """Whether the disk itself has it by now that everybody has their copies: they go only then.

        After a loss of power a journal that lacks its last seconds would ask for them again, and find none. Asked
        before the manifest is held: a disk may take its time, for which no start of the run has to wait.
        """
        try:
            sync_journals(self._site.folder)
        except OSError as error:
            _tell_kept(error)
            return False
        return True

    def _forget(self, copies: Sequence[str]) -> bool:
        """Delete copies that everybody has."""
        try:
            for stored in copies:
                (self._site.folder / stored).unlink(missing_ok=True)
        except OSError as error:  # they stay; the batch that brought them here is through all the same
            _tell_kept(error)
            return False
        return True

    def _refused_copies(self) -> set[str]:
        """Copies named in a dead letter that waits, by this shipper or one before it."""
        folder = self._site.folder
        found = set()
        for path in folder.glob("rejected-*.jsonl"):
            identity = path.name.removeprefix("rejected-").removesuffix(".jsonl")
            waiting = DeadLetters(folder, identity).waiting()
            found |= {str(letter.facts.get("stored")) for letter in waiting if letter.what == "artifact"}
        return found


def _tell_kept(error: OSError) -> None:
    guard.limited("delete copies", "copies of artifacts that are delivered stay: %s", error)


def _takes_files(manifest: store.Manifest) -> set[str]:
    return {identity for identity, one in manifest.destinations.items() if not one.get("in_process")}


def _about_to_roll(position: Position | None) -> bool:
    return position is not None and (position.segment > 1 or position.next >= _SPARE_AFTER_SLOTS)


def max_bytes(attempts: Sequence[store.Attempt]) -> int | None:
    """The newest attempt's TRACELET_MAX_BYTES; None: no limit."""
    limit = attempts[-1].extra.get("max_bytes") if attempts else None
    return limit if isinstance(limit, int) else None


def keep_rule(kept: Mapping[str, object] | None) -> keep.KeepRule:
    """The rule that an attempt's manifest carries, as `settings.Keep` has it; without one the default."""
    rule = keep.KeepRule()
    if not kept:
        return rule
    seconds, size = kept.get("max_age_s"), kept.get("max_bytes")
    return dataclasses.replace(
        rule,
        seconds=float(seconds) if isinstance(seconds, (int, float)) else rule.seconds,
        bytes=size if isinstance(size, int) else rule.bytes,
    )
