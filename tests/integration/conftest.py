"""Servers that integration tests share, started once a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers import MLflowServer, mlflow_server


@pytest.fixture(scope="session")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    """A real MLflow server with one worker and an sqlite database."""
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as server:
        yield server
