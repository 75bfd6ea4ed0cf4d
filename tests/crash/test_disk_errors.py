"""Disks that fail: writes that the disk refuses when they are flushed, a disk that is torn out, pages it can't read.

Pattern: real programs on file systems over an image that has no room where it lies, is shut down under them, or is cut
short under them. Limit: a minute a program; the file some 40 s.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.crash.disks import Disk, after_a_reboot, disk, fill, overlay, program, tmpfs
from tests.crash.test_kills import points_of
from tests.programs import finished, said, started
from tests.spooled import folder_of
from tracelet.shipper.process import ship
from tracelet.spool import pages
from tracelet.spool.store import MANIFEST

TRAINING = """
import json, sys, time, tracelet
exp = tracelet.start_logging(exp_name="errors", project="p", backend=tracelet.File(sys.argv[1]), run_id="errors",
                             shipper=sys.argv[2])
exp.log_params({"lr": 0.1})
for i in range(1000):
    exp.log_metric("loss", i, iteration=i)
failed = []

def flush(timeout):
    try:
        print(exp.flush(timeout), file=sys.stderr)
    except tracelet.SpoolError as error:
        failed.append(str(error))

flush(0)
print("ready", flush=True)
sys.stdin.readline()
for i in range(1000, 41_000):  # through to another segment
    exp.log_metric("loss", i, iteration=i)
flush(0)
flush(0)
exp.log_params({"late": 1})
exp.stop()
print(json.dumps([exp.stats.logged, exp.stats.refused - exp._run.refused_records, failed]), flush=True)
"""


def trained(tmp_path: Path, spool: Path, fault: object) -> tuple[int, int, list[str]]:
    """What the program counted, and what its flushes said, when this happened to its disk after the first of them."""
    with started(tmp_path, TRAINING, tmp_path / "out.jsonl", "off", TRACELET_DIR=str(spool)) as training:
        assert said(training) == "ready"
        assert callable(fault)
        fault()
        assert training.stdin is not None
        training.stdin.write("go\n")
        training.stdin.flush()
        logged, refused, failed = json.loads(said(training))
        assert training.wait(60) == 0
    return logged, refused, failed


@pytest.mark.parametrize(("kind", "room"), [("ext4", "60m"), ("xfs", "200m"), ("btrfs", "200m")])
def test_a_disk_that_refuses_only_what_is_flushed_is_told_by_every_flush_from_then_on(
    tmp_path: Path, kind: str, room: str
) -> None:
    with tmpfs(tmp_path / "backing", room) as backing:
        image = backing / "image"
        with disk(tmp_path / "disk", kind, megabytes=400, image=image) as there:
            logged, refused, failed = trained(tmp_path, there.at / "spool", lambda: fill(backing / "ballast"))
            assert len(failed) == 2, failed
            assert all("could not be flushed to the disk" in one for one in failed), failed
            assert logged + refused >= 41_000


def test_a_disk_torn_out_under_training_raises_nothing_but_from_flush(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "ext4") as there:
        logged, refused, failed = trained(tmp_path, there.at / "spool", there.lose_power)
        assert len(failed) == 2, failed
        assert logged + refused == 41_000
        there.restart()
        delivered(tmp_path, there, 1000)


def test_an_xfs_that_shuts_itself_down_may_end_training_by_a_signal_but_keeps_what_was_flushed(tmp_path: Path) -> None:
    """Not mended: a store into a mapped page that the file system won't have is a SIGBUS, with nobody asked before."""
    with disk(tmp_path / "disk", "xfs") as there:
        with started(
            tmp_path, TRAINING, tmp_path / "out.jsonl", "off", TRACELET_DIR=str(there.at / "spool")
        ) as training:
            assert said(training) == "ready"
            there.lose_power()
            assert training.stdin is not None
            training.stdin.write("go\n")
            training.stdin.flush()
            assert training.wait(60) in (-signal.SIGBUS, 0)
        there.restart()
        delivered(tmp_path, there, 1000)


def delivered(tmp_path: Path, there: Disk, flushed: int) -> None:
    """What was flushed arrives after the next start, once."""
    done = after_a_reboot(tmp_path, "ship", "--dir", str(there.at / "spool"))
    assert done.returncode == 0, done.stdout + done.stderr
    points = points_of(tmp_path / "out.jsonl")["errors"]
    assert set(range(flushed)) <= points.keys()
    assert set(points.values()) == {1}


WHOLE = """
import sys, tracelet
exp = tracelet.start_logging(exp_name="pages", project="p", backend=tracelet.File(sys.argv[1]), run_id="pages",
                             shipper="off")
for i in range(70_000):
    exp.log_metric(f"m{i % 5}", i, iteration=i)
exp.set_tags({"late": "1" * 9000})
exp.stop()
"""


@pytest.mark.parametrize("bad", ["000002.points", "000001.frames", MANIFEST])
def test_pages_that_can_not_be_read_cost_what_stood_on_them_and_are_told(
    tmp_path: Path, clean_environment: Path, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    file = tmp_path / "out.jsonl"
    assert finished(tmp_path, WHOLE, file).returncode == 0
    monkeypatch.setattr(pages, "PATIENCE_S", 0.5)
    monkeypatch.setattr("tracelet.guard.guard.strict", False)
    source = folder_of(clean_environment)
    (victim,) = (path for path in source.iterdir() if path.name.endswith(bad))
    with disk(tmp_path / "lower", "ext4") as there:
        place = Path("spool") / "pages" / source.name
        (there.at / place).mkdir(parents=True)
        shutil.copy(victim, there.at / place)
        there.restart()  # nothing of it is in memory now
        cut(there, there.at / place / victim.name)
        with overlay(tmp_path / "both", lower=there.at) as both:  # all else, and what is written, lies on a whole disk
            folder = both / place
            shutil.copytree(source, folder, ignore=shutil.ignore_patterns(victim.name), dirs_exist_ok=True)
            assert ship(folder, follow=True, timeout_s=60).complete
            dead = [
                json.loads(line) for path in folder.glob("rejected-*.jsonl") for line in path.read_text().splitlines()
            ]
    points = points_of(file)["pages"]
    assert set(points.values()) == {1}
    if bad == MANIFEST:
        assert points == Counter(range(70_000))
    elif bad.endswith("points"):
        assert {line["what"] for line in dead} == {"damage"}
        assert "the disk can't read it" in json.dumps(dead)
        stretches = [re.findall(r"first=(\d+), end=(\d+)", line["reason"])[0] for line in dead]
        lost = sum(int(end) - int(first) for first, end in stretches)
        assert 0 < lost < 40_000
        assert len(points) + lost >= 70_000  # frames stood there too
        assert set(range(30_000)) <= points.keys()  # a segment before it, and the first half of this one
    else:
        assert points == Counter(range(70_000))
        assert {line["what"] for line in dead} <= {"damage", "frame"}


def cut(there: Disk, path: Path) -> None:
    """Cut the disk off in the middle of a file."""
    told = subprocess.run([program("filefrag"), "-v", "-b4096", str(path)], capture_output=True, text=True, check=True)
    ((_, first, last, physical, *_),) = [
        line.replace(".", " ").replace(":", " ").split()
        for line in told.stdout.splitlines()
        if line[:4].strip().isdigit()
    ]
    os.truncate(there.image, 4096 * (int(physical) + (int(last) + 1 - int(first)) // 2))
