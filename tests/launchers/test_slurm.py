"""Jobs of a real SLURM: their limits, ends, epilogs and requeues, and what is one run among their tasks.

Pattern: munged, slurmctld and two slurmd are started (`tests.slurm_cluster`), and the scripts of examples/slurm, or
jobs of the tests' own, are submitted as a user submits them. SLURM itself ends them, by its own signals, in its own
order. Limit: two minutes for whatever is waited for; SLURM looks every 30 s whether a time limit is near.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests import launches
from tests.conftest import processes_of, stop
from tests.crash.clocks import other_clocks
from tests.shipping import until
from tests.sinks import HttpSink, Say
from tests.slurm_cluster import LIMIT_S, Cluster, cluster
from tests.spooled import folder_of, read
from tests.system import system_program
from tracelet.records import WriterOpened
from tracelet.settings import parse_duration

SLURM = Path(__file__).parents[2] / "examples" / "slurm"
SCRIPTS = ("train.sbatch", "tasks.sbatch")

TRAIN = """
import os, signal, sys, time, tracelet
exp = tracelet.start_logging(exp_name="job", project="slurm")
if sys.argv[2:] == ["handler"]:  # as the guide has it
    def handler(*_):
        open("checkpoint", "w").close()
        exp.log_metric("rescued", 1.0, iteration=1)
        exp.stop("KILLED")
        sys.exit(0)
    signal.signal(signal.SIGTERM, handler)
for i in range(5000):
    exp.log_metric("loss", 1 / (i + 1), iteration=i)
open(f"logged-{os.environ['SLURM_PROCID']}", "w").close()
if sys.argv[1] == "wait":
    time.sleep(600)
sys.exit(int(sys.argv[1]))
"""

# Each process tells in a file of its own which run it is in, and what it was started with.
TASK = """
import json, os, pathlib, sys, time, tracelet
exp = tracelet.start_logging(exp_name="task", project="slurm")
for step in range(100):
    exp.log_metric("loss", step, iteration=step)
facts = {"label": sys.argv[1], "run": exp.id, "left_out": exp.stats.left_out, "environ": dict(os.environ)}
told = pathlib.Path(f"{os.getpid()}-{time.time_ns()}.telling")
told.write_text(json.dumps(facts))
told.rename(told.with_suffix(".told"))
if "wait" in sys.argv and "SLURM_RESTART_COUNT" not in os.environ:
    time.sleep(600)
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="an epilog runs as root")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster() as running:
        (running.work / "train.py").write_text(TRAIN)
        (running.work / "task.py").write_text(TASK)
        (running.work / "launcher.py").write_text(launches.LAUNCHER)
        yield running


def train(
    slurm: Cluster, sink: HttpSink, run: str, *options: str, script: str = "train.sbatch", words: tuple[str, ...] = (),
    **more: str,
) -> str:  # fmt: skip
    """The id of a job of a script of examples/slurm that has logged what it logs, and waits for its end."""
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": sink.url, "TRACELET_RUN_ID": run, **more}
    job = slurm.submit(SLURM / script, "wait", *words, options=options, **variables)
    tasks = 4 if script == "tasks.sbatch" else 1
    slurm.until(job, lambda: len(list(slurm.at(job).glob("logged-*"))) == tasks)
    return job


def points(sink: HttpSink, run: str) -> list[int]:
    return [point.iteration for point in sink.points(run) if point.name == "loss"]


# ---- how a job ends ----------------------------------------------------------------------------------------------


