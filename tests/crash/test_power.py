"""The loss of power: what `flush()` had brought to the disk is delivered after the next start of the machine, once.

Pattern: a real program, or a real shipper, on a file system of its own, which is shut down without a last word, at one
line of ours after the other or at a moment from outside; the process is killed, what the disk has is mounted anew (its
journal is replayed), and `tracelet ship` is typed as after another boot. What a disk says is flushed counts as flushed:
a disk that lies about it can't be made here. Limit: a minute a program; the file some 40 s. TRACELET_SOAK=1: some 400
moments instead of 30.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.crash.disks import Disk, after_a_reboot, disk
from tests.crash.test_kills import points_of
from tests.programs import started, written
from tests.sinks import HttpSink
from tests.spooled import folder_of
from tracelet.records import ArtifactLogged
from tracelet.shipper.roster import frames_of
from tracelet.spool.reader import SpoolReader
from tracelet.spool.store import read_manifest

SOAK = os.environ.get("TRACELET_SOAK") == "1"

TRAINING = """
import os, sys, tracelet
exp = tracelet.start_logging(exp_name="power", project="p", backend=tracelet.File(sys.argv[1]), run_id="power",
                             shipper="off")
exp.log_params({"lr": 0.1})
exp.log_artifact(sys.argv[2])
for i in range(100_000):  # some segments, each of them left behind full
    exp.log_metric("loss", i, iteration=i)
exp.flush(0)
print(i + 1, flush=True)
while True:
    i += 1
    exp.log_metric("loss", i, iteration=i)
    if i % 100 == 0:
        exp.set_tags({"at": str(i)})
"""


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_what_was_flushed_outlives_a_loss_of_power(tmp_path: Path, kind: str) -> None:
    model, file = tmp_path / "model.bin", tmp_path / "out.jsonl"
    model.write_bytes(random.Random(7).randbytes(300_000))
    with disk(tmp_path / "disk", kind) as there:
        spool = there.at / "spool"
        with started(tmp_path, TRAINING, file, model, TRACELET_DIR=str(spool)) as program:
            assert program.stdout is not None
            flushed = int(program.stdout.readline())
            there.lose_power()
            program.send_signal(signal.SIGKILL)
            program.wait(30)
        there.restart()
        folder = folder_of(spool)
        (artifact,) = [one for one in records(folder) if isinstance(one, ArtifactLogged)]
        assert artifact.stored is not None
        assert hashlib.sha256((folder / artifact.stored).read_bytes()).hexdigest() == artifact.sha256
        done = after_a_reboot(tmp_path, "ship", "--dir", str(spool))
        assert done.returncode == 0, done.stdout + done.stderr
        assert end_of(folder) == "KILLED"
    points = points_of(file)["power"]
    assert set(range(flushed)) <= points.keys()
    assert set(points.values()) == {1}
    assert '"tracelet.param.lr"' in file.read_text()


def records(folder: Path) -> Iterator[Any]:
    reader = SpoolReader(folder)
    for writer in reader.writers():
        yield from frames_of(reader, writer)
    reader.close()


def end_of(folder: Path) -> str | None:
    manifest = read_manifest(folder)
    assert manifest is not None
    (attempt,) = manifest.attempts
    return None if attempt.ended is None else attempt.ended["status"]


# A child for each moment, warm from its parent. At one line of ours it takes the power from its disk, and dies.
MOMENTS = """
import fcntl, json, os, signal, struct, sys, threading
import tracelet
from tracelet.core import artifacts, claim, delivery, experiment, run, values
from tracelet.exporters import registry, file, otlp, otlp_http
from tracelet.shipper import deadletter, loop, process, shipment, upkeep
from tracelet.spool import cursor, files, journal, writer
writer.Writer.__init__.__kwdefaults__["slots_per_segment"] = 64  # rolls come soon
cursor._COMPACT_AT = 600
cursor._COMPACT_RATIO = 1

