"""A disk or a quota that fills up under a whole run: training goes on, the loss is counted, and the run ends as it did.

Pattern: a real program on a small file system (tmpfs, ext2) that is filled to the last byte at a moment of the run,
with a real shipper and a file elsewhere as the destination; or a real shipper whose disk is filled at one line of ours
after the other. Then room again, and everything that was taken arrives. Limit: 60 s a program, two minutes for all
lines; the file some 50 s. TRACELET_SOAK=1: each line there is.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.crash import small_run
from tests.crash.disks import ext, tmpfs
from tests.shipper_process import arrived
from tests.shipping import until
from tests.sinks import HttpSink, Say
from tests.spooled import folder_of
from tracelet.shipper.process import ship
from tracelet.spool.disk import allocate
from tracelet.spool.lease import shipper_alive
from tracelet.spool.store import read_manifest, usage

SOAK = os.environ.get("TRACELET_SOAK") == "1"

PROGRAM = """
import json, os, pathlib, sys
import tracelet
from tests.crash.disks import fill
out, ballast, moment, mark = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3], sys.argv[4]
step = 0

def log(count):
    global step
    for _ in range(count):
        step += 1
        exp.log_metric("loss", float(step), iteration=step)

def at(now):
    if moment == now:
        fill(ballast)

exp = tracelet.start_logging(exp_name="full", project="p", backend=tracelet.File(str(out)))
at("at once")
log(1000)
at("before a name")
exp.log_metric("accuracy", 0.5, iteration=step)
exp.log_params({"lr": 0.1})
at("in a segment")
log(20_000)
at("before a roll")
log(20_000)
at("before params")
exp.log_params({"more": "x" * 3000})
log(60_000)
at("before stop")
if mark == "raise":
    counts = exp.stats
    print(json.dumps([step, counts.logged, counts.refused, exp._run.refused_records]), flush=True)
    raise ValueError("x" * 20_000)
