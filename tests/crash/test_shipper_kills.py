"""Real shippers and real programs, killed: nothing is lost, nothing arrives twice in effect, and the end is told.

Pattern: a destination in a file that answers late; the shipper is killed between arrival and acknowledgement, or by
itself at a line of ours, one line after the other. Limit: two minutes a test; with TRACELET_SOAK=1 each line there is.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.crash import small_run
from tests.shipper_process import REPO, arrived, launch
from tests.shipping import until
from tracelet.spool import store
from tracelet.spool.lease import shipper_alive

SOAK = os.environ.get("TRACELET_SOAK") == "1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return store.make_folder(tmp_path / "run" / "host-boot")


@pytest.fixture
def processes(folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
    shipper = shipper_alive(folder)
    if shipper is not None:
        os.kill(shipper, signal.SIGKILL)


def train(
    folder: Path, file: Path, points: int, how: str, processes: list[subprocess.Popen[bytes]]
) -> subprocess.Popen[bytes]:
    process = launch("train", folder, file, points, how, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    processes.append(process)
    return process


def said(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


def in_effect(file: Path) -> list[dict[str, Any]]:
    """The batches by number; that each repeat was equal is checked here."""
    by_number: dict[int, dict[str, Any]] = {}
    for line in arrived(file):
        line.pop("pid")
        assert by_number.setdefault(line["number"], line) == line, "a repeat differs from the first"
    return [by_number[number] for number in sorted(by_number)]


def batches(file: Path) -> int:
    """How many batches have arrived, repeats too; quicker than reading them, so that a kill comes in mid-work."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


def values(file: Path, name: str | None = None) -> list[float]:
    return [v for line in in_effect(file) for _, n, v, _, _ in line["points"] if name is None or n == name]


def ends(file: Path) -> list[dict[str, Any]]:
    return [one for line in in_effect(file) for one in line["ends"]]