def go_dark(disk):
    fcntl.ioctl(os.open(disk, os.O_RDONLY), 0x8004587D, struct.pack("I", 2))
    os.kill(os.getpid(), signal.SIGKILL)

def watch(frame, event, arg):
    global left
    if not frame.f_code.co_filename.startswith(where):
        return None
    if event == "line":
        left -= 1
        if left == 0:
            go_dark(disk)
    return watch

def train(told):
    exp = tracelet.start_logging(exp_name="moments", project="p", backend=tracelet.File(out), run_id=f"run-{at}",
                                 shipper="off", tags={"a": "b"})
    for i in range(150):
        exp.log_metric(f"m{i % 7}", i, iteration=i)
        os.write(told, b".")
        if i % 40 == 39:
            exp.flush(0)
            os.write(told, b"f")
    exp.log_params({"late": 1})
    tracelet.stop_logging()
    os.write(told, b"e")

def ship(told):
    process.ship(next(__import__("pathlib").Path(disk, "spool").glob("*/*")), follow=True, timeout_s=40)
    os.write(told, b"e")

package = os.path.dirname(tracelet.__file__)
for line in sys.stdin:
    what, at, disk, out = json.loads(line)
    os.environ["TRACELET_DIR"] = os.path.join(disk, "spool")
    if what == "train":
        where, act = package, train
    else:
        where, act = tuple(module.__file__ for module in (cursor, loop, deadletter, upkeep, file, shipment)), ship
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        left = at
        os.close(reading)
        threading.settrace(watch)
        sys.settrace(watch)
        act(writing)
        os._exit(0)
    os.close(writing)
    told = b""
    while piece := os.read(reading, 4096):
        told += piece
    os.close(reading)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([told.decode(), code]), flush=True)
"""


class Moments:
    """The parent of those who lose their power, asked for one after the other."""

    def __init__(self, folder: Path) -> None:
        self.lost = 0  # how often the power was taken before the program had ended
        # Not under test for the guard: between the power's loss and the death other threads meet errors.
        environ = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        self._program = subprocess.Popen(
            [sys.executable, str(written(folder, MOMENTS))], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**environ, "PYTHONPATH": os.getcwd()},
        )  # fmt: skip

    def __enter__(self) -> Moments:
        return self

    def __exit__(self, *error: object) -> None:
        self._program.kill()
        self._program.communicate()

    def lived(self, what: str, at: int, there: Disk, out: object) -> str:
        """What one told before the lights went out at its line `at`, or until its end."""
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        self._program.stdin.write(json.dumps([what, at, str(there.at), str(out)]) + "\n")
        self._program.stdin.flush()
        told, code = json.loads(self._program.stdout.readline())
        assert code in (0, -signal.SIGKILL), code  # 0 also where one thread leaves while another takes the power
        self.lost += code != 0
        return str(told)


def spread(lines: int, count: int) -> list[int]:
    """So many lines of them, no two runs of the tests the same."""
    step = lines / count
    chance = random.Random(time.time_ns())
    return [max(1, int(i * step + chance.random() * step)) for i in range(count)]


def test_power_lost_at_any_line_of_start_roll_over_flush_or_stop_costs_nothing_that_was_flushed(
    tmp_path: Path, clean_environment: Path, record_property: Callable[[str, object], None]
) -> None:
    file = tmp_path / "out.jsonl"
    lines: dict[str, str] = {}
    with Moments(tmp_path) as moments:
        for at in spread(9_000, 200 if SOAK else 16):
            with disk(tmp_path / "disk", "ext4", megabytes=16) as there:
                lines[f"run-{at}"] = moments.lived("train", at, there, file)
                there.restart()
                if (there.at / "spool").exists():
                    shutil.copytree(there.at / "spool", clean_environment, dirs_exist_ok=True)
    record_property("losses of power", moments.lost)
    assert moments.lost
    assert any("f" in told for told in lines.values())
    done = after_a_reboot(tmp_path, "ship", "--dir", str(clean_environment))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    found = points_of(file)
    for run_id, told in lines.items():
        points = found.get(run_id, Counter())
        flushed = told.rpartition("f")[0].count(".")
        assert set(range(flushed)) <= points.keys(), (run_id, told)
        assert set(points.values()) <= {1}, (run_id, told)
        if flushed:
            assert end_of(folder_of(clean_environment, run_id)) in (
                {"FINISHED"} if "e" in told else {"FINISHED", "KILLED"}
            )


LOGGED = """
import sys, tracelet
exp = tracelet.start_logging(exp_name="shipped", project="p", backend={backend}, run_id="shipped", shipper="off")
exp.log_params({{"lr": 0.1}})
for i in range(3000):
    exp.log_metric(f"m{{i % 3}}", i, iteration=i)
