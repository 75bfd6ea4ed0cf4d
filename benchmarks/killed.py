"""What is left of a run whose process is killed: how many of the acknowledged values can't be read back.

    .venv/bin/python benchmarks/killed.py

The training process logs at a steady rate and notes, in a page shared with this one, how many calls have returned;
then it gets SIGKILL. What its shipper delivered into a file is compared with that number.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRAINING = """
import mmap, sys, time, tracelet
rate, folder = float(sys.argv[1]), sys.argv[2]
exp = tracelet.start_logging(
    exp_name="killed", project="benchmarks", backend=tracelet.File(path=f"{folder}/out.jsonl"), dir=f"{folder}/spool"
)
file = open(f"{folder}/returned", "r+b")
shared = mmap.mmap(file.fileno(), 8)
i, start = 0, time.perf_counter()
while True:
    exp.log_metric(f"metric_{i % 10}", float(i), iteration=i)
    i += 1
    shared[:] = i.to_bytes(8, "little")
    while (ahead := start + i / rate - time.perf_counter()) > 0:
        time.sleep(min(0.05, ahead))
"""


def delivered(path: Path) -> set[int]:
    """The iterations of all user metrics in a file of OTLP JSON lines."""
    found: set[int] = set()
    for line in path.read_text().splitlines() if path.exists() else []:
        for resource in json.loads(line).get("resourceMetrics", []):
            for scope in resource["scopeMetrics"]:
                for metric in scope["metrics"]:
                    if metric["name"].startswith("metric_"):
                        points = metric["gauge"]["dataPoints"]
                        found |= {int(p["attributes"][0]["value"]["intValue"]) for p in points if "asDouble" in p}
    return found


def lost(rate: float, seconds: float, patience_s: float = 30.0) -> tuple[int, int]:
    """How many calls had returned at the kill, and how many of them never arrived."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "returned").write_bytes(bytes(8))
        training = subprocess.Popen([sys.executable, "-c", TRAINING, str(rate), name])
        time.sleep(seconds)
        os.kill(training.pid, signal.SIGKILL)
        training.wait()
        returned = int.from_bytes((folder / "returned").read_bytes(), "little")
        if not returned:
            raise RuntimeError("the training process logged nothing")
        until = time.monotonic() + patience_s
        arrived: set[int] = set()
        while len(arrived) < returned and time.monotonic() < until:
            time.sleep(0.2)
            arrived = delivered(folder / "out.jsonl")
        return returned, len(set(range(returned)) - arrived)


def main() -> int:
    """Print a line for each rate."""
    for rate, seconds in ((10_000, 3), (20, 10)):
        for _ in range(3):
            returned, missing = lost(rate, seconds)
            print(f"{rate:>6} values a second, killed after {seconds:>2} s: {returned:>6} returned, {missing} lost")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
