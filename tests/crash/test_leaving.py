"""Destinations that take nothing, and the end of the program all the same: what it says, and what it leaves behind.

Pattern: real programs over an address where nobody listens or a receiver that refuses; where minutes have to pass,
their clocks run faster. Limit: a minute a test, except where its own promise is shorter.
"""

from __future__ import annotations

import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import processes_of
from tests.crash.clocks import other_clocks
from tests.crash.test_sidecar import points
from tests.shipping import until
from tests.sinks import HttpSink, Say
from tests.stack.harness import is_running
from tracelet.spool.lease import shipper_alive

LIMIT_S = 60.0

TRAIN = """
import sys, tracelet
exp = tracelet.start_logging(exp_name="job", project="leaving", run_id="run")
for i in range(1000):
    exp.log_metric("loss", 1 / (i + 1), iteration=i)
print("trained", flush=True)
"""
STOPS = TRAIN + "tracelet.stop_logging()\n"

COUNTED = """
import atexit, glob, os, time
slept, sleep, since = 0.0, time.sleep, 0.0
def counted(seconds):
    global slept
    slept += seconds
    sleep(seconds)
time.sleep = counted
atexit.register(lambda: print(slept, time.monotonic() - since, flush=True))  # runs last
"""
"""Says at the very end what waiting was asked for in all since `ON_ITS_WAY`, and how much time that took by its clock.

No sleep is shorter than what it was asked for, so a wait of two seconds asks for two at most, however busy the machine.
"""

ON_ITS_WAY = """
while not glob.glob(os.environ["TRACELET_DIR"] + "/run/*/journal-*"):
    sleep(0.01)
slept, since = 0.0, time.monotonic()
"""
"""Waits for the shipper to be at work: its coming would count as progress, and how long it takes is the machine's."""


def train(code: str, endpoint: str, limit_s: float = LIMIT_S, **variables: str) -> subprocess.CompletedProcess[str]:
    """The program, with its output captured as `subprocess.run(capture_output=True)` does it."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, **variables},
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )


def shippers(spool: Path) -> list[int]:
    return [pid for folder in spool.glob("run/*") if (pid := shipper_alive(folder)) is not None]


def command_named(said: str) -> list[str]:
    """The command at the end of a warning, as a person would copy it."""
    (line,) = [line for line in said.splitlines() if "tracelet ship /" in line]
    return shlex.split(line[line.index("tracelet ship /") :])


def nobody() -> str:
    """An address at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize("code", [STOPS, TRAIN], ids=["stop", "end"])
