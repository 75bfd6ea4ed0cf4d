"""Claims a start's place: which run it is, which attempt of it, which rank; written into the folder's manifest."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tracelet import ids
from tracelet.core import launchers
from tracelet.core.launchers import Launch
from tracelet.errors import SpoolError
from tracelet.settings import Settings
from tracelet.spool import store

__all__ = ["Claim", "claim"]


@dataclass(frozen=True, slots=True)
class Claim:
    """A start's place: its run's folder here, its attempt as the manifest has it, and its rank in that."""

    run_id: str
    folder: Path
    attempt: store.Attempt
    rank: int


class _Taken(Exception):
    """This start belongs to a later launch than the attempt that has its key, or to a program of that one's rank."""

    def __init__(self, pid: int | None) -> None:
        self.pid = pid  # of who has this rank's place on this machine


class _Restarted(Exception):
    """This start belongs to the launch of the attempt that has its key, and to a later start of all its workers."""


def claim(
    settings: Settings,
    *,
    destinations: tuple[Mapping[str, Any], ...],
    now: int,
    launch: Launch | None = None,
    start: int = 0,
) -> Claim:
    """Make the folder, and put this start into its manifest.

    `launch` is what the launcher says; `start` how many runs of this project and name this process has started before.

    A run of several processes is named by what each of them knows. Should two launches know the same, the second is
    seen by its place being taken, since a rank starts only once in an attempt: it is then another *generation* of the
    same facts, and a run of its own. Only the launcher's word that it has restarted everything opens a run again.

    A program that a rank starts knows what the rank knows, too. Its place is taken by a process above it: it is no
    second launch, and its like below the other ranks share a run with it, however far those ranks are themselves.

    torchrun gives that word on the node where a worker has failed; on the launch's other nodes all are started again
    as well, with the old count. There the word is that the same agent has another worker in the same place.

    Raises:
        ConfigError: a `run_id` that can't be one.
        SpoolError: the folder can't be made or written, or is of an unknown format.
    """
    given = None if settings.run_id is None else ids.valid_run_id(settings.run_id)
    attempt = store.Attempt(
        key=ids.new_attempt_key(),
        started_unix_nano=now,
        pid=os.getpid(),
        rank=0 if launch is None else launch.rank,
        destinations=destinations,
        shipper=settings.shipper,
        extra={"keep": asdict(settings.keep), "max_bytes": settings.max_bytes},
    )
    if launch is None:
        return _put(settings, given or ids.new_run_id(), attempt, None, derived=False)
    facts = [*launch.identity, settings.project, settings.experiment_name, start]
    generation = 0
    while True:
        run_id, key = _named(given, [*facts, generation], launch)
        later = _named(given, [*facts, generation + 1], launch)
        if not _begun(settings, *later, derived=given is None):  # the latest one alone is still joined, or restarted
            try:
                mine = dataclasses.replace(attempt, key=key)
                return _put(settings, run_id, mine, launch, derived=given is None)
            except _Restarted:
                *requeued, count = launch.restarts
                launch = dataclasses.replace(launch, restarts=(*requeued, count + 1))
                continue
            except _Taken as taken:
                if launchers.is_above(taken.pid):
                    facts, generation = [*facts, "below"], 0
                    continue
        generation += 1


def _named(given: str | None, facts: Sequence[object], launch: Launch) -> tuple[str, str]:
    run_id = ids.derived_run_id(facts) if given is None else given
    return run_id, ids.derived_attempt_key(run_id, [*facts, *launch.restarts])


def _begun(settings: Settings, run_id: str, key: str, *, derived: bool) -> bool:
    found = _manifests(store.run_folder(settings.dir, run_id).parent)
    return bool(found) and (derived or any(one.attempt(key) is not None for one in found))


