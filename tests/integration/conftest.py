"""Servers that integration tests share, started once a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers import MlflowServer, shared_mlflow
from tests.sinks import HttpSink


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A real MLflow server with one worker and an sqlite database; one for the whole session."""
    with shared_mlflow(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


@pytest.fixture
def otlp_sink() -> Iterator[HttpSink]:
    """A real OTLP receiver over HTTP, empty at the start of each test."""
    with HttpSink() as sink:
        yield sink
