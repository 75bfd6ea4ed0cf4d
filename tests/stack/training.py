"""A program that trains, for tests of the whole way: `training.py RUN_ID POINTS ENDPOINT ...`, and what it becomes.

Each point of a run is known beforehand, so that a test can ask for every one: value, iteration, in each backend. With
FOLDER instead of POINTS it goes on until a file `enough` is in that folder, and keeps the number of its iterations in
the file RUN_ID beside it.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

KEYS = ("train/loss", "train.acc")
PROJECT = "to-the-stack"


def value_of(key: str, iteration: int) -> float:
    """What a run logs: exact in binary, another for each iteration and key."""
    return 1.0 + iteration / 1024 if key == KEYS[0] else -float(iteration)


def main(run_id: str, iterations: Iterable[int], *endpoints: str) -> None:
    """Log a point for each key at each iteration, and return when the collector has acknowledged all."""
    import tracelet

    backend = [tracelet.OTLP(endpoint) for endpoint in endpoints]
    exp = tracelet.start_logging(exp_name=run_id, project=PROJECT, run_id=run_id, backend=backend)
    exp.log_params({"keys": len(KEYS)})
    for iteration in iterations:
        for key in KEYS:
            exp.log_metric(key, value_of(key, iteration), iteration=iteration)
    delivered = exp.flush(timeout=300)
    tracelet.stop_logging()
    if not delivered:
        raise SystemExit("not delivered within 300 s")


def until_enough(folder: Path, run_id: str) -> Iterator[int]:
    """Iterations, some hundreds a second, for as long as nobody has said that it is enough."""
    progress = folder / run_id
    for iteration in itertools.count():
        if iteration % 50 == 0:
            progress.with_suffix(".new").write_text(str(iteration))
            progress.with_suffix(".new").rename(progress)
            if (folder / "enough").exists():
                return
        yield iteration
        time.sleep(0.003)


@contextmanager
def trainings(
    folder: Path, run_ids: Iterable[str], points: int | Path, *endpoints: str, environ: Mapping[str, str] | None = None
) -> Iterator[list[subprocess.Popen[str]]]:
    """Several of these programs at once, each a process with a spool of its own in `folder`; ended at the end."""
    running: list[subprocess.Popen[str]] = []
    try:
        for run_id in run_ids:
            variables = {**os.environ, "TRACELET_DIR": str(folder / run_id), **(environ or {})}
            words = [sys.executable, __file__, run_id, str(points), *endpoints]
            running.append(
                subprocess.Popen(words, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            )
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def finished(running: Iterable[subprocess.Popen[str]]) -> None:
    """Wait for their ends; what they said is in the error if one fails."""
    for process in running:
        said, _ = process.communicate(timeout=400)
        assert process.returncode == 0, said


def train(folder: Path, run_ids: Iterable[str], points: int, *endpoints: str) -> None:
    """Run them to their ends."""
    with trainings(folder, run_ids, points, *endpoints) as running:
        finished(running)


if __name__ == "__main__":
    name, much, *addresses = sys.argv[1:]
    many = range(int(much) // len(KEYS)) if much.isdigit() else until_enough(Path(much), name)
    main(name, many, *addresses)
