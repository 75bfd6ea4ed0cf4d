"""`exp.mlflow()` underneath: a run of ours as MLflow's active run, with mlflow's own client, status untouched."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.mlflow_batches import batch, deliver, ended, exporters_closed, opened_exporter, run_info, started
from tests.servers import MlflowServer
from tracelet.errors import ExportError
from tracelet.exporters.mlflow.active import active_run
from tracelet.exporters.mlflow.native import quiet_mlflow

__all__ = ["exporters_closed"]

with quiet_mlflow():
    import mlflow
    import mlflow.sklearn
    from sklearn.linear_model import LogisticRegression


@pytest.fixture(params=["server", "sqlite"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any]:
    """The address of an MLflow, and an exporter whose run is there."""
    if request.param == "server":
        server: MlflowServer = request.getfixturevalue("mlflow_server")
        uri, spec = server.uri, {}
    else:
        uri, spec = f"sqlite:///{tmp_path}/mlflow.db", {"artifact_root": str(tmp_path / "mlruns")}
    run = run_info(uuid.uuid4().hex)
    exporter = opened_exporter(uri, run, **spec)
    deliver(exporter, batch(run, started()))
    return uri, exporter


@pytest.mark.filterwarnings("ignore::UserWarning:mlflow", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_model_logged_inside_loads_by_the_run_and_the_run_goes_on(made: tuple[str, Any], tmp_path: Path) -> None:
    uri, exporter = made
    run_id = exporter.memory()["run_id"]
    elsewhere = f"sqlite:///{tmp_path}/elsewhere.db"
    mlflow.set_tracking_uri(elsewhere)
    mlflow.set_experiment("another experiment")
    try:
        model = LogisticRegression().fit([[0.0], [1.0]], [0, 1])
        with active_run(uri, run_id) as active:
            assert active.info.run_id == run_id
            assert mlflow.active_run() is active
            mlflow.log_metric("theirs", 1.0, step=3)
            mlflow.sklearn.log_model(model, name="model", pip_requirements=[], serialization_format="cloudpickle")
            loaded = mlflow.sklearn.load_model(f"runs:/{run_id}/model")
            assert loaded.predict([[1.0]]) == [1]
        assert mlflow.active_run() is None
        assert mlflow.get_tracking_uri() == elsewhere == os.environ["MLFLOW_TRACKING_URI"]
        with mlflow.start_run() as own:  # the other experiment is still set
            assert own.info.experiment_id == mlflow.get_experiment_by_name("another experiment").experiment_id
        view = exporter._transport.run(run_id)
        assert (view.status, view.latest["theirs"][2]) == ("RUNNING", 1.0)
        with pytest.raises(ZeroDivisionError), active_run(uri, run_id):
            raise ZeroDivisionError
        with active_run(uri, run_id):
            pass
        assert exporter._transport.run(run_id).status == "RUNNING"
        deliver(exporter, batch(exporter._run.info, ended(), number=2))
        assert exporter._transport.run(run_id).status == "FINISHED"
    finally:
        mlflow.set_tracking_uri(None)
        mlflow.tracking.fluent._active_experiment_id = None
        os.environ.pop("MLFLOW_EXPERIMENT_ID", None)


@pytest.mark.filterwarnings("ignore::UserWarning:mlflow", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_model_is_registered_at_the_same_mlflow_as_the_run_and_loads_by_its_version(made: tuple[str, Any]) -> None:
    uri, exporter = made
    run_id, name = exporter.memory()["run_id"], f"classifier-{uuid.uuid4().hex[:8]}"
    model = LogisticRegression().fit([[0.0], [1.0]], [0, 1])
    with active_run(uri, run_id):
        for _ in range(2):
            mlflow.sklearn.log_model(
                model,
                name="model",
                registered_model_name=name,
                pip_requirements=[],
                serialization_format="cloudpickle",
            )
        assert mlflow.sklearn.load_model(f"models:/{name}/2").predict([[1.0]]) == [1]
    versions = mlflow.MlflowClient(uri).search_model_versions(f"name = '{name}'")
    assert sorted((int(one.version), one.run_id) for one in versions) == [(1, run_id), (2, run_id)]
    view = exporter._transport.run(run_id)
    assert view.status == "RUNNING"


@pytest.mark.filterwarnings("ignore::UserWarning:mlflow", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_registry_that_the_program_has_chosen_is_used_inside_and_still_chosen_afterwards(
    made: tuple[str, Any], tmp_path: Path
) -> None:
    uri, exporter = made
    elsewhere, name = f"sqlite:///{tmp_path}/registry.db", f"classifier-{uuid.uuid4().hex[:8]}"
    mlflow.set_registry_uri(elsewhere)
    try:
        with active_run(uri, exporter.memory()["run_id"]):
            mlflow.register_model("file:///nowhere", name)
        assert mlflow.get_registry_uri() == elsewhere
        assert len(mlflow.MlflowClient(uri, elsewhere).search_model_versions(f"name = '{name}'")) == 1
    finally:
        mlflow.set_registry_uri("")  # None would leave it
        os.environ.pop("MLFLOW_REGISTRY_URI", None)
    assert not mlflow.MlflowClient(uri, uri).search_model_versions(f"name = '{name}'")


def test_a_run_that_is_not_there_is_named_and_nothing_stays_set(made: tuple[str, Any]) -> None:
    before = os.environ.get("MLFLOW_TRACKING_URI"), mlflow.active_run()
    with pytest.raises(ExportError, match="0123456789abcdef"), active_run(made[0], "0123456789abcdef" * 2):
        pass
    assert (os.environ.get("MLFLOW_TRACKING_URI"), mlflow.active_run()) == before
