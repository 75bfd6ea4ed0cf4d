"""`tracelet ship --follow` beside training, as a sidecar: every run of the folder, whenever it comes, however it ends.

Pattern: training with TRACELET_SHIPPER=off and the sidecar are processes that share a folder and a uid, and nothing
else: the sidecar is in a PID namespace of its own, where it can. Limit: a minute a test.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.shipping import until
from tests.sinks import HttpSink, Say
from tests.stack.harness import is_running, lacking

LIMIT_S = 60.0

TRAIN = """
import sys, time, tracelet
exp = tracelet.start_logging(exp_name="job", project="sidecar", run_id=sys.argv[1])
exp.log_params({"lr": 0.1})
i = 0
while i < int(sys.argv[2]):
    exp.log_metric("loss", 1 / (i + 1), iteration=i)
    i += 1
print("logged", flush=True)
if sys.argv[3] == "wait":
    time.sleep(600)
tracelet.stop_logging()
"""


def namespace() -> list[str]:
    """What puts a process into a PID namespace of its own; nothing where that may not be done."""
    words = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    allowed = (
        shutil.which("unshare") and subprocess.run([*words, "true"], check=False, capture_output=True).returncode == 0
    )
    return words if allowed else []


class Sidecar:
    """A running `tracelet ship --follow`."""

    def __init__(self, spool: Path, log: Path, *words: str, apart: bool = True, **variables: str) -> None:
        self._log = log
        command = [
            *(namespace() if apart else []),
            sys.executable,
            "-m",
            "tracelet",
            "ship",
            "--follow",
            "--dir",
            str(spool),
        ]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, *words], stdout=out, stderr=out, env={**os.environ, **variables}, start_new_session=True
            )
        # As the first process of its namespace it would not hear a SIGTERM before it has a handler.
        until(lambda: "follows" in self.said or self.process.poll() is not None, LIMIT_S)

    @property
    def said(self) -> str:
        return self._log.read_text()

    @property
    def pid(self) -> int:
        """Of the command itself, seen from here."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0]) if children and "unshare" in str(self.process.args) else self.process.pid

    def terminate(self) -> int:
        """SIGTERM to the command itself, as a container's engine sends it, and its exit code."""
        os.kill(self.pid, signal.SIGTERM)
        return self.process.wait(LIMIT_S)

    def __enter__(self) -> Sidecar:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def training(
    spool: Path, sink: HttpSink, run_id: str, points: int, how: str = "stop"
) -> Iterator[subprocess.Popen[str]]:
    variables = {
        **os.environ,
        "TRACELET_DIR": str(spool),
        "TRACELET_SHIPPER": "off",
        "OTEL_EXPORTER_OTLP_ENDPOINT": sink.url,
    }
    program = subprocess.Popen(
        [sys.executable, "-c", TRAIN, run_id, str(points), how], env=variables, stdout=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    try:
        assert program.stdout.readline() == "logged\n"
        yield program
    finally:
        program.kill()
        program.wait()
        program.stdout.close()


def points(sink: HttpSink, run_id: str) -> list[int]:
    return [point.iteration for point in sink.points(run_id) if point.name == "loss"]


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    """Not there yet: the sidecar may be up before training has made it."""
    return tmp_path / "shared" / "spool"


def test_runs_that_come_one_after_the_other_are_delivered_to_their_ends(
    spool: Path, tmp_path: Path, otlp_sink: HttpSink
) -> None:
    with Sidecar(spool, tmp_path / "sidecar.log") as sidecar:
        for number in range(3):
            with training(spool, otlp_sink, f"run-{number}", 2000) as program:
                assert program.wait(LIMIT_S) == 0  # stop() waits for nobody
            until(lambda number=number: otlp_sink.ends(f"run-{number}") == ["FINISHED"], LIMIT_S)
            assert points(otlp_sink, f"run-{number}") == list(range(2000))
        assert sidecar.process.poll() is None  # it goes on
        assert sidecar.terminate() == 0, sidecar.said


def test_a_killed_program_is_noticed_by_its_lock_across_namespaces(
    spool: Path, tmp_path: Path, otlp_sink: HttpSink
) -> None:
    if not namespace():
        lacking("no PID namespace can be made here")
    with Sidecar(spool, tmp_path / "sidecar.log") as sidecar:
        assert os.readlink(f"/proc/{sidecar.pid}/ns/pid") != os.readlink("/proc/self/ns/pid")
        with training(spool, otlp_sink, "killed", 5000, "wait") as program:
            until(lambda: len(points(otlp_sink, "killed")) == 5000, LIMIT_S)
            assert otlp_sink.ends("killed") == []
            program.kill()
            program.wait()
            until(lambda: otlp_sink.ends("killed"), LIMIT_S)
        assert otlp_sink.ends("killed") == ["KILLED"]
        assert points(otlp_sink, "killed") == list(range(5000))
        assert sidecar.terminate() == 0, sidecar.said


def test_a_run_that_starts_again_is_taken_up_again(spool: Path, tmp_path: Path, otlp_sink: HttpSink) -> None:
    with Sidecar(spool, tmp_path / "sidecar.log") as sidecar:
        for attempt in range(2):
            with training(spool, otlp_sink, "again", 100) as program:
                assert program.wait(LIMIT_S) == 0
            until(lambda attempt=attempt: len(otlp_sink.ends("again")) == attempt + 1, LIMIT_S)
        assert points(otlp_sink, "again") == [*range(100), *range(100)]
        assert sidecar.terminate() == 0, sidecar.said


def test_sigterm_drains_what_is_there_and_says_what_is_left(spool: Path, tmp_path: Path, otlp_sink: HttpSink) -> None:
    """The order of Kubernetes: training ends, then its sidecars get SIGTERM."""
    with Sidecar(spool, tmp_path / "sidecar.log") as sidecar, training(spool, otlp_sink, "late", 50_000) as program:
        assert program.wait(LIMIT_S) == 0
        assert sidecar.terminate() == 0, sidecar.said
    assert points(otlp_sink, "late") == list(range(50_000))
    assert otlp_sink.ends("late") == ["FINISHED"]


def test_with_nobody_taking_it_leaves_when_told_with_1_and_the_data_is_safe(
    spool: Path, tmp_path: Path, otlp_sink: HttpSink
) -> None:
    otlp_sink.rule = lambda _: Say(503)
    with Sidecar(spool, tmp_path / "sidecar.log", TRACELET_GRACE="1s") as sidecar:
        with training(spool, otlp_sink, "waits", 100) as program:
            assert program.wait(LIMIT_S) == 0
        until(lambda: "ships it" in sidecar.said, LIMIT_S)
        assert sidecar.terminate() == 1
        assert "deliver it with `tracelet ship`" in sidecar.said
    otlp_sink.rule = None
    done = subprocess.run([sys.executable, "-m", "tracelet", "ship", "--dir", str(spool)], check=False, timeout=LIMIT_S)
    assert done.returncode == 0
    assert points(otlp_sink, "waits") == list(range(100))


def test_named_runs_are_followed_until_they_are_over(spool: Path, tmp_path: Path, otlp_sink: HttpSink) -> None:
    with (
        training(spool, otlp_sink, "one", 1000, "wait") as program,
        Sidecar(spool, tmp_path / "sidecar.log", "one", apart=False) as sidecar,
    ):
        until(lambda: len(points(otlp_sink, "one")) == 1000, LIMIT_S)
        assert sidecar.process.poll() is None
        program.kill()
        assert sidecar.process.wait(LIMIT_S) == 0, sidecar.said
    assert otlp_sink.ends("one") == ["KILLED"]


def test_a_sidecar_that_is_killed_is_followed_by_another_and_nothing_is_lost(
    spool: Path, tmp_path: Path, otlp_sink: HttpSink
) -> None:
    with training(spool, otlp_sink, "twice", 30_000, "wait") as program:
        with Sidecar(spool, tmp_path / "first.log", apart=False) as first:
            until(lambda: points(otlp_sink, "twice"), LIMIT_S)
            first.process.kill()
            until(lambda: not is_running(first.process.pid), LIMIT_S)
        with Sidecar(spool, tmp_path / "second.log", apart=False) as second:
            program.kill()
            until(lambda: otlp_sink.ends("twice") == ["KILLED"], LIMIT_S)
            assert second.terminate() == 0, second.said
    # A batch whose answer the first one did not live to see is sent again, with the same times.
    found = {(p.iteration, p.time_unix_nano) for p in otlp_sink.points("twice") if p.name == "loss"}
    assert sorted(iteration for iteration, _ in found) == list(range(30_000))
