"""mlflow's own code, by its store or by its client: a quiet import, its runs in our words, and what both ways share."""

from __future__ import annotations

import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tracelet.exporters.mlflow.transport import ExperimentView, NotNow, Refused, RunView, Unclear

__all__ = ["NativeTransport", "quiet_mlflow", "run_view"]

_T = TypeVar("_T")


@contextmanager
def quiet_mlflow() -> Iterator[None]:
    """Import mlflow inside: without its telemetry, and without the warnings that its packages give on import."""
    before = os.environ.get("MLFLOW_DISABLE_TELEMETRY")
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if before is None:
            del os.environ["MLFLOW_DISABLE_TELEMETRY"]
        else:
            os.environ["MLFLOW_DISABLE_TELEMETRY"] = before


def run_view(run: Any) -> RunView:
    """A run as mlflow has it, in our words."""
    latest = {
        metric.key: (metric.step, metric.timestamp, 0.0 if math.isnan(metric.value) else metric.value)
        for metric in run.data._metric_objs
    }
    return RunView(
        run_id=run.info.run_id,
        experiment_id=str(run.info.experiment_id),
        start_time=run.info.start_time or 0,
        status=run.info.status,
        deleted=run.info.lifecycle_stage == "deleted",
        artifact_uri=run.info.artifact_uri or "",
        latest=latest,
        params=dict(run.data.params),
        tags=dict(run.data.tags),
    )


class NativeTransport(ABC):
    """The calls of a `Transport` that mlflow's store and its client have by the same names."""

    _lines: int | None = None  # how many of an error are for people; None: all

    def __init__(self, uri: str, shown: str) -> None:
        """`shown` is the address without credentials."""
        self._uri = uri
        self._shown = shown

    @abstractmethod
    def _do(self, action: Callable[[Any], _T]) -> _T:
        """Run `action` on mlflow's object; its failures in our words."""

    def _read(self, action: Callable[[Any], _T]) -> _T:
        """The same for what changes nothing: it can be asked again, whatever became of it."""
        try:
            return self._do(action)
        except Unclear as error:
            raise NotNow(error.reason) from error

    def _words(self, error: Exception) -> str:
        text = " ".join(" ".join(str(error).splitlines()[: self._lines]).split())
        password = urlsplit(self._uri).password
        if password:
            text = text.replace(password, "***")  # before the cut, which might leave a part of it
        return f"{type(error).__name__}: {text[:500]}"

    def experiment_by_name(self, name: str) -> ExperimentView | None:
        """Deleted ones too, where the store tells of them."""
        found = self._unless_gone(lambda native: native.get_experiment_by_name(name))
        if found is None:
            return None
        return ExperimentView(str(found.experiment_id), found.lifecycle_stage == "deleted")

    def create_experiment(self, name: str) -> None:
        """Somebody else's creation at the same moment is as good."""
        try:
            self._do(lambda native: native.create_experiment(name))
        except Refused as no:
            if no.code != "RESOURCE_ALREADY_EXISTS":
                raise

    def run(self, run_id: str) -> RunView | None:
        """One request; of a database 3 ms at any size of the run."""
        found = self._unless_gone(lambda native: native.get_run(run_id))
        return None if found is None else run_view(found)

    def delete_run(self, run_id: str) -> None:
        """One request, or one transaction."""
        self._do(lambda native: native.delete_run(run_id))

    def _unless_gone(self, action: Callable[[Any], Any]) -> Any:
        try:
            return self._read(action)
        except Refused as no:
            if no.code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
