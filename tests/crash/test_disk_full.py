"""A disk or a quota that fills up under a whole run: training goes on, the loss is counted, and the run ends as it did.

Pattern: a real program on a small file system (tmpfs, ext2) that is filled to the last byte at a moment of the run,
with a real shipper and a file elsewhere as the destination; then room again, and everything that was taken arrives.
Limit: 60 s a program; the file some 40 s.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.crash.disks import ext, tmpfs
from tests.shipping import until
from tests.sinks import HttpSink, Say
from tests.spooled import folder_of
from tracelet.shipper.process import ship
from tracelet.spool.lease import shipper_alive
from tracelet.spool.store import read_manifest, usage

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
        yield at


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_disk_that_is_full_at_any_moment_costs_only_what_is_counted(tmp_path: Path, disk: Path, moment: str) -> None:
    counted, said = run(tmp_path, disk / "spool", moment)
    if moment in MOMENTS[:4]:
        assert counted[2] > 0
    (disk / "ballast").unlink()
    ended = settled(disk / "spool")
    assert (ended["status"], ended["seen_by"]) == ("FINISHED", "stop")  # its own word, and no guess by its exit code
    check(tmp_path, counted, said)


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
