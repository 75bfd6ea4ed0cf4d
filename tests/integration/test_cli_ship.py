"""`tracelet ship`, `runs` and `prune` beside real programs and real receivers; each a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.sinks import HttpSink, Say
from tracelet.cli import ship
from tracelet.cli.main import main

TRACELET = (sys.executable, "-m", "tracelet")
PATIENCE_S = 60.0

TRAIN = """
import sys, tracelet
exp = tracelet.start_logging(exp_name="digits", project="examples", run_id=sys.argv[1])
exp.log_params({"lr": 0.1})
for i in range(int(sys.argv[2])):
    exp.log_metric("loss", 1 / (i + 1), iteration=i)
"""
THEN_STOP = TRAIN + "tracelet.stop_logging()\n"
THEN_WAIT = TRAIN + "print('logged', flush=True)\nsys.stdin.readline()\ntracelet.stop_logging()\n"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def train(run_id: str, points: int, **variables: str) -> None:
    """A program that logs and ends, its data left in the spool."""
    environ = {**os.environ, "TRACELET_SHIPPER": "off", **variables}
    subprocess.run([sys.executable, "-c", THEN_STOP, run_id, str(points)], env=environ, check=True, timeout=PATIENCE_S)


@contextmanager
def training(run_id: str, points: int, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A program that has logged `points` and waits for a line before it ends."""
    program = subprocess.Popen(
        [sys.executable, "-c", THEN_WAIT, run_id, str(points)],
        env={**os.environ, **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert program.stdout is not None
    assert program.stdin is not None
    try:
        assert program.stdout.readline() == "logged\n"
        yield program
    finally:
        program.kill()
        program.wait(10)
        program.stdin.close()
        program.stdout.close()


def tracelet(*argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TRACELET, *argv],
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def listed(run_id: str) -> Mapping[str, Any]:
    done = tracelet("runs", "--json")
    return next(run for run in json.loads(done.stdout) if run["run_id"] == run_id)


def until(reached: Callable[[], bool]) -> None:
    limit = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_what_waits_is_delivered_and_then_nothing_waits(otlp_sink: HttpSink) -> None:
    train("one", 5000, OTEL_EXPORTER_OTLP_ENDPOINT=otlp_sink.url)
    train("two", 100, OTEL_EXPORTER_OTLP_ENDPOINT=otlp_sink.url)
    assert (listed("one")["waiting"], listed("one")["state"]) == (5000, "ended, not delivered")
    done = tracelet("ship")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "one examples/digits: points delivered: 5,000 to otlp" in done.stdout
    assert "2 runs delivered" in done.stdout
    points = [p for p in otlp_sink.points() if p.name == "loss"]
    assert [p.iteration for p in points] == [*range(5000), *range(100)]  # the oldest run first, each in its order
    assert (listed("one")["waiting"], listed("one")["undelivered"], listed("one")["state"]) == (0, False, "FINISHED")
    assert tracelet("ship").stdout == "Nothing waits.\n"


def test_what_no_destination_takes_is_left_and_why_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ship, "GIVE_UP_S", 1.0)
    train("lost", 300, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    assert main(["ship"]) == 1
    said = capsys.readouterr().out
    assert "LEFT for otlp (http://127.0.0.1:9): 300 points" in said
    assert "Connection refused" in said
    assert "Nothing is lost" in said
    assert listed("lost")["waiting"] == 300


def test_a_timeout_leaves_the_rest_where_it_is() -> None:
    train("late", 300, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    done = tracelet("ship", "--timeout", "0")
    assert done.returncode == 1
    assert "LEFT for otlp (http://127.0.0.1:9): 300 points" in done.stdout
    assert listed("late")["waiting"] == 300


def test_a_dead_destination_does_not_hold_up_a_live_one(
    otlp_sink: HttpSink, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ship, "GIVE_UP_S", 1.0)
    train("dead", 10, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    train("live", 10, OTEL_EXPORTER_OTLP_ENDPOINT=otlp_sink.url)
    assert main(["ship", "live", "dead"]) == 1
    assert "1 run delivered, 1 not" in capsys.readouterr().out
    assert listed("live")["undelivered"] is False


def test_a_run_without_a_destination_needs_one_named(otlp_sink: HttpSink, elsewhere: Path) -> None:
    train("nowhere", 50, TRACELET_BACKEND="")
    manifest = next(elsewhere.parent.glob("spool/nowhere/*/manifest.json"))
    fields = json.loads(manifest.read_text())
    del fields["crc32"]  # changed by hand
    fields["attempts"][0]["destinations"] = []  # as where mlflow is not installed
    manifest.write_text(json.dumps(fields))
    refused = tracelet("ship", "nowhere")
    assert refused.returncode == 1
    assert "add --to mlflow" in refused.stdout
    assert not (elsewhere / "mlflow.db").exists()
    done = tracelet("ship", "nowhere", "--to", "otlp", OTEL_EXPORTER_OTLP_ENDPOINT=otlp_sink.url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len([p for p in otlp_sink.points() if p.name == "loss"]) == 50
    assert listed("nowhere")["destinations"][0]["kind"] == "otlp"


def test_a_delivered_run_can_be_sent_to_another_destination_too(otlp_sink: HttpSink, elsewhere: Path) -> None:
    train("copied", 70, TRACELET_BACKEND="file")
    assert tracelet("ship", "copied").returncode == 0
    done = tracelet("ship", "copied", "--to", "otlp", OTEL_EXPORTER_OTLP_ENDPOINT=otlp_sink.url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len([p for p in otlp_sink.points() if p.name == "loss"]) == 70
    assert {d["kind"]: d["delivered"] for d in listed("copied")["destinations"]} == {"file": 70, "otlp": 70}


def test_a_program_that_goes_on_is_listed_as_running_and_only_shipped_when_asked(otlp_sink: HttpSink) -> None:
    with training("alive", 40, TRACELET_SHIPPER="off", OTEL_EXPORTER_OTLP_ENDPOINT=otlp_sink.url):
        assert listed("alive")["state"] == "RUNNING"
        assert tracelet("ship").stdout == "Nothing waits.\n"
        done = tracelet("ship", "--all")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "it goes on" in done.stdout
        assert len([p for p in otlp_sink.points() if p.name == "loss"]) == 40
        assert listed("alive")["state"] == "RUNNING"
        kept = tracelet("prune", "--undelivered", "alive", "--yes")
        assert kept.returncode == 1
        assert "is being written" in kept.stderr
    assert tracelet("ship").returncode == 0
    assert listed("alive")["state"] == "KILLED"


def test_a_run_on_which_a_shipper_is_at_work_is_watched_instead(otlp_sink: HttpSink) -> None:
    with training("served", 25, OTEL_EXPORTER_OTLP_ENDPOINT=otlp_sink.url) as program:
        until(lambda: listed("served")["shipper_pid"] is not None)
        done = tracelet("ship", "served")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "a shipper is at work on it (pid " in done.stdout
        assert "its shipper goes on" in done.stdout
        assert program.poll() is None
    assert len([p for p in otlp_sink.points() if p.name == "loss"]) == 25  # once, not twice


def test_a_shipper_that_gets_nowhere_is_named_with_its_log_and_the_way_to_take_over(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ship, "GIVE_UP_S", 1.0)
    with training("stuck", 25, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9"):
        until(lambda: listed("stuck")["shipper_pid"] is not None)
        assert main(["ship", "stuck"]) == 1
        said = capsys.readouterr().out
        assert "shipper.log" in said
        assert f"kill {listed('stuck')['shipper_pid']}," in said


def test_a_destination_that_takes_nothing_is_given_up_and_the_next_run_does_not_wait_for_it_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ship, "GIVE_UP_S", 4.0)
    monkeypatch.setattr(ship, "GIVE_UP_AGAIN_S", 0.2)
    for run_id in ("first", "second"):
        train(run_id, 10, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    assert main(["ship"]) == 1
    first, second = re.findall(r"points delivered: 0 to otlp in ([0-9.]+) s", capsys.readouterr().out)
    assert float(second) < 4.0 <= float(first)


def test_ctrl_c_ends_it_without_losing_what_was_delivered(otlp_sink: HttpSink) -> None:
    train("long", 100, OTEL_EXPORTER_OTLP_ENDPOINT=otlp_sink.url)
    otlp_sink.rule = lambda received: Say(status=503)
    shipping = subprocess.Popen([*TRACELET, "ship"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: listed("long")["shipper_pid"] is not None)
    shipping.send_signal(signal.SIGINT)
    _, said = shipping.communicate(timeout=PATIENCE_S)
    assert shipping.returncode == 130
    assert said.rstrip().endswith("interrupted")
    otlp_sink.rule = None
    assert tracelet("ship").returncode == 0
    assert len([p for p in otlp_sink.points() if p.name == "loss"]) == 100


def test_at_a_terminal_one_line_shows_how_far_it_is(otlp_sink: HttpSink) -> None:
    train("seen", 100, OTEL_EXPORTER_OTLP_ENDPOINT=otlp_sink.url)
    at, terminal = os.openpty()
    shipping = subprocess.Popen([*TRACELET, "ship"], stdout=subprocess.DEVNULL, stderr=terminal)
    os.close(terminal)
    shown = b""
    try:
        while piece := os.read(at, 4096):
            shown += piece
    except OSError:  # EIO: the other end is closed
        pass
    finally:
        os.close(at)
    assert shipping.wait(PATIENCE_S) == 0
    assert b"\r\x1b[Kseen examples/digits: otlp " in shown
    assert shown.endswith(b"\r\x1b[K")


def test_mlflow_gets_a_run_that_was_logged_elsewhere(mlflow_server: Any) -> None:
    train("for-mlflow", 30, TRACELET_BACKEND="file")
    uri = mlflow_server.uri
    done = tracelet("ship", "for-mlflow", "--to", "mlflow", MLFLOW_TRACKING_URI=uri)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"in mlflow: {uri}/#/experiments/" in done.stdout
    doctor = tracelet("doctor", "--json", TRACELET_PROJECT="examples", MLFLOW_TRACKING_URI=uri)
    [destination] = json.loads(doctor.stdout)["destinations"]
    assert destination["said"].startswith("MLflow ")
    assert "has experiment 'examples'" in destination["said"]
