"""Runs of several processes: one launch is one run, two launches are two, whatever their variables have in common.

Pattern: a launcher that sets what torchrun, srun or Ray set (`tests.launches`) starts real programs; their spools are
read, or MLflow. Limit: two minutes a launch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests import launches
from tests.crash.clocks import other_clocks
from tests.programs import written
from tests.servers import MlflowServer, rows_of, run_of
from tests.shipping import until
from tests.sinks import HttpSink
from tests.spooled import folder_of, read
from tracelet.records import RunStarted, WriterEnded, WriterOpened
from tracelet.spool import store

TRAIN = """
import json, os, sys, warnings
import tracelet
rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
exp = tracelet.start_logging(exp_name="launched", project="identity", backend="file", tags={"from": rank})
exp.log_params({"lr": 0.1})
for step in range(100):
    exp.log_metric("loss", step, iteration=step)
with exp.span("validate"):
    pass
def tell(exp):  # in one write: all ranks share the pipe
    line = json.dumps({"run": exp.id, "rank": rank, "left_out": exp.stats.left_out})
    os.write(1, line.encode() + b"\\n")
tell(exp)
if "twice" in sys.argv:
    tracelet.stop_logging()
    again = tracelet.start_logging(exp_name="launched", project="identity", backend="file")
    tell(again)
if "child" in sys.argv:
    import subprocess
    subprocess.run([sys.executable, sys.argv[0]], check=True)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRACELET_SHIPPER", "off")
    return tmp_path


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(written(folder, TRAIN)), *arguments]


def launch(folder: Path, *rounds: launches.Environs, arguments: Iterable[str] = (), **environ: str) -> list[Any]:
    """What each process of a launch printed."""
    out = launches.done(launches.start(folder, command(folder, *arguments), *rounds, **environ))
    return [json.loads(line) for line in out.splitlines()]


def runs(found: list[Any]) -> set[str]:
    return {one["run"] for one in found}


def manifest_of(spool: Path, run_id: str) -> store.Manifest:
    manifest = store.read_manifest(folder_of(spool, run_id))
    assert manifest is not None
    return manifest


@pytest.mark.parametrize("workers", [launches.torchrun(4), launches.srun(4), launches.ray(4)])
def test_four_ranks_of_one_launch_are_one_run_that_rank_0_logs(
    here: Path, clean_environment: Path, workers: launches.Environs
) -> None:
    found = launch(here, workers)
    (run_id,) = runs(found)
    spooled = read(folder_of(clean_environment, run_id))
    opened = spooled.of(WriterOpened)
    assert sorted((one.rank, one.role) for one in opened) == [(rank, "first") for rank in range(4)]
    assert {one.resource["tracelet.rank"] for one in opened} == {0, 1, 2, 3}
    assert len({one.attempt_key for one in opened}) == len({one.attempt_started_unix_nano for one in opened}) == 1
    assert spooled.values("loss") == [(step, float(step)) for step in range(100)]
    assert len(spooled.of(RunStarted)) == 1
    assert [one.status for one in spooled.of(WriterEnded)] == ["FINISHED"] * 4
    assert sorted((one["rank"], one["left_out"]) for one in found) == [("0", 0), ("1", 101), ("2", 101), ("3", 101)]
    assert len(manifest_of(clean_environment, run_id).attempts) == 1


def test_all_ranks_log_where_that_is_asked_for_and_separate_ones_are_runs(here: Path, clean_environment: Path) -> None:
    (run_id,) = runs(launch(here, launches.torchrun(2), TRACELET_RANKS="all"))
    spooled = read(folder_of(clean_environment, run_id))
    assert len(spooled.values("loss")) == 200
    assert len(spooled.of(RunStarted)) == 1
    assert len(runs(launch(here, launches.srun(4), TRACELET_RANKS="separate"))) == 4


def test_two_launches_with_one_rendezvous_id_are_two_runs_at_once_and_in_turn(here: Path) -> None:
    workers = launches.torchrun(2, rdzv_id="100")
    at_once = [launches.start(here, command(here), workers) for _ in range(2)]
    first, second = ({json.loads(line)["run"] for line in launches.done(one).splitlines()} for one in at_once)
    third = runs(launch(here, workers))
    assert [len(first), len(second), len(third), len(first | second | third)] == [1, 1, 1, 3]


def test_a_second_launch_that_knows_the_same_on_several_machines_is_a_run_of_its_own(
    here: Path, clean_environment: Path
) -> None:
    # Ranks 0 and 1 of four: who launched the others can't be seen from here.
    workers = launches.torchrun(4, rdzv_id="100", address="node-0", here=2)
    found = [runs(launch(here, workers)) for _ in range(3)]
    assert [len(one) for one in found] == [1, 1, 1]
    assert len(set.union(*found)) == 3
    for run_id in set.union(*found):
        assert len(read(folder_of(clean_environment, run_id)).of(WriterOpened)) == 2


