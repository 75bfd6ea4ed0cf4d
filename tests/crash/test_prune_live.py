"""`tracelet prune` beside a living run and its shipper: whatever KEEP says, nothing undelivered goes.

Pattern: a real program and shipper, the real command with KEEP=0 again and again, a server that is down and then well.
Limit: 60 s; the file some 10 s.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.crash.test_disk_full import delivered
from tests.shipping import until
from tests.sinks import HttpSink, Say
from tests.spooled import folder_of
from tracelet.shipper.process import ship
from tracelet.spool.lease import shipper_alive

PROGRAM = """
import sys, tracelet
exp = tracelet.start_logging(exp_name="pruned", project="p", backend=tracelet.OTLP(sys.argv[1]), keep="0s,0B")
for i in range(200_000):
    exp.log_metric("loss", float(i), iteration=i)
print("logged", flush=True)
sys.stdin.readline()
exp.stop(timeout=20)
"""


def tracelet(*arguments: str, answer: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tracelet", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, input=answer)


def test_prune_takes_nothing_undelivered_beside_a_living_run(
    tmp_path: Path, clean_environment: Path, otlp_sink: HttpSink
) -> None:
    down = True
    otlp_sink.rule = lambda _: Say(status=503) if down and len(otlp_sink.points()) >= 50_000 else None
    command = [sys.executable, "-c", PROGRAM, otlp_sink.url]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, stdin=pipe, stdout=pipe, text=True) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        assert program.stdout.readline() == "logged\n"
        folder = folder_of(clean_environment)
        until(lambda: len(otlp_sink.points()) >= 50_000)
        for _ in range(3):
            assert tracelet("prune", "--keep", "0s,0B").returncode == 0
        refused = tracelet("prune", "--undelivered", folder.parent.name, "--yes")
        assert refused.returncode == 1
        assert "is being written by 1 process: not deleted" in refused.stderr
        down = False
        program.stdin.write("\n")
        program.stdin.close()
        for _ in range(3):
            assert tracelet("prune", "--keep", "0s,0B").returncode == 0
        assert program.wait(60) == 0
    until(lambda: shipper_alive(folder) is None, 60)
    assert sorted(point.iteration for point in otlp_sink.points()) == list(range(200_000))


def test_prune_undelivered_leaves_a_run_that_is_being_shipped(
    tmp_path: Path, clean_environment: Path, otlp_sink: HttpSink
) -> None:
    otlp_sink.rule = lambda _: Say(status=503)
    code = PROGRAM.replace("sys.stdin.readline()\n", "").replace("timeout=20", "timeout=0")
    done = subprocess.run(
        [sys.executable, "-c", code, otlp_sink.url], cwd=tmp_path, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    folder = folder_of(clean_environment)
    shipper = until(lambda: shipper_alive(folder), 60)
    refused = tracelet("prune", "--undelivered", folder.parent.name, "--yes")
    assert refused.returncode == 1
    assert f"is being shipped by process {shipper}: stop it first; not deleted" in refused.stderr
    otlp_sink.rule = None
    until(lambda: shipper_alive(folder) is None, 60)
    assert sorted(point.iteration for point in otlp_sink.points()) == list(range(200_000))


def test_an_undelivered_run_waits_whatever_keep_says_and_goes_when_it_is_delivered(
    tmp_path: Path, clean_environment: Path
) -> None:
    code = PROGRAM.replace("tracelet.OTLP(sys.argv[1])", "'file', shipper='off'").replace("200_000", "70_000")
    code = code.replace("sys.stdin.readline()\n", "")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    folder = folder_of(clean_environment)
    before = sorted(path.name for path in folder.iterdir())
    assert tracelet("prune", "--keep", "0s,0B").returncode == 0
    asked = tracelet("prune", "--undelivered", folder.parent.name)
    assert asked.returncode != 0
    assert "there is no terminal to ask at" in asked.stderr
    assert "70,000 points" in asked.stdout
    assert sorted(path.name for path in folder.iterdir() if path.name != "shipper.lock") == before
    assert ship(folder, follow=True, timeout_s=30).complete
    assert len(delivered(tmp_path / "tracelet.otlp.jsonl")) == 70_000
    assert tracelet("prune", "--keep", "0s,0B").returncode == 0
    assert not folder.exists()
