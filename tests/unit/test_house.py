"""The house: each file says its one reason, and the face of the package costs next to nothing."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import tracelet
from tests.crash.limit import limited

ROOT = Path(__file__).parents[2]
FILES = [
    path
    for folder in ("tracelet", "tests", "examples", "scripts", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
]
SHIPS = ("tracelet.shipper", "tracelet.exporters")
HEAVY = ("opentelemetry", "mlflow", "grpc", "numpy", "requests", "google.protobuf", "tracelet.core", "asyncio")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_first_line_of_every_file_says_its_one_reason(path: Path) -> None:
    text = path.read_text()
    first = text.splitlines()[1 if text.startswith("#!") else 0]
    assert first.startswith('"""')
    assert len(first) > 10
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_called_by_what_it_is_not(path: Path) -> None:
    assert path.stem not in {"utils", "util", "helpers", "helper", "manager", "common", "misc"}


def test_the_public_names_are_sorted_and_there() -> None:
    names = [name for name in tracelet.__all__ if name != "__version__"]
    assert names == sorted(names, key=lambda name: (name[0].islower(), name))
    for name in tracelet.__all__:
        assert getattr(tracelet, name) is not None
    assert set(tracelet._HOME) == set(tracelet.__all__)


def run(code: str, folder: Path) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True, timeout=60
    ).stdout


def test_importing_it_loads_nothing_heavy(tmp_path: Path) -> None:
    loaded = run("import tracelet, sys; print(*sys.modules)", tmp_path).split()
    assert [name for name in loaded if name.startswith(HEAVY)] == []


def test_importing_it_starts_no_thread_opens_no_file_and_patches_nothing(tmp_path: Path) -> None:
    code = """
import atexit, builtins, os, signal, sys, threading, socket, logging
def state():
    return (
        threading.active_count(), atexit._ncallbacks(), sys.excepthook, sys.exit, os.fork, builtins.open,
        [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)], sorted(os.listdir('/proc/self/fd')),
        sorted(os.environ.items()), len(logging.getLogger('tracelet').handlers), socket.socket,
    )
before = state()
import tracelet
assert state() == before, (before, state())
"""
    run(code, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_first_point_loads_no_sdk_no_grpc_no_numpy(tmp_path: Path) -> None:
    code = """
import sys, tracelet
exp = tracelet.start_logging(exp_name="light", project="house", backend="file")
exp.log_metric("loss", 0.5, iteration=1)
exp.log_params({"a": 1})
print(*sys.modules)
exp.stop()
"""
    loaded = run(code, tmp_path).split()
    heavy = (
        "opentelemetry.sdk",
        "opentelemetry.exporter",
        "mlflow",
        "grpc",
        "numpy",
        "tracelet.shipper",
        "tracelet.exporters",
    )
    assert [name for name in loaded if name.startswith(heavy)] == []


KILLS = [
    path
    for folder in ("crash", "launchers", "trainers")
    for path in sorted((ROOT / "tests" / folder).glob("test_*.py"))
]


@pytest.mark.parametrize("path", KILLS, ids=lambda path: path.stem)
def test_a_crash_test_says_its_pattern_and_its_limit_in_time(path: Path) -> None:
    said = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert "Pattern: " in said
    assert "Limit: " in said


@pytest.mark.parametrize("wait", ["read", "readline", "lock", "loop", "child"])
def test_a_crash_test_that_waits_without_end_fails_when_its_limit_is_over(wait: str) -> None:
    reading, writing = os.pipe()
    lock = threading.Lock()
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    waits = {
        "read": lambda: os.read(reading, 1),
        "readline": lambda: sleeper.stdout.readline(),  # type: ignore[union-attr]
        "lock": lambda: lock.acquire() and lock.acquire(),
        "loop": lambda: all(iter(lambda: True, False)),
        "child": sleeper.wait,
    }
    put_away = []

    def crash_test() -> None:
        try:
            waits[wait]()
        finally:
            put_away.append(wait)

    try:
        with pytest.raises(pytest.fail.Exception, match=r"not over after 0\.2 s"), limited(0.2):
            crash_test()
        assert put_away == [wait]
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    finally:
        sleeper.communicate(timeout=60)
        os.close(reading)
        os.close(writing)


def test_a_forked_child_of_a_crash_test_that_sets_an_alarm_ends_by_it() -> None:
    with limited(60):
        child = os.fork()
        if child == 0:
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            while True:
                pass
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGALRM


def test_every_crash_test_has_that_limit() -> None:
    asked = [sys.executable, "-m", "pytest", "--setup-plan", "-q", "tests/crash/test_clock.py"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    tests = [line for line in done.stdout.splitlines() if "test_clock.py::" in line]
    assert tests
    assert all("limit_in_time" in line for line in tests), done.stdout
