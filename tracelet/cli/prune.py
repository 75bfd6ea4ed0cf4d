"""`tracelet prune`: makes room; deletes what is delivered beyond KEEP, and only when asked by name what is not."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tracelet import settings
from tracelet.cli.deadletters import piles_of
from tracelet.cli.facts import LOST, RUNNING, Facts, look
from tracelet.cli.find import UsageError, add_dir, all_runs, chosen, select, short_ids
from tracelet.cli.text import age, count, plain, size, table
from tracelet.errors import SpoolError
from tracelet.settings import Keep
from tracelet.spool import store
from tracelet.spool.keep import KeepRule, beyond_keep, delivered_files, release
from tracelet.spool.lease import ShipperLock

__all__ = ["EXAMPLES", "add", "run"]

EXAMPLES = """\
  tracelet prune --dry-run
  tracelet prune --keep 1d,500MB
  tracelet prune --undelivered 1f0c64ab"""


@dataclass(frozen=True, slots=True)
class Piece:
    """Something that may go: single files of a run, or its whole folder (`files` empty)."""

    facts: Facts
    files: tuple[Path, ...]
    bytes: int
    whatever: bool = False  # a person has given up what of it is undelivered


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Make the parser of this command."""
    command = commands.add_parser(
        "prune",
        help="delete what is delivered and old, to make room",
        description="Deletes delivered segments that are older, or more, than KEEP allows, and the whole folder of a"
        " run that is delivered everywhere and has been quiet for KEEP's age. What is not delivered, or was refused by"
        " a destination, stays, unless --undelivered names its run. A run that is being written, or shipped, is never"
        " touched.",
        allow_abbrev=False,
    )
    command.add_argument("wanted", metavar="RUN", nargs="*", help="only these runs (default: all)")
    add_dir(command)
    command.add_argument(
        "--keep", metavar="KEEP", help="an age, a size or both, such as 7d,2GB (default: TRACELET_KEEP)"
    )
    command.add_argument(
        "--undelivered",
        metavar="RUN",
        action="append",
        default=[],
        help="delete this run whatever of it is undelivered; asks first, and names how much that is",
    )
    command.add_argument("--yes", action="store_true", help="don't ask (there is no terminal to ask at in a script)")
    command.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    return command


def run(args: argparse.Namespace) -> int:
    """Delete, or say what would be. 1 if something that was named could not be deleted."""
    resolved = settings.from_process({"dir": args.dir, "keep": args.keep})
    if args.undelivered:
        if args.wanted:
            raise UsageError("--undelivered RUN deletes that run alone: name others in a command of their own")
        return _undelivered(resolved.dir, args)
    ids = short_ids(all_runs(resolved.dir))
    found = [look(entry) for entry in chosen(resolved.dir, args.wanted)]
    pieces = plan(found, resolved.keep, now_s=time.time())
    failed = []
    for piece in pieces:
        if not args.dry_run and not _delete(piece):
            failed.append(piece)
    done = [piece for piece in pieces if piece not in failed]
    _tell(done, found, ids, resolved.keep, dry_run=args.dry_run)
    for piece in failed:
        print(
            f"{ids[piece.facts.run_id]}: somebody has just begun with it, or added to it; left as it is",
            file=sys.stderr,
        )
    return 1 if failed else 0


# ---- what is delivered -------------------------------------------------------------------------------------------


def plan(found: Iterable[Facts], keep: Keep, *, now_s: float) -> list[Piece]:
    """What KEEP lets go: whole runs that are over, delivered and quiet; of the others delivered files, oldest first."""
    pieces: list[Piece] = []
    others: dict[Path, Facts] = {}
    for facts in found:
        if facts.problem is None and _is_over(facts) and now_s - _quiet_since(facts.folder) > keep.max_age_s:
            pieces.append(Piece(facts, (), _size(facts.folder)))
        else:
            others[facts.folder] = facts
    for folder, files in beyond_keep(others, KeepRule(keep.max_age_s, keep.max_bytes), now_s=now_s).items():
        pieces.append(Piece(others[folder], tuple(path for path, _ in files), sum(number for _, number in files)))
    return pieces


def _is_over(facts: Facts) -> bool:
    """Delivered everywhere, nobody at work on it, and nothing in it that exists only here."""
    return (
        not facts.waits
        and not any(d.kind == "live" and d.lacks for d in facts.destinations)  # the program's next start delivers it
        and not facts.alive
        and facts.state not in (RUNNING, LOST)  # behind a gateway it may go on
        and facts.shipper_pid is None
        and not piles_of(facts)
    )


def _quiet_since(folder: Path) -> float:
    return max((path.stat().st_mtime for path in folder.iterdir()), default=0.0)


def _size(folder: Path) -> int:
    return store.usage(folder) + sum(number_of_bytes for _, number_of_bytes, _ in delivered_files(folder))


