"""One of each for all tests that want the usual one: the whole stack, Loki alone. They live as long as the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.stack.harness import Stack
from tests.stack.loki_server import Loki


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Prometheus, the collector with collector-config/collector.yaml, MLflow, a gateway; shared: leave it running."""
    with Stack(tmp_path_factory.mktemp("stack")) as running:
        yield running


@pytest.fixture(scope="session")
def loki(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loki]:
    """Loki with the shipped file; it takes 15 s until it says that it is ready."""
    with Loki(tmp_path_factory.mktemp("loki")) as running:
        yield running
