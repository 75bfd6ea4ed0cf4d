"""From what a person types for a run to its folders: the beginning of an id, a run's name, or a path."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from tracelet import settings
from tracelet.errors import TraceletError
from tracelet.spool import store

__all__ = ["UsageError", "add_dir", "all_runs", "root", "select", "short_ids"]

_RANDOM_ID = re.compile(r"[0-9a-f]{32}")
_SHORTEST = 8


class UsageError(TraceletError):
    """The command line names what isn't there, or not exactly one thing."""


def add_dir(command: argparse.ArgumentParser) -> None:
    """The option that all commands have."""
    command.add_argument("--dir", metavar="DIR", help="the spool's folder (default: the setting TRACELET_DIR)")


def root(args: argparse.Namespace) -> Path:
    """The spool's folder, from `--dir` or the settings."""
    return settings.from_process({"dir": args.dir}).dir


def all_runs(spool: Path) -> list[store.RunFolder]:
    """Every run's folder, the one that was started last first."""
    return sorted(store.list_runs(spool), key=_started, reverse=True)


def _started(entry: store.RunFolder) -> int:
    attempts = entry.manifest.attempts if entry.manifest is not None else ()
    return max((attempt.started_unix_nano for attempt in attempts), default=0)


def select(spool: Path, wanted: str) -> list[store.RunFolder]:
    """The folders of the one run that `wanted` means: the beginning of its id, its name, or a folder's path.

    A run has a folder for each host and boot it ran on.

    Raises:
        UsageError: no run, or several.
    """
    entries = all_runs(spool)
    if os.sep in wanted or wanted in (".", ".."):
        try:
            return _at(Path(wanted).expanduser().absolute())
        except (RuntimeError, ValueError, OSError) as error:  # a ~ of nobody; a name that is too long
            raise UsageError(f"{wanted!a} can't be looked at: {error}") from None
    exact = [entry for entry in entries if entry.run_id == wanted]
    found = exact or [entry for entry in entries if entry.run_id.startswith(wanted)]
    if not found:
        found = [entry for entry in entries if entry.manifest is not None and entry.manifest.run_name == wanted]
    ids = {entry.run_id for entry in found}
    if not ids:
        there = f"`tracelet runs --dir {spool}` lists those there are" if entries else f"there are none in {spool}"
        raise UsageError(f"no run here has an id that begins with {wanted!r}, or that name: {there}", run=wanted)
    if len(ids) > 1:
        shown = ", ".join(sorted(short_ids(entries)[i] for i in ids)[:8])
        raise UsageError(f"{wanted!r} means {len(ids)} runs ({shown}{', ...' if len(ids) > 8 else ''})", run=wanted)
    return found


def _at(path: Path) -> list[store.RunFolder]:
    """The runs at a path: a run's folder on one host, a run's folder, or a whole spool."""
    if not path.is_dir():
        raise UsageError(f"there is no folder {path}", path=str(path))
    spool = path
    if _is_host_folder(path):
        spool = path.parent.parent
    elif any(_is_host_folder(child) for child in path.iterdir()):
        spool = path.parent
    found = [entry for entry in all_runs(spool) if path in (entry.folder, entry.folder.parent, spool)]
    if not found:
        raise UsageError(f"{path} is neither a run's folder nor one that holds runs", path=str(path))
    return found


def _is_host_folder(path: Path) -> bool:
    return (path / store.MANIFEST).exists() or any(path.glob("*.lock"))


def chosen(spool: Path, wanted: Sequence[str]) -> list[store.RunFolder]:
    """The folders of all of `wanted`, each once; of every run, if nothing is wanted."""
    if not wanted:
        return all_runs(spool)
    found: dict[Path, store.RunFolder] = {}
    for one in wanted:
        for entry in select(spool, one):
            found[entry.folder] = entry
    return list(found.values())


def short_ids(entries: Iterable[store.RunFolder]) -> dict[str, str]:
    """For each run id what tells it from the others: the first 8 digits or more of a random one, all of a given one."""
    ids: Collection[str] = {entry.run_id for entry in entries}
    short = {}
    for run_id in ids:
        length = _SHORTEST if _RANDOM_ID.fullmatch(run_id) else len(run_id)
        while length < len(run_id) and any(o != run_id and o.startswith(run_id[:length]) for o in ids):
            length += 1
        short[run_id] = run_id[:length]
    return short