def _put(settings: Settings, run_id: str, attempt: store.Attempt, launch: Launch | None, *, derived: bool) -> Claim:
    folder = store.run_folder(settings.dir, run_id)
    put = attempt

    def change(before: store.Manifest | None) -> store.Manifest:
        nonlocal put
        known = [*([] if before is None else [before]), *_manifests(folder.parent, but=folder)]
        same = [one for one in (manifest.attempt(attempt.key) for manifest in known) if one is not None]
        if launch is not None and _is_restarted(same, launch):
            raise _Restarted
        if launch is not None and _is_taken(known, same, launch, derived=derived):
            raise _Taken(None if before is None else _pid_of(before.attempt(attempt.key), launch.rank))
        here = None if before is None else before.attempt(attempt.key)
        number = same[0].number if same else _next_number(known)
        order = same[0].order if same else _next_order(known, attempt.started_unix_nano)
        put = dataclasses.replace(attempt, number=number, order_unix_nano=order) if here is None else here
        if launch is not None:
            put = dataclasses.replace(put, extra={**put.extra, "launch": _with(put, launch)})
        fresh = store.Manifest(run_id, settings.project, settings.experiment_name, settings.experiment_name)
        return (before or fresh).with_attempt(put)

    store.update_manifest(folder, change)
    return Claim(run_id, folder, put, attempt.rank)


def _pid_of(attempt: store.Attempt | None, rank: int) -> int | None:
    pid = None if attempt is None else attempt.extra.get("launch", {}).get("ranks", {}).get(str(rank))
    return pid if isinstance(pid, int) else None


def _with(attempt: store.Attempt, launch: Launch) -> dict[str, Any]:
    """What an attempt's entry says of its launch, with this process's rank among those that have started here."""
    before = attempt.extra.get("launch", {})
    found = {
        "world": launch.world,
        "restarts": list(launch.restarts),
        "all_here": launch.all_here,
        "ranks": {**before.get("ranks", {}), str(launch.rank): os.getpid()},
    }
    if launch.place is not None:
        agents = before.get("agents", {})
        workers = agents.get(launch.place.agent, {})
        found["agents"] = {
            **agents,
            launch.place.agent: {**workers, str(launch.place.local_rank): launch.place.worker},
        }
    return found


def _is_restarted(same: Sequence[store.Attempt], launch: Launch) -> bool:
    """Whether the agent that launched this process had another worker in its place, in an attempt with this key."""
    place = launch.place
    if place is None:
        return False
    agents = [one.extra.get("launch", {}).get("agents", {}) for one in same]
    workers = [one.get(place.agent, {}).get(str(place.local_rank)) for one in agents]
    return any(worker not in (None, place.worker) for worker in workers)


def _is_taken(known: Sequence[store.Manifest], same: Sequence[store.Attempt], launch: Launch, *, derived: bool) -> bool:
    told = [one.extra.get("launch", {}) for one in same]
    if any(str(launch.rank) in one.get("ranks", {}) or one.get("world") != launch.world for one in told):
        return True
    if same or not derived:
        return False
    before = [
        attempt.extra["launch"]["restarts"] for one in known for attempt in one.attempts if "launch" in attempt.extra
    ]
    return bool(before) and list(launch.restarts) <= max(before)


def _next_number(known: Sequence[store.Manifest]) -> int:
    """One more than any attempt of the run known here has, also before a restart of this machine, or on another host
    that shares the folder."""
    counts = [max(len(one.attempts), *(a.number for a in one.attempts)) for one in known if one.attempts]
    return 1 + max(counts, default=0)


def _next_order(known: Sequence[store.Manifest], now: int) -> int:
    """Now, or just after the newest attempt known here: a clock set back would make the old one the newest."""
    return max([now, *(1 + attempt.order for one in known for attempt in one.attempts)])


def _manifests(run: Path, but: Path | None = None) -> list[store.Manifest]:
    """Those of all folders of a run that can be read: one that can't says so where it is shipped."""
    found = []
    try:
        folders = [folder for folder in run.iterdir() if folder != but and folder.is_dir()]
    except FileNotFoundError:
        return []
    for folder in folders:
        try:
            manifest = store.read_manifest(folder)
        except SpoolError:
            continue
        if manifest is not None:
            found.append(manifest)
    return found