def test_a_restart_by_the_launcher_is_the_next_attempt_of_the_run(here: Path, clean_environment: Path) -> None:
    found = launch(here, launches.torchrun(2), launches.torchrun(2, restarts=1), launches.torchrun(2, restarts=2))
    (run_id,) = runs(found)
    attempts = manifest_of(clean_environment, run_id).attempts
    assert [attempt.number for attempt in attempts] == [1, 2, 3]
    assert len({attempt.key for attempt in attempts}) == 3
    assert len(read(folder_of(clean_environment, run_id)).values("loss")) == 300


def test_a_restart_that_another_node_has_counted_is_the_next_attempt_here_too(
    here: Path, clean_environment: Path
) -> None:
    # Ranks 0 and 1 of four, started by one agent three times; the second failure alone was one of this node.
    before, after = (launches.torchrun(4, rdzv_id="100", address="node-0", here=2, restarts=count) for count in (0, 1))
    (run_id,) = runs(launch(here, before, before, after))
    attempts = manifest_of(clean_environment, run_id).attempts
    assert [(attempt.number, sorted(attempt.extra["launch"]["ranks"])) for attempt in attempts] == [
        (number, ["0", "1"]) for number in (1, 2, 3)
    ]
    assert len(read(folder_of(clean_environment, run_id)).values("loss")) == 300


def test_a_restart_with_more_ranks_and_no_count_joins_nobody(here: Path) -> None:
    # torchrun does not count restarts for a change of members.
    found = launch(here, launches.torchrun(2), launches.torchrun(3))
    assert sorted([one["run"] for one in found].count(run) for run in runs(found)) == [2, 3]


def test_steps_of_a_job_are_runs_and_a_requeued_job_takes_them_up_again(here: Path, clean_environment: Path) -> None:
    first, second = (runs(launch(here, launches.srun(2, step=step))) for step in range(2))
    assert len(first | second) == 2
    assert runs(launch(here, launches.srun(2, step=0, restarts=1))) == first
    assert runs(launch(here, launches.srun(2, step=1, restarts=1))) == second
    (run_id,) = first
    assert [attempt.number for attempt in manifest_of(clean_environment, run_id).attempts] == [1, 2]


def test_ten_trials_in_one_allocation_are_ten_runs(here: Path) -> None:
    plain = [[launches.batch(tasks=8)] for _ in range(4)]
    steps = [launches.srun(1, step=step) for step in range(3)]
    launched = [{**launches.batch(), **one} for one in launches.torchrun(2)]
    found = launch(here, *plain, *steps)
    assert len(runs(found)) == 7
    agents = [runs(launch(here, launched)) for _ in range(3)]  # one torchrun after another, all on its default port
    assert [len(one) for one in agents] == [1, 1, 1]
    assert len(runs(found).union(*agents)) == 10


def test_first_jobs_of_two_ray_clusters_are_two_runs(here: Path) -> None:
    found = [runs(launch(here, launches.ray(2, port=port))) for port in (40001, 40001, 40002)]
    assert len(set.union(*found)) == 3


def test_ranks_behind_wrapper_scripts_find_one_another(here: Path) -> None:
    wrapper = here / "wrapper.sh"
    wrapper.write_text('#!/bin/sh\n"$@"\nexit $?\n')
    wrapper.chmod(0o700)
    out = launches.done(launches.start(here, [str(wrapper), str(wrapper), *command(here)], launches.torchrun(3)))
    assert len({json.loads(line)["run"] for line in out.splitlines()}) == 1


@pytest.mark.parametrize("workers", [launches.torchrun(2), launches.torchrun(4, address="node-0", here=2)])
def test_a_second_run_in_each_process_and_programs_that_ranks_start_are_runs_of_their_own(
    here: Path, workers: launches.Environs
) -> None:
    found = launch(here, workers, arguments=["twice", "child"])
    assert sorted([one["run"] for one in found].count(run) for run in runs(found)) == [2, 2, 2]


BELOW = """
import json, os, subprocess, sys, time
from pathlib import Path
import tracelet
of, begun = sys.argv[1], Path(sys.argv[2])
if of == "rank" and os.environ["RANK"] == "1":
    while not begun.exists():  # until the program that rank 0 starts has begun its run
        time.sleep(0.01)
exp = tracelet.start_logging(exp_name="late", project="identity", backend="file")
os.write(1, json.dumps({"run": exp.id, "of": of}).encode() + b"\\n")
if of == "rank":
    subprocess.run([sys.executable, sys.argv[0], "program", sys.argv[2]], check=True)
    begun.touch()
"""


