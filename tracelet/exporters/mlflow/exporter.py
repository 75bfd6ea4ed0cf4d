"""The MLflow destination: finds or makes the run, keeps what is known of it, and hands out deliveries."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from tracelet.addresses import without_credentials
from tracelet.destinations import is_by_client, tracking_uri
from tracelet.exporters.base import Answer, Delivered, Delivery, RetryLater
from tracelet.exporters.mlflow.artifacts import ArtifactStore
from tracelet.exporters.mlflow.connection import Connection
from tracelet.exporters.mlflow.delivery import MLflowDelivery
from tracelet.exporters.mlflow.fetch import Sources
from tracelet.exporters.mlflow.limits import EXPERIMENT_NAME_CHARS, POINTS_PER_BATCH
from tracelet.exporters.mlflow.mapping import RUN_TAG
from tracelet.exporters.mlflow.names import capped, encodable
from tracelet.exporters.mlflow.rest import RestTransport
from tracelet.exporters.mlflow.state import RunState
from tracelet.exporters.mlflow.transport import NotNow, Refused, RunView, Transport, first_of
from tracelet.records import Batch, Heartbeat, RunInfo

__all__ = ["MLflowExporter"]


class MLflowExporter:
    """One run in one MLflow.

    `spec`: {"tracking_uri": absolute, without credentials; "artifact_root": folder for artifacts of a database's new
    experiments; for what came over the wire "artifact_dir": the gateway's folder, "artifact_prefixes": addresses below
    which it may open files, "artifact_max_bytes": the largest that it copies}. `secrets`: {"tracking_uri": the address
    with credentials}, or {} if it has none.

    Guarantees: a batch of points is stored whole or not at all, and is never sent again while it may be stored; params
    and tags are set again without effect; artifacts are replaced by themselves.

    Raises:
        ConfigError: an artifact prefix that can't be one.
    """

    max_points = POINTS_PER_BATCH
    linger_s = 1.0
    rising_limit_s: float | None = None  # a row's key is (key, ms, step, value): equal values need their own ms

    def __init__(self, spec: Mapping[str, Any], secrets: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        self._public_uri = str(spec["tracking_uri"])
        self._spec = spec
        self._environ = environ
        self._uri = _with_credentials(spec, secrets, environ)
        self._transport, self._connection = _transport(self._uri, spec, environ)
        self._artifacts = ArtifactStore(self._connection, environ, Sources(spec), self._uri)
        self._run: RunState | None = None

    def open(self, run: RunInfo, memory: Mapping[str, Any]) -> Answer:
        """Find the experiment, and the run if it was made before; the run is made with the first batch."""
        try:
            self._run = self._find(run, memory)
        except NotNow as error:
            return RetryLater(error.reason, error.after_s, error.loud)
        except Refused as no:
            return RetryLater(f"MLflow refuses to open experiment {run.project!r}: {no}", loud=True)
        return Delivered()

    def memory(self) -> Mapping[str, Any]:
        """{"run_id", "experiment_id", "artifact_uri", "link"} once the run exists, and "noted_unix_nano" once a gateway
        has noted a state; before, {}."""
        view = self._run.view if self._run is not None else None
        if self._run is None or view is None:
            return {}
        noted = self._run.noted_unix_nano
        return {
            "run_id": view.run_id,
            "experiment_id": view.experiment_id,
            "artifact_uri": without_credentials(view.artifact_uri),
            "link": self._link(view),
            **({"noted_unix_nano": noted} if noted else {}),
        }

    def begin(self, batch: Batch, note: Mapping[str, Any] | None = None) -> Delivery:
        """`open` has to have answered `Delivered` before."""
        if self._run is None:
            raise RuntimeError("begin() before open() was answered with Delivered")
        return MLflowDelivery(self._transport, self._artifacts, self._run, batch, note)

    def limit(self, until: float | None) -> None:
        """Ask the server nothing after `until` (of the monotonic clock), and wait for no answer longer. A database has
        limits of its own."""
        if self._connection is not None:
            self._connection.until = until

    def beat(self, batch: Batch, heartbeat: Heartbeat) -> None:
        """Nothing: MLflow has no sign of life, and a tag every 30 s would be a row's rewrite for nobody."""

    def close(self) -> None:
        """Let the connection or the database go."""
        self._transport.close()

    def _find(self, run: RunInfo, memory: Mapping[str, Any]) -> RunState:
        name = capped(encodable(run.project), EXPERIMENT_NAME_CHARS)
        found = self._transport.experiment_by_name(name)
        if found is None:
            self._transport.create_experiment(name)
            found = self._transport.experiment_by_name(name)
        if found is None:
            raise NotNow(f"MLflow created experiment {name!r} but doesn't find it by its name")
        if found.deleted:
            raise NotNow(
                f"the MLflow experiment {name!r} (id {found.experiment_id}) is deleted: restore it (`mlflow experiments"
                f" restore -x {found.experiment_id}`) or remove it for good; the data waits in the spool",
                loud=True,
            )
        view = self._known(run, memory, found.experiment_id)
        if view is not None and view.deleted:
            raise NotNow(
                f"the MLflow run {view.run_id} is deleted: restore it (`mlflow runs restore --run-id {view.run_id}`);"
                " the data waits in the spool",
                loud=True,
            )
        state = RunState(run, found.experiment_id, view)
        state.noted_unix_nano = int(memory.get("noted_unix_nano", 0))
        return state

    def _known(self, run: RunInfo, memory: Mapping[str, Any], experiment_id: str) -> RunView | None:
        known = memory.get("run_id")
        if known is not None:
            view = self._transport.run(known)
            if view is None:
                raise NotNow(
                    f"MLflow at {self._public_uri} no longer has run {known}, to which earlier data of this run went;"
                    " is it the right server and database? The data waits in the spool",
                    loud=True,
                )
            return view
        found = first_of(self._transport.runs_with_tag(experiment_id, RUN_TAG, run.run_id))
        return self._transport.run(found.run_id) if found is not None else None

    def _link(self, view: RunView) -> str:
        if self._public_uri.startswith("databricks"):
            host = self._environ.get("DATABRICKS_HOST", "").rstrip("/") or "databricks:"
            return f"{host}/ml/experiments/{view.experiment_id}/runs/{view.run_id}"
        if self._connection is not None:
            return f"{self._public_uri.rstrip('/')}/#/experiments/{view.experiment_id}/runs/{view.run_id}"
        return f"mlflow ui --backend-store-uri {shlex.quote(self._public_uri)}"  # a plugin's scheme, too


def _with_credentials(spec: Mapping[str, Any], secrets: Mapping[str, Any], environ: Mapping[str, str]) -> str:
    """The full address: the shipper's secrets know it, else the environment of who ships later may."""
    uri = tracking_uri({"spec": spec}, secrets)
    own = environ.get("MLFLOW_TRACKING_URI", "").strip()
    if uri == spec["tracking_uri"] and own and without_credentials(own).rstrip("/") == uri.rstrip("/"):
        return own
    return uri


def _transport(uri: str, spec: Mapping[str, Any], environ: Mapping[str, str]) -> tuple[Transport, Connection | None]:
    parts = urlsplit(uri)
    scheme = parts.scheme.lower()
    if scheme in ("http", "https"):
        given = {"username": unquote(parts.username or ""), "password": unquote(parts.password or "")}
        connection = Connection(without_credentials(uri), given, environ)
        return RestTransport(connection), connection
    if not is_by_client(uri):
        from tracelet.exporters.mlflow.store import DatabaseTransport

        return DatabaseTransport(uri, spec.get("artifact_root")), None
    from tracelet.exporters.mlflow.client import ClientTransport

    return ClientTransport(uri, without_credentials(uri)), None
