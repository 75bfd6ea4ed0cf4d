"""Many points into a real MLflow server: all of them, in order, each request once, no row sent twice."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from tests.mlflow_batches import batch, deliver, exporters_closed, opened_exporter, run_info, started
from tests.servers import MlflowServer, Proxy, recording_proxy, rows_of

__all__ = ["exporters_closed"]


@pytest.fixture
def proxy(mlflow_server: MlflowServer) -> Iterator[Proxy]:
    with recording_proxy(mlflow_server.uri) as recording:
        yield recording


def test_100_000_points_over_10_names_are_stored_in_order_with_their_iteration(
    mlflow_server: MlflowServer, proxy: Proxy
) -> None:
    run = run_info(uuid.uuid4().hex)
    exporter = opened_exporter(proxy.uri, run)
    deliver(exporter, batch(run, started()))
    rows = [(f"m{n}", float(i * 10 + n), i, i) for i in range(10_000) for n in range(10)]
    for number, first in enumerate(range(0, len(rows), 999)):
        deliver(exporter, batch(run, rows=rows[first : first + 999], number=number + 2))
    stored = rows_of(mlflow_server, str(exporter.memory()["run_id"]))
    assert len(stored) == len(rows)
    for n in range(10):
        assert [(r.step, r.value) for r in stored if r.key == f"m{n}"] == [
            (i, float(i * 10 + n)) for i in range(10_000)
        ]
    sent = [seen for seen in proxy.seen if b'"metrics"' in seen.body]
    assert [seen.status for seen in sent] == [200] * -(-len(rows) // 999)  # each once, none halved, none repeated
    assert not [seen for seen in proxy.seen if b"system/tracelet" in seen.body]  # in order, so no marker