def test_the_term_before_the_limit_ends_the_run_as_killed_with_everything_delivered(
    slurm: Cluster, otlp_sink: HttpSink
) -> None:
    """120 s before the limit, say the scripts: in a job of two minutes that is when SLURM looks next."""
    jobs = {script: train(slurm, otlp_sink, f"limit-{script}", "--time=2", script=script) for script in SCRIPTS}
    for script, job in jobs.items():
        facts = slurm.ended(job)
        # srun tells of its tasks' end by its code.
        code = f"0:{signal.SIGTERM:d}" if script == "train.sbatch" else f"{128 + signal.SIGTERM}:0"
        assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", code), slurm.output(job)
        assert points(otlp_sink, f"limit-{script}") == list(range(5000))
        assert otlp_sink.ends(f"limit-{script}") == ["KILLED"]


def test_a_job_that_is_cancelled_leaves_its_run_killed_with_everything_delivered(
    slurm: Cluster, otlp_sink: HttpSink
) -> None:
    """SLURM sends TERM to every process of the job once, and KILL after 30 s (KillWait)."""
    jobs = {script: train(slurm, otlp_sink, f"cancelled-{script}", script=script) for script in SCRIPTS}
    slurm.scancel(*jobs.values())
    for script, job in jobs.items():
        assert slurm.ended(job)["JobState"] == "CANCELLED"
        assert points(otlp_sink, f"cancelled-{script}") == list(range(5000)), slurm.output(job)
        assert otlp_sink.ends(f"cancelled-{script}") == ["KILLED"]


def test_a_handler_of_the_programs_own_ends_the_run_as_killed_with_what_it_logged_itself(
    slurm: Cluster, otlp_sink: HttpSink
) -> None:
    job = train(slurm, otlp_sink, "handled", words=("handler",))
    slurm.scancel("--batch", "--signal=TERM", job)  # as `--signal=B:TERM@120` does
    facts = slurm.ended(job)
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), slurm.output(job)
    assert (slurm.at(job) / "checkpoint").exists()
    assert points(otlp_sink, "handled") == list(range(5000))
    assert [point.name for point in otlp_sink.points("handled")][5000:] == ["rescued"]
    assert otlp_sink.ends("handled") == ["KILLED"]


def test_the_jobs_exit_code_is_trainings(slurm: Cluster, otlp_sink: HttpSink) -> None:
    ends = {"0": "FINISHED", "3": "FAILED"}
    jobs = {}
    for code, script in product(ends, SCRIPTS):
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": otlp_sink.url, "TRACELET_RUN_ID": f"{code}-{script}"}
        jobs[code, f"{code}-{script}"] = slurm.submit(SLURM / script, code, **variables)
    for (code, run), job in jobs.items():
        assert slurm.ended(job)["ExitCode"] == f"{code}:0", slurm.output(job)
        assert points(otlp_sink, run) == list(range(5000))
        until(lambda run=run, code=code: otlp_sink.ends(run) == [ends[code]], LIMIT_S)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_grace_fits_between_the_signal_and_the_limit(script: str) -> None:
    text = (SLURM / script).read_text()
    (before,) = re.findall(r"^#SBATCH --signal=(?:B:)?TERM@(\d+)$", text, re.MULTILINE)
    (grace,) = re.findall(r"^export TRACELET_GRACE=(\S+)$", text, re.MULTILINE)
    assert parse_duration(grace) < float(before)


# ---- the epilog --------------------------------------------------------------------------------------------------


