"""The wheel, in an empty environment without extras: it installs, imports light, and logs a run."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LOG_A_RUN = """
import logging, sys
logging.basicConfig(level="INFO")
import tracelet
with tracelet.Experiment("packaged", project="packaging", backend=tracelet.File(path="run.jsonl")) as exp:
    exp.log_params({"learning_rate": 0.1})
    for step in range(1000):
        exp.log_metric("loss", 1 / (step + 1), iteration=step)
    assert exp.flush(timeout=60), exp.stats
assert "mlflow" not in sys.modules and "numpy" not in sys.modules
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an empty environment with the wheel and what it requires; from the package index."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    venv.create(folder, with_pip=True)
    interpreter = folder / "bin" / "python"
    done = subprocess.run(
        [
            str(interpreter),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--constraint",
            str(ROOT / "constraints.txt"),
            str(wheel),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return interpreter


def test_the_wheel_holds_the_package_its_types_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "tracelet/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"tracelet"}
    assert wheel.name.startswith("tracelet_otel-")


def test_alone_it_stays_light(python: Path) -> None:
    listed = subprocess.run(
        [str(python), "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True
    )
    names = {package["name"].lower() for package in json.loads(listed.stdout)}
    assert "tracelet-otel" in names
    assert not names & {"mlflow", "mlflow-skinny", "numpy", "pandas", "scikit-learn", "sqlalchemy"}


def test_a_run_is_logged_and_delivered_without_any_extra(python: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(python), "-c", LOG_A_RUN], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    points = [
        point["gauge"]["dataPoints"]
        for line in lines
        for resource in line.get("resourceMetrics", [])
        for scope in resource["scopeMetrics"]
        for point in scope["metrics"]
        if point["name"] == "loss"
    ]
    values = [point for part in points for point in part if "asDouble" in point]  # the last one says: no more to come
    assert [int(point["attributes"][0]["value"]["intValue"]) for point in values] == list(range(1000))


def test_the_command_is_there(python: Path, tmp_path: Path) -> None:
    for command in ([str(python.with_name("tracelet"))], [str(python), "-m", "tracelet"]):
        done = subprocess.run([*command, "--version"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("tracelet ")
