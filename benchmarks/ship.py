"""From the spool to a destination in memory: 100,000 points over 10 names, through the whole shipper.

    python benchmarks/ship.py [POINTS]

Prints the points a second for one lane as OTLP uses it and as MLflow does (batches of 1,000, journaled each), what
the stamps alone cost with and without numpy, and the processor time of a shipper that has nothing to do.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from array import array
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.shipping import add_attempt, end, open_writer, ship, shipment
from tracelet.shipper import stamps
from tracelet.testing import InMemoryExporter

NAMES = 10


def lane(points: int, max_points: int, rising_limit_s: float | None) -> float:
    """Points a second from the first look at a finished run to its end's delivery."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "run" / "host-boot"
        writer = open_writer(folder, add_attempt(folder, "a"))
        names = [f"m{i}" for i in range(NAMES)]
        for i in range(points):
            writer.log(names[i % NAMES], float(i), i)
        end(writer)
        exporter = InMemoryExporter(max_points=max_points, rising_limit_s=rising_limit_s)
        started = time.perf_counter()
        outcome = ship(folder, {"a": exporter})
        took = time.perf_counter() - started
        assert outcome.complete
        assert outcome.delivered == {"memory-a": points}
        assert [value for _, value, _, _ in exporter.store.points()] == [float(i) for i in range(points)]
        return points / took


def stamping(points: int) -> tuple[float, float]:
    """Microseconds a point, with numpy and without."""
    now = time.time_ns()
    times, ids = array("Q", [now + i * 300 for i in range(points)]), array("I", [i % NAMES for i in range(points)])
    took = []
    for way in (stamps.rise_by_numpy, stamps.rise_by_python):
        started = time.perf_counter()
        way(times, ids, {}, 60_000)
        took.append((time.perf_counter() - started) / points * 1e6)
    return took[0], took[1]


def idle(seconds: float) -> float:
    """Processor time of a shipper beside a program that logs nothing, as a share of one core."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "run" / "host-boot"
        writer = open_writer(folder, add_attempt(folder, "a", "b"))
        writer.log("loss", 1.0, 0)
        running = shipment(folder, {"a": InMemoryExporter(), "b": InMemoryExporter()})
        stop = threading.Event()
        before = sum(os.times()[:2])
        running.run(follow=True, stop=stop, timeout_s=seconds)
        used = sum(os.times()[:2]) - before
        running.close()
        return used / seconds


def main() -> None:
    """Run all and print."""
    points = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    for what, size, limit in (("OTLP", 16_000, 60.0), ("MLflow", 1_000, None)):
        best = max(lane(points, size, limit) for _ in range(3))
        print(f"a lane with batches of {size:>6,} ({what}): {best:>12,.0f} points/s")
    fast, slow = stamping(points)
    print(f"rising milliseconds: {fast:.3f} us a point with numpy, {slow:.3f} without")
    print(f"idle, two destinations: {idle(10.0):.2%} of one core")


if __name__ == "__main__":
    main()