def _delete(piece: Piece) -> bool:
    """Delete it, unless something came meanwhile, or has come and gone: a shipper, a writer, a destination.

    Whether it was deleted.
    """
    folder = piece.facts.folder
    if piece.files:
        release(folder, piece.files)
        return not any(path.exists() for path in piece.files)
    lock = ShipperLock(folder)
    try:
        if not lock.acquire():
            return False
        # Nobody can name a destination, or begin with the run, between this look and the deletion.
        with store.held_manifest(folder):
            if not _may_still_go(piece):
                return False
            store.remove_run(folder)
    except FileNotFoundError:
        return not folder.exists()  # somebody else has deleted it
    finally:
        lock.release()
    return True


def _may_still_go(piece: Piece) -> bool:
    """Nobody writes to the run, and nothing was added: a program may have come and gone since it was looked at."""
    before = piece.facts
    manifest, problem = None, None
    try:
        manifest = store.read_manifest(before.folder)
    except SpoolError as error:
        problem = str(error)
    now = look(store.RunFolder(before.run_id, before.folder, manifest, problem), holds_lock=True)
    # What another start of the run has put there may be no writer yet.
    if now.alive or _attempts(now) != _attempts(before):
        return False
    return loss(now) == loss(before) if piece.whatever else _is_over(now)


def _attempts(facts: Facts) -> list[str]:
    return [attempt.key for attempt in facts.manifest.attempts] if facts.manifest is not None else []


def _tell(pieces: Sequence[Piece], found: Sequence[Facts], ids: dict[str, str], keep: Keep, *, dry_run: bool) -> None:
    rule = f"KEEP is {age(keep.max_age_s)}, {size(keep.max_bytes)}"
    total = sum(piece.bytes for piece in pieces)
    if pieces:
        verb = "Would delete" if dry_run else "Deleted"
        print(f"{verb} {size(total)} ({rule}):")
        rows = [
            [
                ids[piece.facts.run_id],
                plain(piece.facts.title, 40),
                count(len(piece.files), "delivered file") if piece.files else "the whole run, delivered everywhere",
                size(piece.bytes),
            ]
            for piece in pieces
        ]
        print(table(rows, indent="  ", right="lllr"))
    else:
        print(f"Nothing to delete ({rule}).")
    waiting = sum(facts.waits and not facts.alive for facts in found)
    if waiting:
        print(
            f"Kept: {count(waiting, 'run')} with something undelivered."
            " `tracelet ship` delivers it, `tracelet prune --undelivered RUN` deletes it."
        )
    refused = [(facts, piles) for facts in found if not facts.waits and (piles := piles_of(facts))]
    for facts, piles in refused[:5]:
        number = sum(pile.size for pile in piles)
        print(
            f"Kept: {ids[facts.run_id]}, of which {number:,} refused items stand only here."
            " `tracelet ship --dead-letters` sends them once more."
        )


# ---- what is not -------------------------------------------------------------------------------------------------


def _undelivered(spool: Path, args: argparse.Namespace) -> int:
    code = 0
    for wanted in args.undelivered:
        for entry in select(spool, wanted):
            if not _give_up(look(entry), args):
                code = 1
    return code


def _give_up(facts: Facts, args: argparse.Namespace) -> bool:
    """Delete one run with all it has, once a person has seen how much that is."""
    name = f"{facts.run_id} ({plain(facts.title)})"
    if facts.alive:
        print(
            f"{name} is being written by {count(len(facts.alive), 'process', 'processes')}: not deleted",
            file=sys.stderr,
        )
        return False
    if facts.shipper_pid is not None:
        print(f"{name} is being shipped by process {facts.shipper_pid}: stop it first; not deleted", file=sys.stderr)
        return False
    print(f"{name}, {size(_size(facts.folder))} in {facts.folder}:")
    print(f"  {loss(facts)}")
    if args.dry_run:
        print("  would be deleted")
        return True
    if not args.yes:
        if not sys.stdin.isatty():
            raise UsageError("there is no terminal to ask at: repeat it with --yes if all of this shall go for good")
        answer = input("Delete it for good? Type yes: ")
        if answer.strip().lower() != "yes":
            print("  not deleted")
            return False
    if not _delete(Piece(facts, (), 0, whatever=True)):
        print(f"{name}: a writer or a shipper has just begun with it, or added to it: not deleted", file=sys.stderr)
        return False
    print("  deleted")
    return True


def loss(facts: Facts) -> str:
    """What nobody would have any more, in words."""
    if facts.problem is not None:
        return f"what it holds can't be told ({facts.problem})"
    if not facts.destinations:
        return f"all {count(facts.logged, 'point')}, and its params, tags and artifacts, have been delivered nowhere"
    parts = [
        f"{count(d.waiting, 'point')} and {count(d.waiting_records, 'record')} not delivered to {d.kind} ({d.address})"
        for d in facts.destinations
        if d.waits
    ]
    if facts.refused:
        parts.append(f"{count(facts.refused, 'item')} refused by a destination")
    return "; ".join(parts) or "everything in it is delivered"
