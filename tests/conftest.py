"""What every test gets: clean environment, its own spool, faults that raise, no process left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tracelet.guard import guard

if TYPE_CHECKING:
    from tests.servers import MlflowServer
    from tests.sinks import HttpSink

PREFIXES = (
    "TRACELET_",
    "OTEL_",
    "MLFLOW_",
    "SLURM_",
    "PBS_",
    "LSB_",
    "TORCHELASTIC_",
    "RAY_",
    "OMPI_",
    "PMIX_",
    "PMI_",
    "MPI_LOCAL",
)
NAMES = (
    "TRACEPARENT",
    "TRACESTATE",
    "BAGGAGE",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # In the background of a shell SIGINT is ignored, and what we start would inherit that: Ctrl-C could end nothing.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing of the caller's settings reaches a test; what it logs stands in `tmp_path / "spool"`."""
    for name in list(os.environ):
        if name.startswith(PREFIXES) or name in NAMES:
            monkeypatch.delenv(name)
    spool = tmp_path / "spool"
    monkeypatch.setenv("TRACELET_DIR", str(spool))
    # Read at import, when no test is running yet: without this a fault of ours would be counted and passed over.
    monkeypatch.setattr(guard, "strict", True)
    yield spool
    stop(processes_of(str(tmp_path)))


@pytest.fixture(autouse=True, scope="session")
def nothing_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fails the session if a process started by a test is still there; it is stopped first."""
    yield
    left = processes_of(str(tmp_path_factory.getbasetemp()))
    described = [f"{pid}: {command_of(pid)}" for pid in left]
    stop(left)
    assert not described, "processes left behind by tests:\n" + "\n".join(described)


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A real MLflow server with one worker and an sqlite database; one for the whole session."""
    from tests.servers import shared_mlflow

    with shared_mlflow(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


@pytest.fixture
def otlp_sink() -> Iterator[HttpSink]:
    """A real OTLP receiver over HTTP, empty at the start of each test."""
    from tests.sinks import HttpSink

    with HttpSink() as sink:
        yield sink


def processes_of(folder: str) -> list[int]:
    """Processes other than this one whose TRACELET_DIR, or a word of whose command line, lies in `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        if pid == os.getpid():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") + [
                variable.removeprefix(b"TRACELET_DIR=")
                for variable in (entry / "environ").read_bytes().split(b"\0")
                if variable.startswith(b"TRACELET_DIR=")
            ]
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            continue  # gone meanwhile, or another user's
        inside = os.fsencode(folder)
        if state != "Z" and any(word == inside or word.startswith(inside + b"/") for word in words):
            found.append(pid)
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    except OSError:
        return "(gone)"


def stop(pids: list[int], patience_s: float = 5.0) -> None:
    """Ask each process to end, then end it; by its own pid only."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        until = time.monotonic() + patience_s
        while any(is_alive(pid) for pid in pids) and time.monotonic() < until:
            time.sleep(0.01)
        pids = [pid for pid in pids if is_alive(pid)]
        if not pids:
            return


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
