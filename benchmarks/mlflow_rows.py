"""How many points a second a real MLflow server takes: from tracelet's exporter, beside MLflow's own client.

    .venv/bin/python benchmarks/mlflow_rows.py [POINTS]

One server with one worker on SQLite, on this machine; both send requests of 999 points over ten names, one at a time.
Also printed: the sender's own processor time a point, since the server's is the same for both.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.mlflow_batches import batch, deliver, opened_exporter, run_info, started
from tests.servers import shared_mlflow

A_REQUEST = 999  # one of the 1,000 that MLflow takes is kept for a marker
NAMES = 10


def rows(points: int) -> list[tuple[str, float, int, int]]:
    """Name, value, iteration, milliseconds after the start."""
    return [(f"m{i % NAMES}", float(i), i // NAMES, i // NAMES) for i in range(points)]


def spent() -> tuple[float, float]:
    """Wall time and this process's processor time, in seconds."""
    return time.perf_counter(), sum(os.times()[:2])


def by_tracelet(uri: str, points: int) -> tuple[float, float]:
    """Seconds, and seconds of processor time, for all points."""
    run, sent = run_info(uuid.uuid4().hex), rows(points)
    exporter = opened_exporter(uri, run)
    deliver(exporter, batch(run, started()))
    wall, cpu = spent()
    for number, first in enumerate(range(0, points, A_REQUEST)):
        deliver(exporter, batch(run, rows=sent[first : first + A_REQUEST], number=number + 2))
    after, used = spent()
    exporter.close()
    return after - wall, used - cpu


def by_mlflow(uri: str, points: int) -> tuple[float, float]:
    """The same by `MlflowClient.log_batch`."""
    import mlflow
    from mlflow.entities import Metric

    client = mlflow.MlflowClient(tracking_uri=uri)
    run = client.create_run("0").info.run_id
    sent, start = rows(points), int(time.time() * 1000)
    wall, cpu = spent()
    for first in range(0, points, A_REQUEST):
        metrics = [Metric(name, value, start + ms, step) for name, value, step, ms in sent[first : first + A_REQUEST]]
        client.log_batch(run, metrics=metrics)
    after, used = spent()
    return after - wall, used - cpu


def main() -> None:
    """Run both and print."""
    points = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    with tempfile.TemporaryDirectory() as folder, shared_mlflow(Path(folder)) as server:
        for what, way in (("tracelet", by_tracelet), ("mlflow's client", by_mlflow)):
            wall, cpu = way(server.uri, points)
            print(f"{what:>16}: {points / wall:>8,.0f} points/s, {cpu / points * 1e6:>6.1f} us of its own a point")


if __name__ == "__main__":
    main()