def test_what_a_job_could_not_deliver_in_time_its_epilog_delivers(slurm: Cluster, otlp_sink: HttpSink) -> None:
    """slurmd runs it, as root, with its own environment; the job and its runs are another user's."""
    otlp_sink.rule = lambda _: Say(503)
    clocks = slurm.folder / "clocks"
    other_clocks(clocks, faster=45)  # the 90 s of grace pass in two
    # A file of the user's own, which only a shell under his id may run: it tells who read it.
    credentials = slurm.place.owned("work/.config", slurm.user) / "tracelet" / "credentials"
    slurm.place.owned("work/.config/tracelet", slurm.user)
    credentials.write_text(
        'OTEL_EXPORTER_OTLP_HEADERS=Authorization=Bearer%20s3cret\nid -u > "$HOME/.config/tracelet/read-by"\n'
    )
    credentials.chmod(0o600)
    os.chown(credentials, slurm.user.pw_uid, slurm.user.pw_gid)
    job = train(slurm, otlp_sink, "left", PYTHONPATH=str(clocks))
    slurm.epilog_waits()
    slurm.scancel("--batch", "--signal=TERM", job)
    slurm.until(job, lambda: "tracelet ship" in slurm.output(job))
    slurm.until(job, lambda: slurm.facts(job)["JobState"] == "COMPLETING")
    if not slurm.holds_jobs:
        stop(processes_of(str(slurm.spool)))  # as a cgroup does
    until(lambda: not processes_of(str(slurm.spool)), LIMIT_S)
    assert otlp_sink.stored == []
    assert not any("authorization" in one.headers for one in otlp_sink.requests)  # the job has no token
    otlp_sink.rule = None
    slurm.epilog_goes_on()
    slurm.ended(job)
    assert points(otlp_sink, "left") == list(range(5000)), slurm.epilog_said()
    assert {one.headers.get("authorization") for one in otlp_sink.stored} == {"Bearer s3cret"}
    assert credentials.with_name("read-by").read_text() == f"{slurm.user.pw_uid}\n"
    assert "s3cret" not in slurm.epilog_said()
    assert otlp_sink.ends("left") == ["KILLED"]
    assert {path.stat().st_uid for path in slurm.spool.rglob("*")} == {slurm.user.pw_uid}
    assert slurm.user.pw_uid != os.getuid()


@needs_root
def test_the_epilog_becomes_the_jobs_user_and_never_fails_the_node() -> None:
    system_program("setpriv")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)  # another user has to reach it
        (place / "tracelet").write_text('#!/bin/sh\necho "$(id -u) $(id -g) $*"\nexit 1\n')
        (place / "tracelet").chmod(0o755)
        done = epilog(place, f"{place}:/usr/bin:/bin", SLURM_JOB_GID="12346")
        assert done.stdout.split() == ["12345", "12346", "ship", "--dir", str(place), "--timeout", "50s"]
        assert done.returncode == 0
        assert epilog(place / "never made", "/usr/bin:/bin").returncode == 0
        missing = epilog(place, "/usr/bin:/bin")
        assert missing.returncode == 0
        assert "tracelet" in missing.stderr


