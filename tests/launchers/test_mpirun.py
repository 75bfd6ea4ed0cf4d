"""Ranks that a real mpirun starts, OpenMPI's and MPICH's (Hydra, as Intel's is): one launch, one run.

Pattern: mpirun starts real programs on this machine, which need no MPI of their own; their spools are read, or the
receiver. tests/launchers/test_slurm.py has the launches over several nodes. Limit: two minutes a launch.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import launches
from tests.programs import written
from tests.shipping import until
from tests.sinks import HttpSink
from tests.spooled import folder_of, read
from tests.system import system_program
from tracelet.records import RunStarted, WriterEnded, WriterOpened

LIMIT_S = 120.0
KINDS = ("openmpi", "mpich")
# OpenMPI has to be told that it may: be root's, start more ranks than there are cores; and where to listen.
OPENMPI = ("--allow-run-as-root", "--oversubscribe", "--mca", "oob_tcp_if_include", "lo")
HYDRA = ("-iface", "lo")

TRAIN = """
import json, os, pathlib, sys, tracelet
if "torch" in sys.argv:  # as torch's scripts do under mpirun
    size = "OMPI_COMM_WORLD_SIZE" if "OMPI_COMM_WORLD_SIZE" in os.environ else "PMI_SIZE"
    os.environ["RANK"], os.environ["WORLD_SIZE"] = os.environ[size.replace("SIZE", "RANK")], os.environ[size]
exp = tracelet.start_logging(exp_name="launched", project="mpirun")
for step in range(100):
    exp.log_metric("loss", step, iteration=step)
facts = {"run": exp.id, "left_out": exp.stats.left_out, "environ": dict(os.environ)}
told = pathlib.Path(sys.argv[1]) / f"{os.getpid()}.json"
told.parent.mkdir(exist_ok=True)
told.write_text(json.dumps(facts))
if "killed" in sys.argv and exp.stats.left_out == 0:
    os.kill(os.getpid(), 9)
"""


@dataclass(frozen=True)
class Told:
    """What a rank said."""

    run: str
    left_out: int
    environ: Mapping[str, str]

    def number(self) -> int:
        return int(self.environ.get("OMPI_COMM_WORLD_RANK") or self.environ.get("PMI_RANK") or 0)


def launched(
    kind: str, folder: Path, ranks: int, name: str, *words: str, before: Sequence[str] = (), code: int = 0
) -> list[Told]:
    """What the ranks of one launch said, by rank."""
    command = [system_program(f"mpirun.{kind}"), *(OPENMPI if kind == "openmpi" else HYDRA), "-n", str(ranks)]
    done = subprocess.run(
        [*command, *before, sys.executable, str(written(folder, TRAIN)), str(folder / name), *words],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert bool(done.returncode) == bool(code), done.stdout + done.stderr
    found = [Told(**json.loads(path.read_text())) for path in (folder / name).glob("*.json")]
    return sorted(found, key=Told.number)


def runs(found: list[Told]) -> set[str]:
    return {one.run for one in found}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACELET_SHIPPER", "off")
    monkeypatch.setenv("TRACELET_BACKEND", "file")


@pytest.mark.parametrize("kind", KINDS)
def test_four_ranks_of_one_launch_are_one_run_and_the_next_launch_is_another(
    kind: str, tmp_path: Path, clean_environment: Path, offline: None
) -> None:
    found = launched(kind, tmp_path, 4, "first")
    (run,) = runs(found)
    assert [one.left_out for one in found] == [0, 100, 100, 100]
    spooled = read(folder_of(clean_environment, run))
    assert sorted((one.rank, one.role) for one in spooled.of(WriterOpened)) == [(rank, "first") for rank in range(4)]
    assert spooled.values("loss") == [(step, float(step)) for step in range(100)]
    assert len(spooled.of(RunStarted)) == 1
    assert [one.status for one in spooled.of(WriterEnded)] == ["FINISHED"] * 4
    assert len(runs(launched(kind, tmp_path, 4, "second")) | {run}) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_name_themselves_as_torch_wants_it_and_stand_behind_a_script_are_one_run(
    kind: str, tmp_path: Path, offline: None
) -> None:
    wrapper = tmp_path / "wrapper.sh"
    wrapper.write_text('#!/bin/sh\n"$@"\nexit $?\n')
    wrapper.chmod(0o700)
    found = launched(kind, tmp_path, 3, "told", "torch", before=(str(wrapper),))
    assert (len(found), len(runs(found))) == (3, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_is_a_process_by_itself(kind: str, tmp_path: Path, offline: None) -> None:
    found = [one for number in range(2) for one in launched(kind, tmp_path, 1, f"trial-{number}")]
    assert ([one.left_out for one in found], len(runs(found))) == ([0, 0], 2)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_other_tests_say_of_mpirun_is_what_it_sets(kind: str, tmp_path: Path, offline: None) -> None:
    found = launched(kind, tmp_path, 2, "told")
    for one, said in zip(found, launches.mpirun(2, hydra=kind == "mpich"), strict=True):
        free = {"PMIX_NAMESPACE", "OMPI_MCA_orte_hnp_uri", "PMI_FD"}  # what names this launch
        assert {name: one.environ.get(name) for name in said.keys() - free} == {
            name: value for name, value in said.items() if name not in free
        }
        assert all(one.environ.get(name) for name in said.keys() & free)


@pytest.mark.parametrize("kind", KINDS)
def test_a_launch_whose_rank_0_is_killed_is_a_killed_run_with_all_that_was_logged(
    kind: str, tmp_path: Path, otlp_sink: HttpSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mpirun ends the others then."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", otlp_sink.url)
    found = launched(kind, tmp_path, 3, "told", "killed", code=128 + signal.SIGKILL)
    run = next(one.run for one in found if one.left_out == 0)
    until(lambda: otlp_sink.ends(run) == ["KILLED"], LIMIT_S)
    assert [point.iteration for point in otlp_sink.points(run) if point.name == "loss"] == list(range(100))
