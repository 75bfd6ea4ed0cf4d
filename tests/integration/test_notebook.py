"""Runs in a notebook: what a cell, a kernel's restart and its end make of them, in a real IPython kernel.

Pattern: cells are sent to a kernel as Jupyter does, and the spool is read, or a real MLflow. Limit: a minute for each
answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers import MlflowServer, rows_of, run_of
from tests.spooled import folder_of, read
from tracelet.records import WriterEnded, WriterOpened

manager = pytest.importorskip("jupyter_client.manager", reason="jupyter-client is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

LIMIT_S = 60.0
BEGIN = """
import tracelet
exp = tracelet.start_logging(exp_name="cells", project="notebook", backend="file", shipper="off")
exp.log_metric("loss", 1.0, iteration=0)
"""
WAIT = """
print("waiting", flush=True)
import time
time.sleep(50)
"""


class Notebook:
    """A kernel, and the wires to it."""

    def __init__(self, folder: Path) -> None:
        self.manager = manager.KernelManager(transport="ipc", ip=str(folder / "kernel"))
        self.manager.start_kernel(cwd=str(folder))
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=LIMIT_S)

    def run(self, cell: str) -> str:
        """Run a cell to its end: "ok" or the name of the exception."""
        reply = self.client.execute_interactive(cell, timeout=LIMIT_S, output_hook=lambda message: None)["content"]
        return str(reply.get("ename", reply["status"]))

    def interrupted(self, cell: str) -> str:
        """Run a cell, and press the interrupt button once it has printed something."""

        def press(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream":
                self.manager.interrupt_kernel()

        reply = self.client.execute_interactive(cell, timeout=LIMIT_S, output_hook=press)["content"]
        return str(reply.get("ename", reply["status"]))

    def close(self) -> None:
        """End the kernel, however far it has come."""
        self.client.stop_channels()
        if self.manager.has_kernel:
            self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()


@pytest.fixture
def notebook(tmp_path: Path) -> Iterator[Notebook]:
    made = Notebook(tmp_path)
    yield made
    made.close()


def statuses(spool: Path) -> list[str | None]:
    return [ended.status for ended in read(folder_of(spool)).of(WriterEnded)]


def test_a_failed_cell_leaves_the_run_going_and_stop_finishes_it(notebook: Notebook, clean_environment: Path) -> None:
    assert notebook.run(BEGIN) == "ok"
    assert notebook.run("raise ValueError('a typo')") == "ValueError"
    assert statuses(clean_environment) == []
    assert notebook.run("exp.log_metric('loss', 2.0, iteration=1)\ntracelet.stop_logging()") == "ok"
    assert statuses(clean_environment) == ["FINISHED"]
    found = read(folder_of(clean_environment))
    assert found.values("loss") == [(0, 1.0), (1, 2.0)]
    assert len(found.of(WriterOpened)) == 1


def test_an_interrupted_cell_leaves_the_run_going(notebook: Notebook, clean_environment: Path) -> None:
    assert notebook.run(BEGIN) == "ok"
    assert notebook.interrupted(WAIT) == "KeyboardInterrupt"
    assert statuses(clean_environment) == []
    assert notebook.run("exp.log_metric('loss', 2.0, iteration=1)\ntracelet.stop_logging()") == "ok"
    assert statuses(clean_environment) == ["FINISHED"]


WITH = """
import tracelet
with tracelet.Experiment("cells", project="notebook", backend="file", shipper="off") as exp:
    exp.log_metric("loss", 1.0, iteration=0)
    {}
"""


def test_a_failed_or_interrupted_with_block_ends_its_run(notebook: Notebook, clean_environment: Path) -> None:
    assert notebook.run(WITH.format("raise ValueError('a typo')")) == "ValueError"
    assert statuses(clean_environment) == ["FAILED"]
    shown = "\n    ".join(WAIT.strip().splitlines())
    assert notebook.interrupted(WITH.replace('"cells"', '"cells", run_id="second"').format(shown)) == (
        "KeyboardInterrupt"
    )
    assert [one.status for one in read(folder_of(clean_environment, "second")).of(WriterEnded)] == ["KILLED"]


@pytest.mark.parametrize("last", ["pass", "raise ValueError('a typo')", "import sys; sys.exit(0)"])
def test_a_restarted_kernel_leaves_its_run_killed(notebook: Notebook, clean_environment: Path, last: str) -> None:
    assert notebook.run(BEGIN) == "ok"
    notebook.run(last)
    notebook.manager.restart_kernel(now=False)
    assert statuses(clean_environment) == ["KILLED"]


def test_a_kernel_that_is_shut_down_leaves_its_run_killed_and_a_stopped_one_as_it_was(
    notebook: Notebook, clean_environment: Path
) -> None:
    assert notebook.run(BEGIN.replace('"cells"', '"cells", run_id="stopped"') + "tracelet.stop_logging()\n") == "ok"
    assert notebook.run(BEGIN.replace('"cells"', '"cells", run_id="going"')) == "ok"
    notebook.manager.shutdown_kernel(now=False)
    for run_id, status in (("stopped", "FINISHED"), ("going", "KILLED")):
        assert [one.status for one in read(folder_of(clean_environment, run_id)).of(WriterEnded)] == [status]


IN_MLFLOW = BEGIN.replace('backend="file", shipper="off"', 'backend="mlflow"')
assert IN_MLFLOW != BEGIN


@pytest.mark.parametrize(
    ("name", "now", "status"),
    [("restarted", False, "KILLED"), ("killed", True, "KILLED"), ("stopped", False, "FINISHED")],
)
def test_what_becomes_of_a_kernel_stands_in_mlflow(
    tmp_path: Path,
    mlflow_server: MlflowServer,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    now: bool,
    status: str,
) -> None:
    """The run's own shipper outlives the kernel, also one that is killed with SIGKILL (`now`)."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    notebook = Notebook(tmp_path)
    try:
        assert notebook.run(IN_MLFLOW.replace("cells", name)) == "ok"
        assert notebook.run("raise ValueError('a typo')") == "ValueError"
        assert run_of(mlflow_server, name, project="notebook").info.status == "RUNNING"
        if name == "stopped":
            assert notebook.run("tracelet.stop_logging()") == "ok"
        notebook.manager.restart_kernel(now=now)
        restarted = time.time()
        run = run_of(mlflow_server, name, project="notebook", status=status, within_s=LIMIT_S)
    finally:
        notebook.close()
    assert [row.value for row in rows_of(mlflow_server, run.info.run_id, "loss")] == [1.0]
    assert run.info.end_time <= (restarted + 2) * 1000
