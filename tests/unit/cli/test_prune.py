"""prune deletes what is delivered and old, and nothing else unless a person says so."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.made import FILE, MLFLOW, deliver, make_run
from tracelet.cli import prune
from tracelet.cli.facts import look
from tracelet.cli.main import main
from tracelet.settings import Keep
from tracelet.spool import store
from tracelet.spool.cursor import journal_name
from tracelet.spool.journal import line
from tracelet.spool.lease import ShipperLock
from tracelet.spool.store import list_runs

TRACELET = (sys.executable, "-m", "tracelet")


@pytest.fixture
def spool(clean_environment: Path) -> Path:
    return clean_environment


def aged(folder: Path, days: float) -> Path:
    """Make everything in a run's folder so old."""
    then = time.time() - days * 86400
    for path in folder.rglob("*"):
        os.utime(path, (then, then))
    return folder


def move_all(folder: Path) -> None:
    (folder / "delivered").mkdir()
    for path in folder.glob("*.points"):
        path.rename(folder / "delivered" / path.name)


def test_a_delivered_run_older_than_keep_goes_altogether(spool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = make_run(spool, "old"), make_run(spool, "new")
    deliver(old)
    deliver(new)
    aged(old, 8)
    assert main(["prune"]) == 0
    assert not old.parent.exists()
    assert new.exists()
    assert "old" in capsys.readouterr().out


@pytest.mark.parametrize("keep", ["0d", "0s,0B"])
def test_nothing_undelivered_goes_however_old(spool: Path, keep: str) -> None:
    waits, nowhere = make_run(spool, "waits"), make_run(spool, "nowhere", destinations=())
    no_end = make_run(spool, "no-end")
    deliver(no_end, done=False)
    for folder in (waits, nowhere, no_end):
        aged(folder, 1000)
    before = sorted(spool.rglob("*"))
    assert main(["prune", "--keep", keep]) == 0
    assert sorted(spool.rglob("*")) == before


def test_refused_items_that_stand_only_here_keep_their_run(spool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(spool)
    deliver(folder, refused=1)
    (folder / f"rejected-{FILE['id']}.jsonl").write_text('{"what": "point"}\n')
    assert main(["prune", "--keep", "0d"]) == 0
    assert folder.exists()
    assert "refused items stand only here" in capsys.readouterr().out


def name_another(folder: Path) -> None:
    """As `tracelet ship --to` does it."""

    def change(manifest: store.Manifest | None) -> store.Manifest:
        assert manifest is not None
        (attempt,) = manifest.attempts
        return manifest.with_attempt(replace(attempt, destinations=(*attempt.destinations, MLFLOW)))

    store.update_manifest(folder, change, make=False)


def start_again(folder: Path) -> None:
    """As a program does it that takes the run up, before it has written anything."""

    def change(manifest: store.Manifest | None) -> store.Manifest:
        assert manifest is not None
        return manifest.with_attempt(replace(manifest.attempts[0], key="f" * 16, ended=None))

    store.update_manifest(folder, change, make=False)


@pytest.mark.parametrize("what", [name_another, start_again])
def test_what_comes_between_the_plan_and_the_deletion_keeps_the_run(
    spool: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: Callable[[Path], None]
) -> None:
    folder = make_run(spool)
    deliver(folder)
    chosen = prune.plan

    def plan(*arguments: Any, **options: Any) -> list[prune.Piece]:
        pieces = chosen(*arguments, **options)
        what(folder)
        return pieces

    monkeypatch.setattr(prune, "plan", plan)
    assert main(["prune", "--keep", "0d"]) == 1
    assert "somebody has just begun with it" in capsys.readouterr().err
    assert folder.exists()


def test_who_holds_the_shippers_lock_does_not_lose_it_by_a_look(spool: Path) -> None:
    folder = make_run(spool)
    lock = ShipperLock(folder)
    assert lock.acquire()
    assert look(store.RunFolder(folder.parent.name, folder, store.read_manifest(folder)), holds_lock=True).alive == ()
    code = f"from tracelet.spool.lease import *; from pathlib import Path; print(shipper_alive(Path({str(folder)!r})))"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert asked.stdout.strip() == str(os.getpid())
    lock.release()


def test_delivered_files_beyond_the_size_go_oldest_first(spool: Path) -> None:
    folder = make_run(spool, points=1000, slots=100)
    deliver(folder, done=False)  # the end waits: the run itself stays
    move_all(folder)
    files = sorted((folder / "delivered").iterdir())
    for age, path in enumerate(reversed(files)):
        os.utime(path, (time.time() - age, time.time() - age))
    size = sum(path.stat().st_size for path in files[-3:])
    assert main(["prune", "--keep", f"7d,{size}B"]) == 0
    assert sorted((folder / "delivered").iterdir()) == files[-3:]


def test_a_dry_run_says_the_same_and_deletes_nothing(spool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = aged(make_run(spool), 10)
    deliver(folder)
    aged(folder, 10)
    assert main(["prune", "--dry-run"]) == 0
    would = capsys.readouterr().out
    assert folder.exists()
    assert main(["prune"]) == 0
    assert capsys.readouterr().out == would.replace("Would delete", "Deleted")
    assert not folder.exists()


def test_only_the_named_runs_are_looked_at(spool: Path) -> None:
    one, two = make_run(spool, "one"), make_run(spool, "two")
    deliver(one)
    deliver(two)
    assert main(["prune", "one", "--keep", "0d"]) == 0
    assert not one.exists()
    assert two.exists()


def test_undelivered_without_a_terminal_needs_yes(
    spool: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(spool, points=1234)
    with open(os.devnull) as nobody:
        monkeypatch.setattr("sys.stdin", nobody)
        assert main(["prune", "--undelivered", "aaaa"]) == 2
    assert folder.exists()
    told = capsys.readouterr()
    assert "1,234 points and 1 record not delivered to file" in told.out
    assert "--yes" in told.err
    assert main(["prune", "--undelivered", "aaaa", "--yes"]) == 0
    assert not folder.exists()


@pytest.mark.parametrize(("answer", "goes"), [("yes", True), ("y", False), ("", False), ("no", False)])
def test_at_a_terminal_only_yes_deletes(spool: Path, answer: str, goes: bool) -> None:
    folder = make_run(spool)
    at, terminal = os.openpty()
    try:
        asking = subprocess.Popen([*TRACELET, "prune", "--undelivered", "aaaa"], stdin=terminal, stdout=subprocess.PIPE)
        os.write(at, answer.encode() + b"\n")
        asking.communicate(timeout=30)
    finally:
        os.close(at)
        os.close(terminal)
    assert folder.exists() is not goes
    assert asking.returncode == (0 if goes else 1)


def test_a_run_that_is_being_shipped_is_not_deleted(spool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(spool)
    lock = ShipperLock(folder)
    assert lock.acquire()
    argv = [*TRACELET, "prune", "--undelivered", "aaaa", "--yes"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)  # locks are a process's: not from here
    lock.release()
    assert done.returncode == 1
    assert "is being shipped" in done.stderr
    assert folder.exists()


@pytest.mark.parametrize("argv", [["--keep", "soon"], ["--undelivered", "aaaa", "aaaa"]])
def test_what_can_not_be_meant_deletes_nothing(spool: Path, argv: list[str]) -> None:
    folder = make_run(spool)
    assert main(["prune", *argv, "--yes"]) != 0
    assert folder.exists()


def test_a_run_to_which_a_program_has_added_since_it_was_looked_at_is_not_deleted(spool: Path) -> None:
    folder = make_run(spool, "old")
    deliver(folder)
    aged(folder, 8)
    (piece,) = prune.plan([look(entry) for entry in list_runs(spool)], Keep(), now_s=time.time())
    make_run(spool, "old")  # once more, by a program that is over before anything is deleted
    assert not prune._delete(piece)
    assert folder.exists()


def test_a_run_whose_journal_is_of_another_release_goes_when_a_person_says_so(
    spool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(spool)
    (folder / journal_name(str(FILE["id"]))).write_bytes(line("journal", {"format": 99, "destination": FILE["id"]}))
    assert main(["prune", "--undelivered", "aaaa", "--yes"]) == 0
    assert "what it holds can't be told" in capsys.readouterr().out
    assert not folder.exists()