def epilog(spool: Path, programs: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The epilog as slurmd starts it: its own environment, nothing of the job's."""
    return subprocess.run(
        ["bash", str(SLURM / "epilog.sh")],
        env={
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_UID": "12345",
            "SPOOL": str(spool),
            "PROGRAMS": programs,
            **variables,
        },
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


# ---- what is one run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """What a process of a job said."""

    label: str
    run: str
    left_out: int
    environ: Mapping[str, str]


def told(slurm: Cluster, job: str, label: str | None = None) -> list[Told]:
    """What the processes of a job said, by the task's number."""
    found = [Told(**json.loads(path.read_text())) for path in slurm.at(job).glob("*.told")]
    return sorted((one for one in found if label in (None, one.label)), key=lambda one: one.environ["SLURM_PROCID"])


def runs(found: Iterable[Told]) -> set[str]:
    return {one.run for one in found}


def torchrun(label: str) -> str:
    """A command line that does what a torchrun on one machine does, and starts this task twice."""
    asked = json.dumps([["python", "task.py", label], [launches.torchrun(2)]])
    return f"python launcher.py {shlex.quote(asked)}"


@pytest.fixture(scope="module")
def allocation(slurm: Cluster) -> str:
    """A job on two nodes that has started much: steps of two and four tasks, trials of every kind."""
    script = f"""
    export TRACELET_SHIPPER=off TRACELET_BACKEND=file
    srun -N1 -n4 python task.py four
    srun -N2 -n4 python task.py spread
    srun -N1 -n2 python task.py first
    srun -N1 -n2 python task.py second
    for trial in 1 2 3 4; do python task.py trial; done
    for trial in 1 2 3; do srun -N1 -n1 python task.py trial; done
    for trial in 1 2 3; do {torchrun("trial")}; done
    """
    job = slurm.submit(script, options=("-N2", "--ntasks-per-node=4"))
    assert slurm.ended(job)["ExitCode"] == "0:0", slurm.output(job)
    return job


@pytest.mark.parametrize("label", ["four", "spread"])
def test_four_tasks_of_a_step_are_one_run_that_task_0_logs(label: str, slurm: Cluster, allocation: str) -> None:
    found = told(slurm, allocation, label)
    (run,) = runs(found)
    assert [one.left_out for one in found] == [0, 100, 100, 100]
    spooled = read(folder_of(slurm.spool, run))
    assert sorted(one.rank for one in spooled.of(WriterOpened)) == [0, 1, 2, 3]
    assert spooled.values("loss") == [(step, float(step)) for step in range(100)]


def test_two_steps_of_a_job_are_two_runs(slurm: Cluster, allocation: str) -> None:
    first, second = (runs(told(slurm, allocation, label)) for label in ("first", "second"))
    assert (len(first), len(second), len(first | second)) == (1, 1, 2)


def test_ten_trials_in_one_allocation_are_ten_runs(slurm: Cluster, allocation: str) -> None:
    found = told(slurm, allocation, "trial")
    assert (len(found), len(runs(found))) == (13, 10)  # three of the trials are of two processes


def test_the_tasks_of_a_job_array_are_runs_of_their_own(slurm: Cluster) -> None:
    script = "export TRACELET_SHIPPER=off TRACELET_BACKEND=file\nsrun -n2 python task.py array"
    job = slurm.submit(script, options=("--array=0-2", "-n2"))
    for task in range(3):
        slurm.ended(f"{job}_{task}", job)
    found = told(slurm, job)
    assert (len(found), len(runs(found))) == (6, 3)
    assert {one.environ["SLURM_ARRAY_JOB_ID"] for one in found} == {job}
    assert job in {one.environ["SLURM_JOB_ID"] for one in found}  # one of them has the array's own id


def test_what_the_other_tests_say_of_srun_is_what_it_sets(slurm: Cluster, allocation: str) -> None:
    for label, nodes, step in (("four", 1, 0), ("spread", 2, 1)):
        said = launches.srun(4, job=allocation, step=step, nodes=nodes)
        for one, expected in zip(told(slurm, allocation, label), said, strict=True):
            assert {name: one.environ.get(name) for name in expected} == expected
    plain = [one.environ for one in told(slurm, allocation, "trial") if "SLURM_STEP_ID" not in one.environ]
    assert plain
    expected = {**launches.batch(job=allocation, tasks=8), "SLURM_NNODES": "2"}
    assert {name: plain[0].get(name) for name in expected} == expected
    assert "SLURM_STEP_NUM_TASKS" not in plain[0]


# ---- a requeued job ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Requeued:
    """A job that was started, requeued in its second step, and started again to its end; and what arrived."""

    told: list[Told]
    sink: HttpSink

    def by(self, label: str) -> tuple[list[Told], list[Told]]:
        """What its processes said in the first start, and in the second."""
        found = [one for one in self.told if one.label == label]
        first = [one for one in found if "SLURM_RESTART_COUNT" not in one.environ]
        return first, [one for one in found if one not in first]


@pytest.fixture(scope="module")
def requeued(slurm: Cluster) -> Iterator[Requeued]:
    script = f"""
    srun -n2 python task.py first
    {torchrun("agent")}
    TRACELET_RUN_ID=job-$SLURM_JOB_ID {torchrun("named")}
    srun -n2 python task.py second wait
    """
    with HttpSink() as sink:
        job = slurm.submit(script, options=("-n2", "--requeue"), OTEL_EXPORTER_OTLP_ENDPOINT=sink.url)
        slurm.until(job, lambda: len(told(slurm, job, "second")) == 2)
        slurm.scontrol("requeue", job)
        slurm.until(job, lambda: slurm.facts(job)["JobState"] == "PENDING")
        slurm.scontrol("update", f"JobId={job}", "StartTime=now")  # a requeued job waits for two minutes
        assert slurm.ended(job)["ExitCode"] == "0:0", slurm.output(job)
        yield Requeued(told(slurm, job), sink)


@pytest.mark.parametrize(("label", "ends"), [("first", ["FINISHED", "FINISHED"]), ("second", ["KILLED", "FINISHED"])])
def test_a_requeued_job_takes_its_steps_runs_up_again_as_their_next_attempts(
    label: str, ends: list[str], slurm: Cluster, requeued: Requeued
) -> None:
    before, after = requeued.by(label)
    (run,) = runs(before)
    assert runs(after) == {run}
    assert points(requeued.sink, run) == [*range(100), *range(100)]
    assert requeued.sink.ends(run) == ends
    for found, restarts in ((before, None), (after, 1)):
        (said,) = {(one.environ["SLURM_JOB_ID"], int(one.environ["SLURM_STEP_ID"])) for one in found}
        for one, expected in zip(found, launches.srun(2, job=said[0], step=said[1], restarts=restarts), strict=True):
            assert {name: one.environ.get(name) for name in expected} == expected


def test_a_torchrun_of_a_requeued_job_is_a_new_run_unless_the_job_names_it(requeued: Requeued) -> None:
    before, after = requeued.by("agent")
    assert (len(runs(before)), len(runs(after)), len(runs(before + after))) == (1, 1, 2)
    before, after = requeued.by("named")
    (run,) = runs(before)
    assert runs(after) == {run} == {f"job-{before[0].environ['SLURM_JOB_ID']}"}
    assert requeued.sink.ends(run) == ["FINISHED", "FINISHED"]


# ---- mpirun in a job ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["openmpi", "mpich"])
def test_two_launches_by_mpirun_over_the_nodes_of_a_job_are_two_runs(kind: str, slurm: Cluster) -> None:
    """mpirun starts a daemon on each node by srun, and srun's numbers are those of the daemons."""
    lo = "--oversubscribe --mca oob_tcp_if_include lo" if kind == "openmpi" else "-iface lo"
    command = f"{system_program(f'mpirun.{kind}')} -n 4 {lo} python task.py"
    script = f"export TRACELET_SHIPPER=off TRACELET_BACKEND=file\n{command} one\n{command} other"
    job = slurm.submit(script, options=("-N2", "--ntasks-per-node=2"))
    assert slurm.ended(job)["ExitCode"] == "0:0", slurm.output(job)
    one, other = (told(slurm, job, label) for label in ("one", "other"))
    assert (len(one), len(other)) == (4, 4)
    assert {found.environ["SLURM_STEP_NUM_TASKS"] for found in one} == {"2"}
    (first,), (second,) = runs(one), runs(other)
    assert first != second
    for run in (first, second):
        spooled = read(folder_of(slurm.spool, run))
        assert sorted(found.rank for found in spooled.of(WriterOpened)) == [0, 1, 2, 3]
        assert len(spooled.values("loss")) == 100


# ---- the guide ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [*SCRIPTS, "epilog.sh"])
def test_the_guides_excerpts_are_the_files_lines(file: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "guide" / "slurm.md").read_text()
    excerpts: list[Any] = re.findall(
        r"^<!-- not run: examples/slurm/(\S+);.*?-->\n```bash\n(.*?)```", page, re.M | re.S
    )
    shown = [line for name, text in excerpts if name == file for line in text.splitlines()]
    lines = (SLURM / file).read_text().splitlines()
    assert shown
    assert [line for line in shown if line and line not in lines] == []