exp.log_artifact(sys.argv[1])
exp.flush(0)
tracelet.stop_logging()
"""


def logged(tmp_path: Path, backend: str) -> None:
    model = tmp_path / "model.bin"
    model.write_bytes(b"weights" * 1000)
    done = subprocess.run(
        [sys.executable, "-c", LOGGED.format(backend=backend), str(model)],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def lived_through(tmp_path: Path, spool: Path, moments: Moments, at: int) -> None:
    """Ship a copy of the spool from a disk that loses power at a line of the shipper, and once more after a boot."""
    with disk(tmp_path / "disk", "ext4", megabytes=16) as there:
        shutil.copytree(spool, there.at / "spool")
        subprocess.run(["sync", "-f", str(there.at)], check=True)
        moments.lived("ship", at, there, "")
        there.restart()
        done = after_a_reboot(tmp_path, "ship", "--dir", str(there.at / "spool"))
        assert done.returncode == 0, (at, done.stdout + done.stderr)
        assert "Traceback" not in done.stderr
        folder = folder_of(there.at / "spool")
        assert end_of(folder) == "FINISHED"
        lost = [line for path in folder.glob("rejected-*.jsonl") for line in path.read_text().splitlines()]
        assert not [line for line in lost if json.loads(line)["what"] != "point"], (at, lost)
        assert len(lost) == len({json.dumps(json.loads(line)["facts"]) for line in lost}), (at, lost)


def test_a_shipper_that_loses_power_at_any_line_writes_no_line_of_a_file_twice(
    tmp_path: Path, clean_environment: Path, record_property: Callable[[str, object], None]
) -> None:
    file = tmp_path / "out.jsonl"
    logged(tmp_path, f"tracelet.File({str(file)!r})")
    with Moments(tmp_path) as moments:
        for at in spread(1_200, 100 if SOAK else 6):
            file.unlink(missing_ok=True)
            lived_through(tmp_path, clean_environment, moments, at)
            assert points_of(file)["shipped"] == Counter(range(3000)), at
    record_property("losses of power", moments.lost)
    assert moments.lost


def test_what_a_shipper_that_lost_power_sends_again_are_the_same_points_at_the_same_times(
    tmp_path: Path, clean_environment: Path, otlp_sink: HttpSink, record_property: Callable[[str, object], None]
) -> None:
    logged(tmp_path, f"tracelet.OTLP({otlp_sink.url!r})")
    with Moments(tmp_path) as moments:
        for at in spread(1_200, 100 if SOAK else 6):
            otlp_sink.stored.clear()
            lived_through(tmp_path, clean_environment, moments, at)
            points = {point.iteration: point for point in otlp_sink.points("shipped")}
            assert points.keys() == set(range(3000))
            assert len(set(otlp_sink.points("shipped"))) == 3000, at
            assert len({span.end_time_unix_nano for span in otlp_sink.spans()}) == 1
            assert len(set(otlp_sink.ends("shipped"))) == 1
    record_property("losses of power", moments.lost)
    assert moments.lost
