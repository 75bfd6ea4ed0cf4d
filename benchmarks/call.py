"""What a log call costs the training loop, beside the cheapest thing one could do instead: append a tuple to a list.

    .venv/bin/python benchmarks/call.py

Medians of several rounds of CPU time (the kernel's included), each alternating with the list. The shipper is off, so
that what is measured is the call; `--shipper` leaves it on, as in a real run, with OTLP JSON lines as its destination.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from time import perf_counter_ns, process_time_ns

NAMES = tuple(f"metric_{number}" for number in range(10))
CALLS = 100_000


def listed(kept: list[tuple[str, float, int, int]]) -> float:
    """CPU nanoseconds a call of `list.append((name, value, i, time.time_ns()))`, on a list that keeps what it got."""
    start = process_time_ns()
    for i in range(CALLS):
        kept.append(("loss", 0.5, i, time.time_ns()))
    return (process_time_ns() - start) / CALLS


def logged(log: Callable[..., None]) -> float:
    """CPU nanoseconds a call of `log_metric`."""
    start = process_time_ns()
    for i in range(CALLS):
        log("loss", 0.5, iteration=i)
    return (process_time_ns() - start) / CALLS


def spread(call: Callable[[int], None], calls: int) -> tuple[float, float, float]:
    """Median, 99th percentile and longest of `calls` single calls, in microseconds, the timer's own cost included."""
    taken = []
    for i in range(calls):
        start = perf_counter_ns()
        call(i)
        taken.append(perf_counter_ns() - start)
    taken.sort()
    return taken[calls // 2] / 1e3, taken[calls * 99 // 100] / 1e3, taken[-1] / 1e3


def main() -> int:
    """Print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shipper", action="store_true")
    options = parser.parse_args()

    before = time.perf_counter()
    import tracelet

    with tempfile.TemporaryDirectory() as folder:
        exp = tracelet.start_logging(
            exp_name="call",
            project="benchmarks",
            backend=tracelet.File(path=f"{folder}/out.jsonl"),
            dir=folder,
            shipper="process" if options.shipper else "off",
        )
        exp.log_metric("loss", 0.5, iteration=0)
        print(f"import, start and the first call: {(time.perf_counter() - before) * 1e3:.0f} ms")

        kept: list[tuple[str, float, int, int]] = []
        lists, logs = [], []
        for _ in range(options.rounds):
            lists.append(listed(kept))
            logs.append(logged(exp.log_metric))
        list_ns, log_ns = statistics.median(lists), statistics.median(logs)
        print(f"list.append of a tuple: {list_ns:.0f} ns   log_metric: {log_ns:.0f} ns   ratio {log_ns / list_ns:.2f}")

        one = spread(lambda i: exp.log_metric(NAMES[i % 10], 0.5, iteration=i), CALLS)
        ten = spread(lambda i: exp.log_metrics(dict.fromkeys(NAMES, 0.5), i), CALLS // 10)
        for label, (median, p99, longest) in (("one value", one), ("ten in a dict", ten)):
            print(f"{label:14} median {median:.2f} us   p99 {p99:.2f} us   longest {longest / 1e3:.2f} ms")
        exp.stop()
    print(f"Python {sys.version.split()[0]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
