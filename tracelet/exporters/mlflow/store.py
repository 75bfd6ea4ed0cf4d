"""An MLflow database through mlflow's own store: for sqlite, PostgreSQL and the like, in the shipper's process alone.

This and `client` (and `active`, which runs in training) import mlflow, and late: it costs 4 s and 170 MB.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tracelet.addresses import without_credentials
from tracelet.exporters.mlflow.limits import SQL_INFINITY
from tracelet.exporters.mlflow.native import NativeTransport, quiet_mlflow, run_view
from tracelet.exporters.mlflow.transport import MetricRow, NotNow, Refused, RunView, Unclear

__all__ = ["DatabaseTransport", "artifact_repository"]

_T = TypeVar("_T")
_ANALYZE_FROM_ROWS = 50_000
_HISTORY_PAGE = 25_000


@contextmanager
def _no_retries() -> Iterator[None]:
    """mlflow tries a database that is away for 100 s before it says so; the shipper has a back-off of its own."""
    import mlflow.store.db.utils as untyped_utils

    utils: Any = untyped_utils
    before = getattr(utils, "MAX_RETRY_COUNT", None)
    utils.MAX_RETRY_COUNT = 0
    try:
        yield
    finally:
        utils.MAX_RETRY_COUNT = before


def artifact_repository(artifact_uri: str, tracking_uri: str | None = None) -> Any:
    """mlflow's client of the store behind `artifact_uri`; some ask the tracking server for the way there."""
    try:
        with quiet_mlflow():
            from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

            return get_artifact_repository(artifact_uri, tracking_uri)
    except Exception as error:
        # ImportError for a missing SDK, and whatever else a store's SDK raises without its credentials.
        raise NotNow(
            f"the artifacts of this run are at {urlsplit(artifact_uri).scheme}://, which needs mlflow and that store's"
            f" package here: {type(error).__name__}: {error}",
            loud=True,
        ) from error