@pytest.mark.parametrize("workers", [launches.torchrun(2), launches.torchrun(4, address="node-0", here=2)])
def test_a_rank_that_begins_after_a_program_of_another_rank_has_its_own_ranks_run(
    here: Path, workers: launches.Environs
) -> None:
    program = [sys.executable, str(written(here, BELOW)), "rank", str(here / "begun")]
    found = [json.loads(line) for line in launches.done(launches.start(here, program, workers)).splitlines()]
    ranks, programs = (runs([one for one in found if one["of"] == of]) for of in ("rank", "program"))
    assert (len(found), len(ranks), len(programs), len(ranks | programs)) == (4, 1, 1, 2)


def test_a_run_id_that_is_given_holds_for_all_ranks_and_for_the_next_launch(
    here: Path, clean_environment: Path
) -> None:
    for _ in range(2):
        assert runs(launch(here, launches.torchrun(2), TRACELET_RUN_ID="named")) == {"named"}
    attempts = manifest_of(clean_environment, "named").attempts
    assert [attempt.number for attempt in attempts] == [1, 2]
    assert [sorted(attempt.extra["launch"]["ranks"]) for attempt in attempts] == [["0", "1"], ["0", "1"]]


ENDING = """
import os, signal, sys, tracelet
exp = tracelet.start_logging(exp_name=sys.argv[1], project="identity", backend="mlflow")
rank = int(os.environ["RANK"])
for step in range(500):
    exp.log_metric("loss", step, iteration=step)
if sys.argv[2] == "killed" and rank == 0:
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "other killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
tracelet.stop_logging()
"""


@pytest.mark.parametrize(("how", "status"), [("stop", "FINISHED"), ("killed", "KILLED"), ("other killed", "FINISHED")])
def test_a_launch_is_one_run_in_mlflow_whose_end_is_that_of_rank_0(
    tmp_path: Path, mlflow_server: MlflowServer, how: str, status: str
) -> None:
    name = f"launch {how}"
    launcher = launches.start(
        tmp_path,
        [sys.executable, str(written(tmp_path, ENDING)), name, how],
        launches.torchrun(3),
        MLFLOW_TRACKING_URI=mlflow_server.uri,
    )
    launches.done(launcher)
    run = run_of(mlflow_server, name, project="identity", status=status, within_s=60)
    assert len(rows_of(mlflow_server, run.info.run_id, "loss")) == 500
    found = mlflow_server.ask("runs/search", {"experiment_ids": [run.info.experiment_id], "max_results": 100})
    assert [one["info"]["run_name"] for one in found["runs"]].count(name) == 1


LATE = """
import os, pathlib, sys, time, tracelet
over = pathlib.Path("over")
rank = int(os.environ["RANK"])
if rank == 0 and "never" in sys.argv:
    sys.exit(0)
while rank == 0 and not over.exists():  # reads its data for longer than the others are at work
    time.sleep(0.01)
exp = tracelet.start_logging(exp_name="late", project="identity")
for step in range(100):
    exp.log_metric("loss", step, iteration=step)
if rank == int("never" in sys.argv):
    print(exp.id, flush=True)
exp.stop("FAILED" if rank == 0 else "FINISHED")
if rank == 1:
    over.touch()
"""


def test_a_rank_0_that_starts_when_all_others_are_over_still_gives_the_run_its_end(
    tmp_path: Path, otlp_sink: HttpSink
) -> None:
    command = [sys.executable, str(written(tmp_path, LATE))]
    launcher = launches.start(tmp_path, command, launches.torchrun(2), OTEL_EXPORTER_OTLP_ENDPOINT=otlp_sink.url)
    run_id = launches.done(launcher).strip()
    until(lambda: bool(otlp_sink.ends(run_id)), 60.0)
    assert otlp_sink.ends(run_id) == ["FAILED"]
    assert [point.iteration for point in otlp_sink.points(run_id)] == list(range(100))


def test_a_launch_whose_rank_0_never_begins_ends_all_the_same(tmp_path: Path, otlp_sink: HttpSink) -> None:
    command = [sys.executable, str(written(tmp_path, LATE)), "never"]
    clocks = other_clocks(tmp_path / "clocks", faster=10)
    workers = launches.torchrun(2)
    launcher = launches.start(tmp_path, command, workers, OTEL_EXPORTER_OTLP_ENDPOINT=otlp_sink.url, **clocks)
    run_id = launches.done(launcher).strip()
    until(lambda: otlp_sink.ends(run_id) == ["FINISHED"], 60.0)