exp.stop()
counts = exp.stats
print(json.dumps([step, counts.logged, counts.refused, exp._run.refused_records]))
"""
MOMENTS = ["at once", "before a name", "in a segment", "before a roll", "before params", "before stop"]


def run(
    tmp_path: Path, spool: Path, moment: str, *, mark: str = "", prefix: tuple[str, ...] = (), **more: str
) -> tuple[list[int], str]:
    """Run the program; what it counted, and what it said."""
    environ = {**os.environ, "TRACELET_DIR": str(spool), "PYTHONPATH": os.getcwd(), **more}
    words = [*prefix, sys.executable, "-c", PROGRAM, tmp_path / "out.jsonl", spool.parent / "ballast", moment, mark]
    done = subprocess.run(
        [str(word) for word in words],
        env=environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == (1 if mark == "raise" else 0), done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def delivered(out: Path) -> list[tuple[str, int]]:
    """Name and iteration of every point in the destination, in order of arrival."""
    found = []
    for line in out.read_text().splitlines():
        for resource in json.loads(line).get("resourceMetrics", ()):
            for scope in resource["scopeMetrics"]:
                for metric in scope["metrics"] if scope["scope"]["name"] == "tracelet" else ():
                    for point in metric["gauge"]["dataPoints"]:
                        given = {a["key"]: a["value"] for a in point.get("attributes", ())}
                        if "tracelet.iteration" in given:
                            found.append((metric["name"], int(given["tracelet.iteration"]["intValue"])))
    return found


def settled(spool: Path) -> dict[str, Any]:
    """How the run ended, once its shipper has delivered it and left; one that found no room was there too early."""
    folder = folder_of(spool)
    until(lambda: shipper_alive(folder) is None, 40)
    assert ship(folder, follow=True, timeout_s=30).complete
    manifest = read_manifest(folder)
    assert manifest is not None
    (attempt,) = manifest.attempts
    assert attempt.ended is not None
    return dict(attempt.ended)


def check(tmp_path: Path, counted: list[int], said: str) -> None:
    """Every point is either delivered, once, or counted as refused; and somebody was told."""
    steps, logged, refused, records = counted
    assert logged + refused - records == steps + 1  # `refused` counts both
    found = delivered(tmp_path / "out.jsonl")
    assert len(found) == logged
    assert len(set(found)) == logged
    iterations = [iteration for name, iteration in found if name == "loss"]
    assert iterations == sorted(iterations)
    assert "could not write the end" not in said  # its frame may fit where its slot does not, and be found
    if refused:
        assert "points are not recorded" in said
    if records:
        assert "a record (ParamsLogged) is lost" in said
    assert "Traceback" not in said.replace('Traceback (most recent call last):\n  File "<string>"', "")


@pytest.fixture(params=["tmpfs", "ext2"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """8 MB where files are mapped, and where they are appended because there is no fallocate."""
    made: AbstractContextManager[Path]
    made = tmpfs(tmp_path / "disk", "8m") if request.param == "tmpfs" else ext(tmp_path / "disk", "ext2", 8)
    with made as at:
        assert allocates(at) == (request.param == "tmpfs"), "or it is no test of what it says"
        yield at


def allocates(at: Path) -> bool:
    """Whether the kernel gives a file room there by fallocate(2)."""
    with (at / "probe").open("wb") as file:
        try:
            allocate(file.fileno(), 4096)
        except OSError as error:
            assert error.errno == errno.EOPNOTSUPP  # noqa: PT017
            return False
        finally:
            (at / "probe").unlink()
    return True


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_disk_that_is_full_at_any_moment_costs_only_what_is_counted(tmp_path: Path, disk: Path, moment: str) -> None:
    counted, said = run(tmp_path, disk / "spool", moment)
    if moment in MOMENTS[:4]:
        assert counted[2] > 0
    (disk / "ballast").unlink()
    ended = settled(disk / "spool")
    assert (ended["status"], ended["seen_by"]) == ("FINISHED", "stop")  # its own word, and no guess by its exit code
    check(tmp_path, counted, said)


# A child for each line, as in tests/crash/test_shipper_kills.py. Its disk fills up at the line, and has room again once
# it has said that there is none: whoever needs none at that line or later is through without it.
LINES = """
import json, logging, os, pathlib, shutil, sys, threading
from tests.crash import small_run
from tests.crash.disks import fill
from tests.crash.lines import Lines
from tracelet.shipper import deadletter, loop, process, upkeep
from tracelet.spool import cursor, files, frames, journal, keep, pages, seal, store
cursor._COMPACT_AT = 600
cursor._COMPACT_RATIO = 1

home, disk = pathlib.Path(sys.argv[3]), pathlib.Path(sys.argv[4])
ballast = disk / "ballast"
modules = (cursor, deadletter, files, frames, journal, keep, loop, pages, seal, store, upkeep)
where = tuple(module.__file__ for module in modules)
lines = Lines(where, every=int(sys.argv[1]), seed=int(sys.argv[2]), fault=lambda: fill(ballast))

class Room(logging.Handler):
    met = 0

    def emit(self, record):
        if "No space left" in record.getMessage():
            self.met += 1
            ballast.unlink(missing_ok=True)

