"""MLflow by its own client: for the schemes that only mlflow knows, `databricks` and those that plugins bring.

It costs the import of mlflow (4 s, 170 MB) and ten times as much a point as the REST API (0008); it is for what nothing
else reaches. How often a request is tried, and how long, are the client's own settings (MLFLOW_HTTP_REQUEST_*).
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from tracelet.exporters.mlflow.limits import SQL_INFINITY
from tracelet.exporters.mlflow.native import NativeTransport, quiet_mlflow, run_view
from tracelet.exporters.mlflow.traces import NO_TRACES
from tracelet.exporters.mlflow.transport import MetricRow, NotNow, Refused, RunView, Unclear

__all__ = ["ClientTransport"]

_T = TypeVar("_T")

_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_DATABRICKS_ENDPOINT_HTTP_RETRY_TIMEOUT": "10"}

_UNCLEAR = (None, "INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED")
_PERSON = ("UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED")  # has to let us in
_WAIT = ("REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED")


@contextmanager
def _no_patience() -> Iterator[None]:
    """Tell mlflow to come back soon: it tries a busy databricks for 500 s, and a lane has a back-off of its own.

    What somebody has set stays.
    """
    ours = {name: value for name, value in _PATIENCE.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


class ClientTransport(NativeTransport):
    """`mlflow.MlflowClient` as a `Transport`."""

    def __init__(self, uri: str, shown: str) -> None:
        super().__init__(uri, shown)
        self._made: Any = None

    @property
    def client(self) -> Any:
        """mlflow's client, made at first use; what mlflow thinks of the address is said in its own words."""
        if self._made is None:
            try:
                # A plugin that can't be loaded is a warning to mlflow, and its scheme then one that nobody knows.
                with quiet_mlflow(), warnings.catch_warnings(record=True) as heard:
                    warnings.simplefilter("always")
                    from mlflow import MlflowClient

                    self._made = MlflowClient(tracking_uri=self._uri)
            except ImportError as error:
                raise NotNow(
                    f"writing to {self._shown} needs a package that is missing here: {error}; install"
                    " tracelet-otel[mlflow] and what the address needs in the environment of the shipper",
                    loud=True,
                ) from error
            except Exception as error:
                # An address that no plugin serves, a file store, credentials that can't be found: mlflow says which.
                plugins = [str(one.message) for one in heard if "register" in str(one.message)]
                said = "; ".join([self._words(error), *plugins])
                raise NotNow(f"mlflow can't use {self._shown}: {said}", loud=True) from error
        return self._made

    def _do(self, action: Callable[[Any], _T]) -> _T:
        """Run `action` on the client; its failures in our words."""
        client = self.client
        try:
            with _no_patience():
                return action(client)
        except Exception as error:
            # An MlflowException with a code, or what a plugin's or the network's own code raised.
            code = getattr(error, "error_code", None)
            if code in _PERSON:
                raise NotNow(f"{self._shown} forbids this to us: {self._words(error)}", loud=True) from error
            if code in _WAIT:
                raise NotNow(f"{self._shown} asks to wait: {self._words(error)}") from error
            if code in _UNCLEAR:
                raise Unclear(f"{self._shown} is busy or gone: {self._words(error)}") from error
            raise Refused(str(code), self._words(error)) from error

    # ---- Transport -----------------------------------------------------------------------------------------------

    def runs_with_tag(self, experiment_id: str, key: str, value: str) -> Sequence[RunView]:
        """One search."""
        from mlflow.entities import ViewType

        wanted = f"tags.`{key}` = '{value}'"
        found = self._read(
            lambda client: client.search_runs([experiment_id], wanted, run_view_type=ViewType.ALL, max_results=100)
        )
        return sorted((run_view(run) for run in found), key=lambda run: (run.start_time, run.run_id))

    def create_run(
        self, experiment_id: str, user_id: str, start_time: int, run_name: str, tags: Mapping[str, str]
    ) -> RunView:
        """The user is a tag."""
        with_user = {"mlflow.user": user_id, **tags}
        return run_view(
            self._do(lambda c: c.create_run(experiment_id, start_time=start_time, tags=with_user, run_name=run_name))
        )

    def log_metrics(self, run_id: str, rows: Sequence[MetricRow]) -> None:
        """One request."""
        from mlflow.entities import Metric

        metrics = [Metric(key, value, ms, step) for key, value, ms, step in rows]
        self._do(lambda client: client.log_batch(run_id, metrics=metrics, synchronous=True))

    def log_params(self, run_id: str, params: Sequence[tuple[str, str]]) -> None:
        """One request."""
        from mlflow.entities import Param

        made = [Param(key, value) for key, value in params]
        self._do(lambda client: client.log_batch(run_id, params=made, synchronous=True))

    def log_tags(self, run_id: str, tags: Sequence[tuple[str, str]]) -> None:
        """One request."""
        from mlflow.entities import RunTag

        made = [RunTag(key, value) for key, value in tags]
        self._do(lambda client: client.log_batch(run_id, tags=made, synchronous=True))

    def delete_tag(self, run_id: str, key: str) -> None:
        """One request."""
        try:
            self._do(lambda client: client.delete_tag(run_id, key))
        except Refused as no:
            if no.code != "RESOURCE_DOES_NOT_EXIST" or self.run(run_id) is None:
                raise

    def log_spans(self, experiment_id: str, run_id: str, resource_spans: Sequence[bytes]) -> None:
        """Not by this way: the client has no call that takes OTLP spans as they are."""
        raise Refused(NO_TRACES, f"{self._shown} takes no spans that came over a wire")

    def update_run(self, run_id: str, status: str, end_time: int | None) -> None:
        """Without an end time the old one stays."""
        if end_time is None:
            self._do(lambda client: client.update_run(run_id, status=status))
        else:
            self._do(lambda client: client.set_terminated(run_id, status, end_time))

    def has_metric_row(self, run_id: str, row: MetricRow) -> bool:
        """Reads the key's whole history."""
        key, value, ms, step = row
        wanted = {value, max(-SQL_INFINITY, min(SQL_INFINITY, value))}  # stores differ in what they make of infinity
        return any(
            (metric.timestamp, metric.step) == (ms, step)
            and (math.isnan(metric.value) if math.isnan(value) else metric.value in wanted)
            for metric in self._read(lambda client: client.get_metric_history(run_id, key))
        )

    def close(self) -> None:
        """Connections are mlflow's own, shared in this process."""
