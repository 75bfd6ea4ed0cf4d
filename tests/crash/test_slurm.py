"""The scripts of examples/slurm, run as SLURM does: TERM to the script before its time is over, then the epilog.

Pattern: `srun` on PATH is a stand-in that becomes the program, so that a signal to it is one to training: srun passes
signals on. The end of the job kills what is left of it. SLURM itself can't be had here. Limit: a minute a test.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import processes_of
from tests.crash.clocks import other_clocks
from tests.crash.test_sidecar import points
from tests.shipping import until
from tests.sinks import HttpSink, Say
from tracelet.settings import parse_duration

LIMIT_S = 60.0
SLURM = Path(__file__).parents[2] / "examples" / "slurm"

TRAIN = """
import sys, time, tracelet
exp = tracelet.start_logging(exp_name="job", project="slurm", run_id="run")
for i in range(5000):
    exp.log_metric("loss", 1 / (i + 1), iteration=i)
print("logged", flush=True)
if sys.argv[1:] == ["wait"]:
    time.sleep(600)
sys.exit(int(sys.argv[1]))
"""

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="an epilog runs as root, with util-linux' setpriv"
)


@contextmanager
def job(tmp_path: Path, sink: HttpSink, *words: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """The batch script with these words, as sbatch would start it."""
    programs, work = tmp_path / "programs", tmp_path / "work"
    programs.mkdir(exist_ok=True)
    work.mkdir(exist_ok=True)
    (programs / "srun").write_text('#!/bin/sh\nexec "$@"\n')
    (programs / "srun").chmod(0o755)
    (work / "train.py").write_text(TRAIN)
    environ = {
        **os.environ,
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "OTEL_EXPORTER_OTLP_ENDPOINT": sink.url,
        "SLURM_JOB_ID": "4711",
        "SLURM_NTASKS": "1",
        **variables,
    }
    script = subprocess.Popen(
        ["bash", str(SLURM / "train.sbatch"), *words],
        cwd=work,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert script.stdout is not None
    try:
        yield script
    finally:
        script.kill()
        script.wait()
        script.stdout.close()


def logged(script: subprocess.Popen[str]) -> None:
    assert script.stdout is not None
    assert script.stdout.readline() == "logged\n"


def epilog(spool: Path, uid: int, programs: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The epilog as slurmd starts it: its own environment, nothing of the job's."""
    return subprocess.run(
        ["bash", str(SLURM / "epilog.sh")],
        env={
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_UID": str(uid),
            "SPOOL": str(spool),
            "PROGRAMS": programs,
            **variables,
        },
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def test_the_term_before_the_limit_ends_the_run_as_killed_with_everything_delivered(
    tmp_path: Path, otlp_sink: HttpSink
) -> None:
    with job(tmp_path, otlp_sink, "wait") as script:
        logged(script)
        script.send_signal(signal.SIGTERM)
        assert script.wait(LIMIT_S) == 128 + signal.SIGTERM
    assert points(otlp_sink, "run") == list(range(5000))
    assert otlp_sink.ends("run") == ["KILLED"]


@pytest.mark.parametrize("code", [0, 3])
def test_the_scripts_exit_code_is_trainings(code: int, tmp_path: Path, otlp_sink: HttpSink) -> None:
    with job(tmp_path, otlp_sink, str(code)) as script:
        assert script.wait(LIMIT_S) == code
    assert points(otlp_sink, "run") == list(range(5000))
    until(lambda: otlp_sink.ends("run") == ["FINISHED" if code == 0 else "FAILED"], LIMIT_S)


def test_the_grace_fits_between_the_signal_and_the_limit() -> None:
    text = (SLURM / "train.sbatch").read_text()
    (before,) = re.findall(r"^#SBATCH --signal=B:TERM@(\d+)$", text, re.MULTILINE)
    (grace,) = re.findall(r"^export TRACELET_GRACE=(\S+)$", text, re.MULTILINE)
    assert parse_duration(grace) < float(before)


@needs_root
def test_what_a_job_could_not_deliver_in_time_its_epilog_delivers(
    tmp_path: Path, clean_environment: Path, otlp_sink: HttpSink
) -> None:
    otlp_sink.rule = lambda _: Say(503)
    # The 90 s of grace pass in two.
    clocks = other_clocks(tmp_path / "clocks", faster=45)
    with job(tmp_path, otlp_sink, "wait", **clocks) as script:
        logged(script)
        script.send_signal(signal.SIGTERM)
        assert script.wait(LIMIT_S) == 128 + signal.SIGTERM
        assert script.stdout is not None
        assert "tracelet ship" in script.stdout.read()
    # SLURM kills what a job leaves behind.
    for pid in processes_of(str(tmp_path)):
        os.kill(pid, signal.SIGKILL)
    until(lambda: not processes_of(str(tmp_path)), LIMIT_S)
    otlp_sink.rule = None
    assert points(otlp_sink, "run") == []
    # The installation that a node has: a folder with `tracelet` in it.
    programs = tmp_path / "installed"
    programs.mkdir()
    command = programs / "tracelet"
    command.write_text(
        f'#!/bin/sh\nexport PYTHONPATH="{os.environ.get("PYTHONPATH", "")}"\nexec "{sys.executable}" -m tracelet "$@"\n'
    )
    command.chmod(0o755)
    done = epilog(clean_environment, os.getuid(), f"{programs}:/usr/bin:/bin")
    assert done.returncode == 0, done.stdout + done.stderr
    assert points(otlp_sink, "run") == list(range(5000)), done.stdout + done.stderr
    assert otlp_sink.ends("run") == ["KILLED"]


@needs_root
def test_the_epilog_becomes_the_jobs_user_and_never_fails_the_node() -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)  # another user has to reach it
        (place / "tracelet").write_text('#!/bin/sh\necho "$(id -u) $(id -g) $*"\nexit 1\n')
        (place / "tracelet").chmod(0o755)
        done = epilog(place, 12345, f"{place}:/usr/bin:/bin", SLURM_JOB_GID="12346")
        assert done.stdout.split() == ["12345", "12346", "ship", "--dir", str(place), "--timeout", "50s"]
        assert done.returncode == 0
        assert epilog(place / "never made", 12345, "/usr/bin:/bin").returncode == 0
        missing = epilog(place, 12345, "/usr/bin:/bin")
        assert missing.returncode == 0
        assert "tracelet" in missing.stderr


@pytest.mark.parametrize("file", ["train.sbatch", "epilog.sh"])
def test_the_guides_excerpts_are_the_files_lines(file: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "guide" / "slurm.md").read_text()
    marks = {"train.sbatch": "#!/bin/bash", "epilog.sh": "timeout"}
    shown = page.partition(f"```bash\n{marks[file]}")[2].partition("```")[0]
    lines = (SLURM / file).read_text().splitlines()
    assert shown
    assert [line for line in (marks[file] + shown).splitlines() if line and line not in lines] == []
