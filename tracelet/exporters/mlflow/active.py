"""Makes a run of ours MLflow's active run in the training process, and leaves its status to us.

Reached from the client by this module's name, when `exp.mlflow()` is called; imports mlflow.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tracelet.errors import ExportError, IntegrationUnavailable

__all__ = ["active_run", "need_mlflow"]


def need_mlflow() -> None:
    """Import mlflow, which takes some seconds the first time.

    Raises:
        IntegrationUnavailable: it is not installed.
    """
    try:
        import mlflow  # noqa: F401
    except ImportError as error:
        raise IntegrationUnavailable(
            "exp.mlflow() needs mlflow here: install tracelet-otel[mlflow]", package="mlflow"
        ) from error


@contextmanager
def active_run(tracking_uri: str, run_id: str) -> Iterator[Any]:
    """MLflow's active run is `run_id` at `tracking_uri` inside the block; yields the `mlflow.ActiveRun`.

    `mlflow.log_*`, `mlflow.sklearn.log_model` and the like write to it. On leaving, the run keeps its status and stays
    open: tracelet ends it. What was set before (tracking URI, experiment, active runs) is put back, also after an
    exception. Of this thread, as MLflow's own active run.

    Raises:
        IntegrationUnavailable: mlflow is not installed.
        ExportError: MLflow does not have the run, or can't be reached.
    """
    need_mlflow()
    import mlflow
    from mlflow.tracking import fluent as untyped_fluent
    from mlflow.tracking._tracking_service import utils as tracking_service

    # mlflow.start_run(run_id=...) would write to the run, refuse it where another experiment is set or a run is active,
    # and end it on leaving (so it would be FINISHED while we still write). What it does to make a run active is to put
    # it on this stack; there is no public way to do only that.
    fluent: Any = untyped_fluent
    runs: list[Any] = fluent._active_run_stack.get()
    with _put_back(fluent, tracking_service):
        mlflow.set_tracking_uri(tracking_uri)
        try:
            run = mlflow.MlflowClient().get_run(run_id)
        except Exception as error:
            # An MlflowException, or what requests or the database raised below it.
            raise ExportError(
                f"MLflow can't show run {run_id}: {type(error).__name__}: {error}", run_id=run_id
            ) from error
        active = fluent.ActiveRun(run)
        fluent._active_experiment_id = run.info.experiment_id  # for what looks for the experiment, not for the run
        runs.append(active)
        try:
            yield active
        finally:
            while any(one is active for one in runs):
                runs.pop()  # ours, and what the block started above it and left open


@contextmanager
def _put_back(fluent: Any, tracking_service: Any) -> Iterator[None]:
    """Put MLflow's module state, and the variables it sets beside it, back as they were."""
    uri, experiment = tracking_service._tracking_uri, fluent._active_experiment_id
    variables = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID")}
    try:
        yield
    finally:
        fluent._active_experiment_id = experiment
        tracking_service.set_tracking_uri(uri)
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
