"""The demo, for real: what a stranger types first."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sinks import HttpSink, until

ROOT = Path(__file__).parents[2]


def run(*command: str, cwd: Path, **environ: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def verify(folder: Path) -> None:
    verdict = run(sys.executable, str(ROOT / "scripts" / "verify_demo.py"), f"sqlite:///{folder}/mlflow.db", cwd=folder)
    assert "complete" in verdict


def test_the_demo_leaves_a_complete_run_in_mlflows_local_store(tmp_path: Path) -> None:
    output = run(sys.executable, str(ROOT / "examples" / "digits.py"), cwd=tmp_path)
    assert "val_accuracy" in output
    assert f"-m mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db" in output
    verify(tmp_path)
    left = {path.name for path in tmp_path.iterdir()} - {"mlflow.db", "mlruns", "spool"}
    assert not left, "the demo cleans up behind itself"


def test_with_an_otlp_endpoint_the_same_run_leaves_as_otlp_too(tmp_path: Path, otlp_sink: HttpSink) -> None:
    output = run(
        sys.executable, str(ROOT / "examples" / "digits.py"), cwd=tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=otlp_sink.url
    )
    assert "0 waiting, 0 refused" in output
    assert [point.iteration for point in otlp_sink.points() if point.name == "val_loss"] == list(range(1, 41))
    until(lambda: "run digits" in {span.name for span in otlp_sink.spans()}, limit_s=60)
    assert [span.name for span in otlp_sink.spans()].count("validate") == 40
    verify(tmp_path)


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "--net", "--map-root-user", "true"], capture_output=True, check=False).returncode
    != 0,
    reason="needs unshare(1) and permission to make a network namespace",
)
def test_the_demo_works_without_any_network(tmp_path: Path) -> None:
    run("unshare", "--net", "--map-root-user", sys.executable, str(ROOT / "examples" / "digits.py"), cwd=tmp_path)
    verify(tmp_path)