class DatabaseTransport(NativeTransport):
    """The tracking store in a database. `artifact_root` is where files of experiments made here go."""

    _lines = 1  # SQLAlchemy's others are the statement and its values

    def __init__(self, uri: str, artifact_root: str | None) -> None:
        super().__init__(uri, without_credentials(uri))
        self._is_sqlite = uri.partition(":")[0].partition("+")[0] == "sqlite"
        self._artifact_root = artifact_root
        self._store: Any = None
        self._analyzed = False
        self._rows_sent = 0

    # ---- the store -----------------------------------------------------------------------------------------------

    @property
    def store(self) -> Any:
        """mlflow's SqlAlchemyStore, made at first use: 4 to 6 s, and a new database gets its tables."""
        if self._store is None:
            try:
                with quiet_mlflow():
                    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

                    for name in ("alembic", "mlflow.store.db.utils"):
                        logging.getLogger(name).setLevel(logging.CRITICAL)  # schema steps, one traceback a busy moment
                    made: Any = SqlAlchemyStore
                    with self._one_at_a_time(), _no_retries():
                        self._store = made(self._uri, self._root())
            except ImportError as error:
                raise NotNow(
                    f"writing to {self._shown} needs a package that is missing here: {error}; install"
                    " tracelet-otel[mlflow] and the database's driver in the environment of the shipper",
                    loud=True,
                ) from error
            except Exception as error:
                # Anything from a wrong password to a newer schema; the texts are SQLAlchemy's and mlflow's.
                raise self._later(error, loud="out-of-date" in str(error)) from error
        return self._store

    def _root(self) -> str:
        if self._artifact_root is not None:
            return self._artifact_root
        if self._is_sqlite:
            return str(Path(self._uri.partition(":///")[2].partition("?")[0]).parent / "mlruns")
        return os.path.abspath("mlruns")

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """mlflow makes the tables of a new database without a lock; two runs starting at once would collide."""
        name = hashlib.sha256(self._shown.encode()).hexdigest()[:16]
        with open(os.path.join(tempfile.gettempdir(), f"tracelet-mlflow-{os.getuid()}-{name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _later(self, error: Exception, *, loud: bool = False) -> NotNow:
        return NotNow(f"the MLflow database {self._shown} can't be used: {self._words(error)}", loud=loud)

    def _do(self, action: Callable[[Any], _T]) -> _T:
        """Run `action` on the store; its failures in our words."""
        store = self.store
        try:
            return action(store)
        except Exception as error:
            # MlflowException with a code, or what the database's driver raised on the way.
            code = getattr(error, "error_code", None)
            if code in (None, "TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR"):
                raise Unclear(f"the MLflow database {self._shown} is busy or gone: {self._words(error)}") from error
            raise Refused(str(code), self._words(error)) from error

    # ---- Transport -----------------------------------------------------------------------------------------------

    def runs_with_tag(self, experiment_id: str, key: str, value: str) -> Sequence[RunView]:
        """One query."""
        from mlflow.entities import ViewType

        found = self._read(
            lambda store: store.search_runs([experiment_id], f"tags.`{key}` = '{value}'", ViewType.ALL, max_results=100)
        )
        return sorted((run_view(run) for run in found), key=lambda run: (run.start_time, run.run_id))

    def create_run(
        self, experiment_id: str, user_id: str, start_time: int, run_name: str, tags: Mapping[str, str]
    ) -> RunView:
        """One transaction."""
        from mlflow.entities import RunTag

        named = [RunTag(key, value) for key, value in tags.items()]
        run = self._do(lambda store: store.create_run(experiment_id, user_id, start_time, named, run_name))
        return run_view(run)

    def log_metrics(self, run_id: str, rows: Sequence[MetricRow]) -> None:
        """One transaction."""
        from mlflow.entities import Metric

        metrics = [Metric(key, value, ms, step) for key, value, ms, step in rows]
        self._do(lambda store: store.log_batch(run_id, metrics, [], []))
        self._rows_sent += len(rows)
        self._analyze_once()

    def log_params(self, run_id: str, params: Sequence[tuple[str, str]]) -> None:
        """One transaction."""
        from mlflow.entities import Param

        self._do(lambda store: store.log_batch(run_id, [], [Param(key, value) for key, value in params], []))

    def log_tags(self, run_id: str, tags: Sequence[tuple[str, str]]) -> None:
        """One transaction."""
        from mlflow.entities import RunTag

        self._do(lambda store: store.log_batch(run_id, [], [], [RunTag(key, value) for key, value in tags]))

    def delete_tag(self, run_id: str, key: str) -> None:
        """One transaction."""
        try:
            self._do(lambda store: store.delete_tag(run_id, key))
        except Refused as no:
            if no.code != "RESOURCE_DOES_NOT_EXIST" or "No tag" not in no.message:
                raise

    def log_spans(self, experiment_id: str, run_id: str, resource_spans: Sequence[bytes]) -> None:
        """As MLflow's server does it: one transaction for the spans, one for the links."""
        from tracelet.exporters.mlflow.store_spans import entities

        spans, ended = entities(resource_spans)
        if spans:
            self._do(lambda store: store.log_spans(experiment_id, spans))
        if ended:
            self._do(lambda store: store.link_traces_to_run(ended, run_id))

    def update_run(self, run_id: str, status: str, end_time: int | None) -> None:
        """Without an end time the old one stays, as with MLflow's own client."""
        from mlflow.entities import RunStatus

        def update(store: Any) -> None:
            end = store.get_run(run_id).info.end_time if end_time is None else end_time
            store.update_run_info(run_id, RunStatus.from_string(status), end, None)

        self._do(update)

    def has_metric_row(self, run_id: str, row: MetricRow) -> bool:
        """Pages through the key's history."""
        key, value, ms, step = row
        wanted = max(-SQL_INFINITY, min(SQL_INFINITY, value))
        token = None
        while True:
            asked = token
            page = self._read(lambda store: store.get_metric_history(run_id, key, _HISTORY_PAGE, asked))  # noqa: B023
            for metric in page:
                same = math.isnan(metric.value) if math.isnan(value) else metric.value == wanted
                if same and (metric.timestamp, metric.step) == (ms, step):
                    return True
            token = page.token
            if not token:
                return False

    def close(self) -> None:
        """Give the pool's connections back; the engine itself is mlflow's, shared in this process."""
        if self._store is not None:
            self._store.engine.dispose()

    def _analyze_once(self) -> None:
        """Give sqlite's planner statistics once the table is large: a repeat costs 0.4 instead of 19 ms a row."""
        if not self._is_sqlite or self._analyzed or self._rows_sent < _ANALYZE_FROM_ROWS:
            return
        self._analyzed = True
        from sqlalchemy import text

        try:
            with self.store.engine.connect() as connection:
                connection.execute(text("PRAGMA analysis_limit = 1000"))
                connection.execute(text("ANALYZE metrics"))
                connection.commit()
        except Exception as error:  # noqa: BLE001
            # It is about speed alone, and a busy database has better things to do.
            logging.getLogger("tracelet").debug("ANALYZE metrics failed: %s", self._words(error))
