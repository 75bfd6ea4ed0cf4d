"""How fast a gateway's inside takes points, each request on the disk before it is acknowledged.

    python benchmarks/gateway_intake.py [--points 1000] [--requests 500] [--threads 1 4 16] [--folder DIR]

Prints for each number of senders: requests and points a second, and the time a request waits (median, 99 %). `decode`
is the pure cost of the request's bytes to columns, `no flush` the same without the disk. No destination is served.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from array import array
from pathlib import Path
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from tracelet import ids
from tracelet.exporters.base import RetryLater
from tracelet.gateway.intake import Caller, Intake
from tracelet.otlp.arrival import Decoded
from tracelet.otlp.decode import decode_metrics
from tracelet.otlp.encode import PointsLoad, resource_bytes
from tracelet.records import PointBatch

START = 1_760_000_000_000_000_000


def bodies(run_id: str, requests: int, points: int) -> list[bytes]:
    """Requests as a run's own shipper sends them."""
    attempt = ids.new_attempt_key()
    resource = resource_bytes(
        {
            "service.name": "bench",
            "service.instance.id": ids.instance_id(run_id, attempt, 0),
            "tracelet.project": "bench",
            "tracelet.experiment.name": "bench",
            "tracelet.run.id": run_id,
            "tracelet.run.name": "bench",
            "tracelet.run.attempt": attempt,
            "tracelet.rank": 0,
            "tracelet.wire.version": "1.0",
        }
    )
    made = []
    for request in range(requests):
        first = request * points
        batch = PointBatch(
            {0: "loss", 1: "accuracy"},
            array("Q", [START + (first + i) * 1_000_000 for i in range(points)]),
            array("d", [1.0 / (first + i + 1) for i in range(points)]),
            array("q", [first + i for i in range(points)]),
            array("I", [i & 1 for i in range(points)]),
        )
        made.append(PointsLoad.of(resource, batch).encode())
    return made


class _Away:
    """A destination that is never there: only the intake is measured."""

    linger_s, max_points, rising_limit_s = 1.0, 1000, None

    def open(self, *_: Any) -> RetryLater:
        return RetryLater("not measured", after_s=3600.0)

    def close(self) -> None:
        pass


def measure(folder: Path, senders: list[list[Decoded]], *, sync: bool) -> tuple[float, list[float]]:
    """Seconds for all, and how long each request waited."""
    destination = {"id": "away", "kind": "memory", "spec": {}}
    intake = Intake(folder, [destination], {}, {}, sync=sync, build=lambda *_: _Away())  # type: ignore[arg-type]
    intake.start()
    waits: list[float] = []

    def send(mine: list[Decoded]) -> None:
        for one in mine:
            began = time.perf_counter()
            intake.take(one, Caller())
            waits.append(time.perf_counter() - began)

    threads = [threading.Thread(target=send, args=(mine,)) for mine in senders]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    intake.close()
    return took, waits


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: a temporary folder")
    options = parser.parse_args()
    print(f"{options.requests} requests of {options.points} points")
    for count in options.threads:
        raw = [bodies(ids.new_run_id(), options.requests // count, options.points) for _ in range(count)]
        began = time.perf_counter()
        senders = [[decode_metrics(ExportMetricsServiceRequest.FromString(body)) for body in mine] for mine in raw]
        decoding = time.perf_counter() - began
        total = sum(len(mine) for mine in senders)
        print(f"{count:3} senders  decode     {decoding / total / options.points * 1e6:7.3f} us/point")
        for name, sync in (("no flush", False), ("flushed", True)):
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                took, waits = measure(Path(folder), senders, sync=sync)
            print(
                f"{count:3} senders  {name:9}  {total / took:7.0f} requests/s {total * options.points / took:10.0f}"
                f" points/s   a request waits {statistics.median(waits) * 1e3:6.2f} ms,"
                f" 99 %: {statistics.quantiles(waits, n=100)[98] * 1e3:6.2f} ms"
            )


if __name__ == "__main__":
    main()
