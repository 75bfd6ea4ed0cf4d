"""One stack for all tests that want the usual one; it lives as long as the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.stack.harness import Stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Prometheus, the collector with collector-config/collector.yaml, MLflow, a gateway; shared: leave it running."""
    with Stack(tmp_path_factory.mktemp("stack")) as running:
        yield running
