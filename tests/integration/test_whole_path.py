"""The main job, from `log_metric` to real backends: what was logged stands there, with its iteration, in order."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest

import tracelet
from tests.servers import MlflowServer, rows_of, run_of, start_mlflow
from tests.sinks import HttpSink

METRICS = [f"m{n}" for n in range(10)]


def train(tmp_path: Path, code: str, environ: Mapping[str, str], *, cwd: Path | None = None) -> None:
    """Run training code in an interpreter of its own; it has to end well."""
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=cwd or tmp_path,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_100_000_points_stand_in_mlflow_and_in_otlp_with_their_iteration_in_order(
    tmp_path: Path, mlflow_server: MlflowServer, otlp_sink: HttpSink
) -> None:
    train(
        tmp_path,
        """
        import tracelet
        exp = tracelet.start_logging(exp_name="fast", project="whole-path", backend=["mlflow", "otlp"])
        log = exp.log_metric
        for i in range(10_000):
            for n in range(10):
                log(f"m{n}", i * 10 + n, iteration=i)
        assert exp.flush(timeout=240)
        print(exp.id)
        tracelet.stop_logging()
        """,
        {"MLFLOW_TRACKING_URI": mlflow_server.uri, "OTEL_EXPORTER_OTLP_ENDPOINT": otlp_sink.url},
    )
    run = run_of(mlflow_server, "fast")
    assert run.info.status == "FINISHED"
    sent = otlp_sink.points()
    for n, name in enumerate(METRICS):
        wanted = [(i, float(i * 10 + n)) for i in range(10_000)]
        stored = sorted(rows_of(mlflow_server, run.info.run_id, name), key=lambda row: row.timestamp)
        assert [(row.step, row.value) for row in stored] == wanted
        assert [(p.iteration, p.value) for p in sent if p.name == name] == wanted


def test_100_000_equal_values_without_iteration_are_as_many_rows(tmp_path: Path, mlflow_server: MlflowServer) -> None:
    train(
        tmp_path,
        """
        import tracelet
        exp = tracelet.start_logging(exp_name="equal", project="whole-path", backend="mlflow")
        for _ in range(100_000):
            exp.log_metric("same", 1.0)
        assert exp.flush(timeout=240)
        """,
        {"MLFLOW_TRACKING_URI": mlflow_server.uri},
    )
    run = run_of(mlflow_server, "equal")
    rows = rows_of(mlflow_server, run.info.run_id, "same")
    assert len(rows) == 100_000
    assert len({row.timestamp for row in rows}) == 100_000


def test_program_that_never_calls_stop_is_delivered_and_finished(tmp_path: Path, mlflow_server: MlflowServer) -> None:
    train(
        tmp_path,
        """
        import tracelet
        exp = tracelet.start_logging(exp_name="no-stop", project="whole-path", backend="mlflow")
        exp.log_metric("loss", 0.5, iteration=1)
        """,
        {"MLFLOW_TRACKING_URI": mlflow_server.uri},
    )
    run = run_of(mlflow_server, "no-stop", status="FINISHED")
    assert run.data.metrics == {"loss": 0.5}


@pytest.mark.parametrize(
    ("last_line", "status"),
    [("raise SystemExit(3)", "FAILED"), ("import os; os._exit(0)", "KILLED")],
)
def test_end_the_program_could_not_record_is_seen_from_outside(
    tmp_path: Path, mlflow_server: MlflowServer, last_line: str, status: str
) -> None:
    name = f"outside-{status}"
    script = tmp_path / "train.py"
    script.write_text(
        f"import tracelet\nexp = tracelet.start_logging(exp_name={name!r}, project='whole-path', backend='mlflow')\n"
        f"exp.log_metric('loss', 0.5, iteration=1)\n{last_line}\n"
    )
    subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "MLFLOW_TRACKING_URI": mlflow_server.uri},
        timeout=60,
        check=False,
    )
    run = run_of(mlflow_server, name, status=status)
    assert run.data.metrics == {"loss": 0.5}


def test_two_runs_at_once_land_where_their_own_environment_says(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, mlflow_server: MlflowServer, clean_environment: Path
) -> None:
    other = start_mlflow(tmp_path_factory.mktemp("other-mlflow"))
    try:
        processes = []
        for server, folder, token in ((mlflow_server, "one", "token-1"), (other, "two", "token-2")):
            cwd = tmp_path / folder
            cwd.mkdir()
            (cwd / "train.py").write_text(
                "import tracelet\n"
                "exp = tracelet.start_logging(exp_name='mine', backend='mlflow')\n"
                "for i in range(100):\n    exp.log_metric('loss', i, iteration=i)\n"
                "assert exp.flush(60)\n"
            )
            environ = {**os.environ, "MLFLOW_TRACKING_URI": server.uri, "MLFLOW_TRACKING_TOKEN": token}
            processes.append(subprocess.Popen([sys.executable, "train.py"], cwd=cwd, env=environ))
        assert [process.wait(120) for process in processes] == [0, 0]
        for server, folder in ((mlflow_server, "one"), (other, "two")):
            run = run_of(server, "mine", project=folder, status="FINISHED")
            assert len(rows_of(server, run.info.run_id, "loss")) == 100
    finally:
        other.stop()


def test_relative_database_address_means_the_training_folder(
    tmp_path: Path, clean_environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cwd = tmp_path / "project"
    cwd.mkdir()
    train(
        tmp_path,
        """
        import os, tracelet
        exp = tracelet.start_logging(exp_name="relative", backend="mlflow")
        exp.log_metric("loss", 0.5, iteration=1)
        os.chdir("/")
        assert exp.flush(timeout=120)
        exp.stop(timeout=60)
        """,
        {"MLFLOW_TRACKING_URI": "sqlite:///mine.db"},
        cwd=cwd,
    )
    assert (cwd / "mine.db").is_file()


def test_links_and_backend_ids_are_told(
    tmp_path: Path, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO"), tracelet.start_logging(exp_name="linked", backend="mlflow") as exp:
        exp.log_metric("loss", 1.0, iteration=0)
        run_id = exp.backend_run_id("mlflow", timeout=30)
        links = exp.links(timeout=30)
        exp.links(timeout=30)
    assert run_id is not None
    assert run_id in links["mlflow"]
    assert links["mlflow"].startswith(mlflow_server.uri)
    assert caplog.text.count(links["mlflow"]) == 1


def test_log_model_under_the_active_run_lands_in_the_run_and_the_registry_and_leaves_its_status(
    tmp_path: Path, mlflow_server: MlflowServer
) -> None:
    train(
        tmp_path,
        """
        import warnings
        warnings.simplefilter("ignore")
        import numpy as np, tracelet
        from sklearn.linear_model import LinearRegression
        model = LinearRegression().fit(np.array([[0.0], [1.0]]), [0.0, 1.0])
        with tracelet.start_logging(exp_name="model", project="whole-path", backend="mlflow") as exp:
            with exp.mlflow() as run:
                import mlflow
                mlflow.sklearn.log_model(model, name="model", registered_model_name="whole-path")
                loaded = mlflow.sklearn.load_model(f"runs:/{run.info.run_id}/model")
                assert abs(loaded.predict([[2.0]])[0] - 2.0) < 1e-9
                registered = mlflow.sklearn.load_model("models:/whole-path/1")
                assert abs(registered.predict([[2.0]])[0] - 2.0) < 1e-9
                assert mlflow.get_run(run.info.run_id).info.status == "RUNNING"
            exp.log_metric("after", 1.0, iteration=0)
            assert exp.flush(60)
        """,
        {"MLFLOW_TRACKING_URI": mlflow_server.uri},
    )
    run = run_of(mlflow_server, "model", status="FINISHED")
    assert run.data.metrics["after"] == 1.0
    (version,) = mlflow_server.ask("model-versions/search?filter=name%3D'whole-path'")["model_versions"]
    assert (version["version"], version["run_id"]) == ("1", run.info.run_id)