def test_where_the_shipper_outlives_it_the_program_leaves_says_what_waits_and_how_to_ship_it(
    code: str, clean_environment: Path, otlp_sink: HttpSink
) -> None:
    otlp_sink.rule = lambda _: Say(503)
    done = train(COUNTED + code.replace("print(", ON_ITS_WAY + "print("), otlp_sink.url, limit_s=20.0)
    assert done.returncode == 0, done.stderr
    assert "run run: 1,000 points still on the way to otlp; the shipper goes on in the background" in done.stderr
    asked, took = map(float, done.stdout.splitlines()[-1].split())
    assert took >= 2.0, "it gives its shipper two seconds"
    assert 0 < asked < 3.0, "and no more: a second is for a lock that the shipper may hold"
    (pid,) = shippers(clean_environment)
    os.kill(pid, signal.SIGKILL)  # "if this machine goes down first"
    until(lambda: not is_running(pid), LIMIT_S)
    otlp_sink.rule = None
    named = command_named(done.stderr)
    shipped = subprocess.run(
        [sys.executable, "-m", *named], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert shipped.returncode == 0, shipped.stdout + shipped.stderr
    assert points(otlp_sink, "run") == list(range(1000))
    assert otlp_sink.ends("run") == ["FINISHED"]


@pytest.mark.parametrize("code", [STOPS, TRAIN], ids=["stop", "end"])
def test_where_nothing_outlives_it_it_waits_for_30_s_without_progress_and_says_the_same(
    code: str, tmp_path: Path, otlp_sink: HttpSink
) -> None:
    otlp_sink.rule = lambda _: Say(503)
    faster = 20
    clocks = other_clocks(tmp_path / "clocks", faster=faster)
    code = COUNTED + code.replace("print(", ON_ITS_WAY + "print(")
    done = train(code, otlp_sink.url, SLURM_JOB_ID="4711", **clocks)
    assert done.returncode == 0, done.stderr
    assert "1,000 points not delivered to otlp, and nothing outlives this process here" in done.stderr
    assert "SLURM" in done.stderr
    assert command_named(done.stderr)
    asked, took = map(float, done.stdout.splitlines()[-1].split())
    assert took >= 30.0
    assert 0 < asked * faster < 50.0  # a second of ours is for a lock that the shipper may hold


def test_where_nothing_outlives_it_it_waits_on_while_data_moves(tmp_path: Path, otlp_sink: HttpSink) -> None:
    """Seven requests that take 10 s each, by its clock: longer in all than it would wait without progress.

    Its clock is not too fast: without progress it waits for 5 s of ours, which a busy machine may need for a request.
    """
    slow = TRAIN.replace("range(1000)", "range(100_000)") + "tracelet.stop_logging()\n"
    otlp_sink.rule = lambda received: Say(hang_s=1.7) if received.size > 100_000 else None  # not the run's own gauges
    clocks = other_clocks(tmp_path / "clocks", faster=6)
    done = train(slow, otlp_sink.url, SLURM_JOB_ID="4711", OTEL_EXPORTER_OTLP_TIMEOUT="10000", **clocks)
    assert done.returncode == 0, done.stderr
    assert "not delivered" not in done.stderr
    assert points(otlp_sink, "run") == list(range(100_000))
    assert otlp_sink.ends("run") == ["FINISHED"]


@pytest.mark.parametrize("endpoint", ["nobody listens", "http://collector.invalid:4318"], ids=["port", "name"])
def test_a_mistyped_address_leaves_no_process_behind_for_good(
    endpoint: str, clean_environment: Path, tmp_path: Path
) -> None:
    """Ten minutes after the end, by its clock, the shipper leaves; its log and the spool say what is left."""
    clocks = other_clocks(tmp_path / "clocks", faster=300)
    address = nobody() if endpoint == "nobody listens" else endpoint
    done = train(STOPS, address, **clocks)
    assert done.returncode == 0, done.stderr
    until(lambda: not processes_of(str(tmp_path)), LIMIT_S)
    (folder,) = (clean_environment / "run").iterdir()
    log = (folder / "shipper.log").read_text()
    assert re.search(r"otlp-\w+: about 100\d records are left .*tracelet ship /", log), log
    listed = subprocess.run(
        [sys.executable, "-m", "tracelet", "runs"], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert "1,000" in listed.stdout


def test_captured_output_ends_when_training_does_though_the_shipper_goes_on(
    clean_environment: Path, otlp_sink: HttpSink
) -> None:
    """What `subprocess.run(capture_output=True)` waits for, and sshd without a terminal: the pipes' other ends."""
    otlp_sink.rule = lambda _: Say(503)
    done = train(STOPS, otlp_sink.url, limit_s=20.0)
    assert done.stdout == "trained\n"
    (pid,) = shippers(clean_environment)
    os.kill(pid, signal.SIGKILL)


def test_a_terminal_hangs_up_when_training_ends_though_the_shipper_goes_on(
    clean_environment: Path, otlp_sink: HttpSink
) -> None:
    """What `ssh -t` and a terminal's window wait for: the terminal's last holder."""
    otlp_sink.rule = lambda _: Say(503)
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = otlp_sink.url
        os.execv(sys.executable, [sys.executable, "-c", STOPS])
    said = b""
    until_s = time.monotonic() + LIMIT_S
    try:
        while time.monotonic() < until_s:
            said += os.read(terminal, 4096)
    except OSError:  # EIO: hung up
        pass
    finally:
        os.close(terminal)
    assert time.monotonic() < until_s
    assert os.waitpid(pid, 0)[1] == 0
    assert b"trained" in said
    (shipper,) = shippers(clean_environment)
    os.kill(shipper, signal.SIGKILL)