def shipped(name):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        room = Room()
        logging.getLogger("tracelet").addHandler(room)
        threading.settrace(lines.watch)
        sys.settrace(lines.watch)
        outcome = process.ship(
            disk / name / "run" / "host", follow=True, timeout_s=40,
            build=lambda *_: small_run.Server(home / f"{name}.store"),
        )
        sys.settrace(None)
        if not lines.last:
            (home / "lines.json").write_text(json.dumps(lines.met))
        os.write(writing, json.dumps({"complete": outcome.complete, "met": room.met}).encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as told:
        said = json.loads(told.read() or "{}")
    return said | {"code": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}

small_run.make(home / "made" / "run" / "host")
shutil.copytree(home / "made", disk / "whole")
print(json.dumps({"name": "whole", "at": ""} | shipped("whole")))
for number in lines.turns(json.loads((home / "lines.json").read_text())):
    name = f"at-{number}"
    shutil.copytree(home / "made", disk / name)
    print(json.dumps({"name": name, "at": lines.last, "time": lines.time} | shipped(name)), flush=True)
    ballast.unlink(missing_ok=True)
    shutil.move(disk / name, home / name)
"""


def test_a_disk_that_fills_up_at_any_line_of_the_shipper_delays_it_and_nothing_is_lost_or_sent_twice(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    seed = time.time_ns()
    record_property("seed", seed)
    # Not under test for the guard: that a disk is full is an error of others, which is counted and said.
    environ = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    with tmpfs(tmp_path / "disk", "4m") as disk:
        done = subprocess.run(
            [sys.executable, "-c", LINES, str(1 if SOAK else 24), str(seed), str(tmp_path), str(disk)],
            env=environ | {"PYTHONPATH": os.getcwd()}, capture_output=True, text=True,
            timeout=7200 if SOAK else 120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        shutil.move(disk / "whole", tmp_path / "whole")
    shipped = [json.loads(line) for line in done.stdout.splitlines()]
    record_property("disks filled at a line", len(shipped) - 1)
    assert len(shipped) > 20
    assert any(one["met"] for one in shipped), "not one of them needed room"
    for one in shipped:
        assert (one["code"], one["complete"]) == (0, True), (one, done.stderr)
        small_run.assert_shipped(tmp_path / one["name"] / "run" / "host", tmp_path / f"{one['name']}.store", one)
        numbers = [line["number"] for line in arrived(tmp_path / f"{one['name']}.store")]
        assert len(numbers) == len(set(numbers)), (one, "a full disk is no reason to send anything twice")


def test_a_failure_on_a_full_disk_keeps_its_status_if_not_all_of_its_traceback(tmp_path: Path, disk: Path) -> None:
    run(tmp_path, disk / "spool", "before stop", mark="raise")
    (disk / "ballast").unlink()
    ended = settled(disk / "spool")
    assert (ended["status"], ended["error"]["type"]) == ("FAILED", "ValueError")
    assert ended["error"]["message"].startswith("xxx")


def test_a_run_at_its_quota_ends_as_it_did(tmp_path: Path, clean_environment: Path) -> None:
    counted, said = run(tmp_path, clean_environment, "never", TRACELET_MAX_BYTES="1100kB")
    assert counted[2] > 0
    ended = settled(clean_environment)
    assert (ended["status"], ended["seen_by"]) == ("FINISHED", "stop")
    check(tmp_path, counted, said)
    assert usage(folder_of(clean_environment)) < 1_200_000


QUOTA = """
import json, sys, time
import tracelet
from tracelet.spool import store
limit = int(sys.argv[2])
exp = tracelet.start_logging(exp_name="quota", project="p", backend=tracelet.OTLP(sys.argv[1]), max_bytes=limit)
most = step = 0
for _ in range(40_000):
    step += 1
    exp.log_metric("loss", float(step), iteration=step)
assert exp.flush(20)  # a run that gets on is the one that spare segments are made for
until = time.monotonic() + 20
while (exp.stats.refused < 100_000 or step < 800_000) and time.monotonic() < until:
    for _ in range(20_000):
        step += 1
        exp.log_metric("loss", float(step), iteration=step)
    most = max(most, store.usage(exp._run.folder))
    time.sleep(0.1)  # a shipper makes a spare segment a second at most: it has to have the time for several
exp.stop(timeout=0)
counts = exp.stats
print(json.dumps([step, counts.logged, counts.refused, most]))
"""


def test_a_quota_is_kept_while_a_shipper_makes_segments_ahead(
    tmp_path: Path, clean_environment: Path, otlp_sink: HttpSink
) -> None:
    otlp_sink.rule = lambda _: (
        Say(status=503) if len(otlp_sink.stored) > 2 and len(otlp_sink.points()) > 39_999 else None
    )
    limit = 8_000_000
    command = [sys.executable, "-c", QUOTA, otlp_sink.url, str(limit)]
    environ = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    step, logged, refused, most = json.loads(done.stdout)
    assert most <= limit + 100_000  # the shipper's own files: a journal, a log
    assert refused > 0
    assert logged + refused == step
    otlp_sink.rule = lambda _: None
    folder = folder_of(clean_environment)
    until(lambda: shipper_alive(folder) is None, 40)
    taken = [point.iteration for point in otlp_sink.points()]
    assert taken == sorted(set(taken))
    assert len(taken) == logged