def test_shippers_killed_between_arrival_and_acknowledgement_lose_and_double_nothing(
    folder: Path, tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    file, chance = tmp_path / "store", random.Random(7)
    training = train(folder, file, 20_000, "off", processes)
    kills = 0
    until(lambda: any(folder.glob("*.lock")))
    while kills < 6:
        shipper = launch("ship", folder, file)
        processes.append(shipper)
        # A few more batches than there were, wherever that is in its work; on a busy machine it may be done by then.
        wanted = batches(file) + chance.randrange(2, 5)
        until(lambda shipper=shipper, wanted=wanted: batches(file) >= wanted or shipper.poll() is not None)
        if shipper.poll() is not None:
            break
        shipper.send_signal(signal.SIGKILL)
        shipper.wait()
        kills += 1
    assert kills > 0
    assert training.wait(30) == 0
    last = launch("ship", folder, file)
    processes.append(last)
    assert last.wait(30) == 0
    assert values(file) == [float(i) for i in range(20_000)]
    for metric in range(10):
        times = [t // 1_000_000 for b in in_effect(file) for _, n, _, _, t in b["points"] if n == f"m{metric}"]
        assert times == sorted(set(times))
    assert [one["status"] for one in ends(file)] == ["FINISHED"]


# A child for each line, as in tests/crash/test_kills.py.
LINES = """
import json, os, pathlib, shutil, sys, threading
import tracelet
from tests.crash import small_run
from tests.crash.lines import Lines
from tracelet.shipper import deadletter, process, reship, shipment
from tracelet.spool import store

home = pathlib.Path(sys.argv[3])
where = tuple(os.path.join(os.path.dirname(tracelet.__file__), part) for part in ("shipper", "spool"))
lines = Lines(where, every=int(sys.argv[1]), seed=int(sys.argv[2]))

def shipped(name, mortal):
    child = os.fork()
    if child == 0:
        if mortal:
            threading.settrace(lines.watch)
            sys.settrace(lines.watch)
        build = lambda *_: small_run.Server(home / f"{name}.store")
        code = process.main([str(home / name / "run" / "host")], build=build)
        sys.settrace(None)
        if not lines.last:
            (home / "lines.json").write_text(json.dumps(lines.met))
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

small_run.make(home / "made" / "run" / "host")
shutil.copytree(home / "made", home / "whole")
code = shipped("whole", True)
print(json.dumps({"name": "whole", "at": "", "codes": [code]}))
for number in lines.turns(json.loads((home / "lines.json").read_text())):
    name = f"at-{number}"
    shutil.copytree(home / "made", home / name)
    codes = [shipped(name, True), shipped(name, False)]
    print(json.dumps({"name": name, "at": lines.last, "time": lines.time, "codes": codes}), flush=True)
"""


def test_a_shipper_killed_at_any_line_loses_and_doubles_nothing_and_the_next_one_finishes(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    seed = time.time_ns()
    record_property("seed", seed)
    done = subprocess.run(
        [sys.executable, "-c", LINES, str(1 if SOAK else 24), str(seed), str(tmp_path)],
        cwd=REPO, capture_output=True, text=True, timeout=3600 if SOAK else 120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    killed = [json.loads(line) for line in done.stdout.splitlines()]
    record_property("shippers killed at a line", sum(-signal.SIGKILL in one["codes"] for one in killed))
    assert sum(-signal.SIGKILL in one["codes"] for one in killed) > 20
    for one in killed:
        assert one["codes"][-1] == 0, one
        assert set(one["codes"]) <= {0, -signal.SIGKILL}, one
        small_run.assert_shipped(tmp_path / one["name"] / "run" / "host", tmp_path / f"{one['name']}.store", one)


def test_a_killed_program_is_killed_at_once_with_every_point_that_was_logged(
    folder: Path, tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    file = tmp_path / "store"
    training = train(folder, file, 3000, "wait to be killed", processes)
    assert said(training) == b"3000\n"
    until(lambda: len(values(file)) == 3000)
    training.send_signal(signal.SIGKILL)
    (ended,) = until(lambda: ends(file), within_s=2.0)
    assert ended["status"] == "KILLED"
    assert values(file) == [float(i) for i in range(3000)]
    training.wait()
    until(lambda: shipper_alive(folder) is None)  # and the shipper has left
    manifest = store.read_manifest(folder)
    assert manifest is not None
    assert manifest.attempts[0].ended is not None
    assert manifest.attempts[0].ended["end_unix_nano"] == ended["end"]


def test_a_forked_child_that_lives_on_does_not_hide_its_parents_death(
    folder: Path, tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    file = tmp_path / "store"
    training = train(folder, file, 100, "wait with a child", processes)
    assert said(training) == b"100\n"
    _, child = said(training).split()
    try:
        training.send_signal(signal.SIGKILL)
        (ended,) = until(lambda: ends(file), within_s=15.0)  # the child may hold it open for ten seconds
        assert ended["status"] == "KILLED"
        assert values(file, "child") == [1.0]
    finally:
        os.kill(int(child), signal.SIGKILL)
    until(lambda: shipper_alive(folder) is None)


@pytest.mark.parametrize(("how", "status", "code"), [("exit 3", "FAILED", 3), ("exit 0", "FINISHED", 0)])
def test_the_exit_code_that_only_the_kernel_knows_decides_an_end_at_exit(
    folder: Path, tmp_path: Path, processes: list[subprocess.Popen[bytes]], how: str, status: str, code: int
) -> None:
    file = tmp_path / "store"
    # The END stands there, and the writer's lock is free, before the shipper has looked at either.
    training = train(folder, file, 30, how, processes)
    assert training.wait(30) == code
    until(lambda: ends(file))
    until(lambda: shipper_alive(folder) is None)
    manifest = store.read_manifest(folder)
    assert manifest is not None
    ended = manifest.attempts[0].ended
    assert ended is not None
    assert (ended["status"], ended["exit_code"]) == (status, code)
    assert [one["status"] for one in ends(file)] == [status]


def test_a_second_shipper_leaves_at_once(
    folder: Path, tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    file = tmp_path / "store"
    training = train(folder, file, 10, "wait to be killed", processes)
    said(training)
    first = until(lambda: shipper_alive(folder))
    second = launch("ship", folder, file)
    processes.append(second)
    assert second.wait(20) == 0
    assert shipper_alive(folder) == first
    assert {line["pid"] for line in arrived(file)} <= {first}


def test_sigterm_delivers_what_is_there_and_leaves_and_the_next_shipper_goes_on(
    folder: Path, tmp_path: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    file = tmp_path / "store"
    training = train(folder, file, 5000, "off", processes)
    assert said(training) == b"5000\n"
    assert training.wait(20) == 0
    shipper = launch("ship", folder, file)
    processes.append(shipper)
    until(lambda: arrived(file))
    shipper.send_signal(signal.SIGTERM)
    assert shipper.wait(20) == 0
    assert values(file) == [float(i) for i in range(5000)]
    assert [one["status"] for one in ends(file)] == ["FINISHED"]


def test_ctrl_c_does_not_stop_a_shipper(folder: Path, tmp_path: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    file = tmp_path / "store"
    training = train(folder, file, 10, "wait to be killed", processes)
    said(training)
    shipper = until(lambda: shipper_alive(folder))
    until(lambda: arrived(file))
    os.kill(shipper, signal.SIGINT)
    training.send_signal(signal.SIGKILL)
    training.wait()
    assert until(lambda: ends(file))
