"""`tracelet prune` and KEEP beside living runs and their shippers: whatever KEEP says, nothing undelivered goes.

Pattern: a real program and shipper, the real command with KEEP=0 again and again, a server that is down and then well;
the same where a person names a destination more meanwhile. Limit: 60 s a command; the file some 30 s.
"""

from __future__ import annotations

import os
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


def tracelet(*arguments: str, answer: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tracelet", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, input=answer, env={**os.environ, **environ}
    )


def iterations(sink: HttpSink, run_id: str | None = None) -> list[int]:
    return sorted(point.iteration for point in sink.points(run_id))


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
    assert iterations(otlp_sink) == list(range(200_000))


def test_a_destination_that_is_named_while_the_run_goes_on_gets_what_prune_would_have_deleted(
    tmp_path: Path, clean_environment: Path, otlp_sink: HttpSink
) -> None:
    pipe = subprocess.PIPE
    with (
        HttpSink() as second,
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, otlp_sink.url], cwd=tmp_path, stdin=pipe, stdout=pipe, text=True
        ) as program,
    ):
        assert program.stdin is not None
        assert program.stdout is not None
        assert program.stdout.readline() == "logged\n"
        folder = folder_of(clean_environment)
        until(lambda: len(list((folder / "delivered").glob("*.points"))) == 6, 60)  # of seven; the last is written to
        second.rule = lambda _: Say(status=503)
        run_id = folder.parent.name
        named = tracelet("ship", run_id, "--to", "otlp", "--timeout", "1", OTEL_EXPORTER_OTLP_ENDPOINT=second.url)
        assert named.returncode == 1, named.stdout
        until(lambda: second.requests)
        for _ in range(3):
            assert tracelet("prune", "--keep", "0s,0B").returncode == 0
        assert len(list((folder / "delivered").glob("*.points"))) == 6
        second.rule = None
        program.stdin.write("\n")
        program.stdin.close()
        assert program.wait(60) == 0
        until(lambda: shipper_alive(folder) is None, 60)
        assert iterations(second) == iterations(otlp_sink) == list(range(200_000))
    assert tracelet("prune", "--keep", "0s,0B").returncode == 0
    assert not folder.exists()


def test_a_destination_that_is_named_after_the_run_gets_what_prune_and_the_keep_of_other_runs_would_have_deleted(
    tmp_path: Path, clean_environment: Path, otlp_sink: HttpSink
) -> None:
    keeps_nothing = PROGRAM.replace("sys.stdin.readline()\n", "").replace("200_000", "70_000")
    kept = keeps_nothing.replace('keep="0s,0B"', 'run_id="kept"')

    def train(code: str) -> None:
        subprocess.run([sys.executable, "-c", code, otlp_sink.url], cwd=tmp_path, timeout=60, check=True)
        until(lambda: all(shipper_alive(path) is None for path in clean_environment.glob("*/*")), 60)

    with HttpSink() as second:
        second.rule = lambda _: Say(status=503)
        train(kept)
        folder = folder_of(clean_environment, "kept")
        assert len(list((folder / "delivered").glob("*.points"))) == 3
        named = tracelet("ship", "kept", "--to", "otlp", "--timeout", "1", OTEL_EXPORTER_OTLP_ENDPOINT=second.url)
        assert named.returncode == 1, named.stdout
        train(keeps_nothing)
        assert tracelet("prune", "--keep", "0s,0B").returncode == 0
        assert [path.name for path in clean_environment.iterdir()] == ["kept"], "the other run is gone, and whole"
        assert len(list((folder / "delivered").glob("*.points"))) == 3
        second.rule = None
        shipped = tracelet("ship", "kept")
        assert shipped.returncode == 0, shipped.stdout
        assert iterations(second) == iterations(otlp_sink, "kept") == list(range(70_000))
    assert tracelet("prune", "--keep", "0s,0B").returncode == 0
    assert not folder.exists()


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
