"""What reading a point back from OTLP costs: protobuf's own parsing as the limit, and ours on top of it.

    python benchmarks/decode.py [--points 16000]

Prints ns a point, the best of several rounds. "by columns": the reader of rows as our encoder and the collector write
them. "one by one": through protobuf's objects, as points with other attributes are read.
"""

from __future__ import annotations

import argparse
import functools
import random
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from tracelet.otlp import semconv
from tracelet.otlp.decode import decode_metrics, parse
from tracelet.otlp.encode import PointsLoad, resource_bytes
from tracelet.records import PointBatch

START = 1_700_000_000_000_000_000


def points(iterations: Sequence[int], names: int) -> PointBatch:
    """As many points as iterations, of so many names in turn."""
    count = len(iterations)
    return PointBatch(
        {number: f"train/metric_{number}" for number in range(names)},
        array("Q", [START + i * 1_000_000 for i in range(count)]),
        array("d", [random.random() for _ in range(count)]),
        array("q", iterations),
        array("I", [i % names for i in range(count)]),
    )


def best(work: Callable[[], Any], rounds: int = 7) -> float:
    """Seconds of the fastest round."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--points", type=int, default=16_000)
    count = arguments.parse_args().points
    resource = resource_bytes({semconv.RUN_ID: "run-1", semconv.PROJECT: "p", semconv.RUN_ATTEMPT: "a" * 16})
    rising = range(100, 100 + count)
    mixed = [random.choice((1, 1_000, 1_000_000)) for _ in range(count)]
    print(f"{'':34}{'parse':>10}{'decode':>10}   ns a point")
    for what, iterations, names in (
        ("1 name, rising iterations", rising, 1),
        ("100 names, rising iterations", rising, 100),
        ("1,000 names, rising iterations", rising, 1_000),
        ("1 name, iterations of mixed widths", mixed, 1),
    ):
        body = PointsLoad.of(resource, points(iterations, names)).encode()
        message = parse("metrics", body, "application/x-protobuf")
        (arrival,) = decode_metrics(message).arrivals
        assert arrival.items == count
        parsing = best(functools.partial(parse, "metrics", body, "application/x-protobuf"))
        decoding = best(functools.partial(decode_metrics, message))
        print(f"{what:34}{parsing / count * 1e9:10.0f}{decoding / count * 1e9:10.0f}")


if __name__ == "__main__":
    main()
