"""Which earlier runs wait: those with something left, a destination, and nobody at work; and what the look costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tracelet.core import waiting
from tracelet.spool import home, store

OTLP = {"id": "otlp-1", "kind": "otlp", "spec": {}}
CONSOLE = {"id": "console-1", "kind": "console", "spec": {}, "in_process": True}


def run_in(spool: Path, run_id: str, *destinations: dict[str, Any], segment: bool = True, old: bool = True) -> Path:
    """A run's folder, an hour old unless told otherwise."""
    folder = spool / run_id / "host-1"
    attempt = store.Attempt("a" * 16, 1, 1, 0, destinations)
    manifest = store.Manifest(run_id, "project", "experiment", "run", attempts=(attempt,))
    store.update_manifest(folder, lambda _: manifest)
    if segment:
        (folder / f"{'0' * 16}-000001.points").touch()
    if old:
        age(folder / store.MANIFEST)
    return folder


def age(path: Path) -> None:
    at = os.stat(path).st_mtime - 3600
    os.utime(path, (at, at))


def test_a_run_with_a_segment_left_and_a_destination_waits(tmp_path: Path) -> None:
    run_in(tmp_path, "waits", OTLP)
    run_in(tmp_path, "delivered", OTLP, segment=False)
    run_in(tmp_path, "only kept")
    run_in(tmp_path, "console", CONSOLE)
    run_in(tmp_path, "starts now", OTLP, old=False)
    run_in(tmp_path, "mine", OTLP)
    (tmp_path / "a file").touch()
    assert list(waiting.earlier_runs(tmp_path, "mine")) == ["waits"]


def test_a_run_whose_shipper_is_at_work_does_not_wait_and_one_whose_shipper_died_does(tmp_path: Path) -> None:
    folder = run_in(tmp_path, "served", OTLP)
    home.Beat(folder).renew()
    assert list(waiting.earlier_runs(tmp_path, "mine")) == []
    age(folder / home.LEASE)
    assert list(waiting.earlier_runs(tmp_path, "mine")) == ["served"]


@pytest.mark.parametrize("content", ["{", '{"format": 99}', "[]"])
def test_a_manifest_that_makes_no_sense_is_no_matter_of_a_start(content: str, tmp_path: Path) -> None:
    folder = run_in(tmp_path, "damaged", OTLP)
    (folder / store.COPY).unlink()
    (folder / store.MANIFEST).write_text(content)
    age(folder / store.MANIFEST)
    assert list(waiting.earlier_runs(tmp_path, "mine")) == []
    assert list(waiting.earlier_runs(tmp_path / "not there", "mine")) == []


def test_of_many_runs_the_newest_are_looked_into_and_only_manifests_are_opened(tmp_path: Path) -> None:
    spool = tmp_path / "many"
    for number in range(waiting.NEWEST * 3):
        folder = run_in(spool, f"run-{number:03d}", OTLP)
        for segment in range(2, 12):
            (folder / f"{'0' * 16}-{segment:06d}.points").touch()
        os.utime(spool / f"run-{number:03d}", (number, number))
    code = f"""
import json, sys
from pathlib import Path
from tracelet.core import waiting
opened, looked = [], []
def audit(event, args):
    if event == "open":
        opened.append(str(args[0]))
    elif event == "os.scandir":
        looked.append(str(args[0]))
sys.addaudithook(audit)
found = list(waiting.earlier_runs(Path({str(spool)!r}), "mine"))
print(json.dumps([found, [one for one in opened if {str(spool)!r} in one], len(looked)]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    found, opened, looked = json.loads(done.stdout)
    newest = range(waiting.NEWEST * 3 - 1, waiting.NEWEST * 2 - 1, -1)
    assert found == [f"run-{number:03d}" for number in newest]
    assert sorted(opened) == sorted(str(spool / one / "host-1" / store.MANIFEST) for one in found)
    assert looked == 1 + 2 * waiting.NEWEST
