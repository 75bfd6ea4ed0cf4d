"""What a log call costs at the spool itself, beside the cheapest thing training could do instead.

    .venv/bin/python benchmarks/hot_path.py [--points 100000] [--dir DIR] [--rounds 15]

The comparison is `list.append((name, value, i, time.time_ns()))`, in the same process, in turns. `Writer.log` is the
closure that an Experiment shows as `log_metric`. CPU time of the process (system calls and faults included), so that
neighbours disturb less; rolls by the wall's clock. `--dir` decides the file system: a store into a fresh page costs a
fault there (on ext4 some 30 ns a point of the numbers below, on tmpfs 10).
"""

from __future__ import annotations

import argparse
import json
import operator
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tracelet.spool.store import make_spares
from tracelet.spool.writer import Writer


def pen(folder: Path, *, mapped: bool | None = None) -> Writer:
    """A writer with plain parts."""
    return Writer(
        folder,
        role="first",
        opening=lambda role: (1, b"{}"),
        name_frame=lambda metric_id, name: (3, json.dumps([metric_id, name]).encode()),
        check_name=str,
        to_float=lambda name, value: float(value),  # type: ignore[arg-type]
        to_iteration=operator.index,  # type: ignore[arg-type]
        closed=lambda: RuntimeError("closed"),
        mapped=mapped,
    )


def appended(points: int) -> float:
    """Seconds for appending tuples to a list."""
    kept: list[tuple[str, float, int, int]] = []
    value = 0.5
    start = time.process_time()
    for i in range(points):
        kept.append(("loss", value, i, time.time_ns()))
    return time.process_time() - start


def logged(log: Callable[..., None], points: int) -> float:
    """Seconds for as many calls of log."""
    value = 0.5
    start = time.process_time()
    for i in range(points):
        log("loss", value, iteration=i)
    return time.process_time() - start


def current(log: Callable[..., None], points: int) -> float:
    """The same, with the current iteration."""
    value = 0.5
    start = time.process_time()
    for _ in range(points):
        log("loss", value)
    return time.process_time() - start


def many(log_many: Callable[..., None], points: int) -> float:
    """The same number of points, ten a call."""
    values = {f"metric {i}": 0.5 for i in range(10)}
    start = time.process_time()
    for i in range(points // 10):
        log_many(values, i)
    return time.process_time() - start


def threaded(log: Callable[..., None], points: int, threads: int = 4) -> float:
    """The same number of points, from several threads."""
    workers = [threading.Thread(target=logged, args=(log, points // threads)) for _ in range(threads)]
    start = time.process_time()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.process_time() - start


def rolls(folder: Path, spares: bool) -> list[float]:
    """Microseconds of each call that had to open a new segment."""
    writer = pen(folder)
    writer.log("loss", 0.5, 0)
    taken: list[float] = []
    while len(taken) < 20:
        (head,) = writer.heads()
        if spares:
            make_spares(folder)
        for i in range(32768 - head.slot):
            writer.log("loss", 0.5, i)
        start = time.perf_counter()
        writer.log("loss", 0.5, 0)
        taken.append((time.perf_counter() - start) * 1e6)
    writer.end(10, b"{}", 1)
    return sorted(taken)


def main() -> int:
    """Print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dir", type=Path, default=None)
    options = parser.parse_args()
    points = options.points
    with tempfile.TemporaryDirectory(dir=options.dir) as top:
        writer = pen(Path(top) / "run")
        plain = pen(Path(top) / "appended", mapped=False)
        cases: dict[str, Callable[[], float]] = {
            "list.append(tuple)": lambda: appended(points),
            "log(name, x, iteration=i)": lambda: logged(writer.log, points),
            "log(name, x)": lambda: current(writer.log, points),
            "log_many, 10 a call": lambda: many(writer.log_many, points),
            "log from 4 threads": lambda: threaded(writer.log, points),
            "log by os.write (no mapping)": lambda: logged(plain.log, points // 10) * 10,
        }
        writer.set_iteration(1)
        found: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(options.rounds):
            for name, measure in cases.items():
                found[name].append(measure() / points * 1e9)
        base = statistics.median(found["list.append(tuple)"])
        print(f"Python {platform.python_version()}, {points:,} points, median of {options.rounds} rounds")
        for name, took in found.items():
            one = statistics.median(took)
            print(f"{name:30} {one:7.0f} ns a point   {one / base:5.2f} x   ({min(took):.0f} to {max(took):.0f})")
        for spares in (False, True):
            took = rolls(Path(top) / f"rolls-{spares}", spares)
            how = "taking a spare" if spares else "making a segment"
            print(f"a roll, {how:22} {took[len(took) // 2]:7.0f} us median, {took[-1]:.0f} us at most")
        counts = writer.counts()
        writer.end(10, b"{}", 1)
        assert counts.refused == 0, "the disk is full"
    return 0


if __name__ == "__main__":
    sys.exit(main())
