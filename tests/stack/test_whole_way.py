"""The whole way, from training to Prometheus and MLflow, while each piece between fails in turn.

Pattern: two programs log without end; a piece is stopped, or hangs, for a minute; the programs go on meanwhile; at the
end every point is asked for, in both backends. Limit: 12 minutes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.stack.arrived import all_in_mlflow, all_in_prometheus
from tests.stack.harness import Stack, wait_until
from tests.stack.training import KEYS, train, trainings

OUTAGE_S = 60.0
GOES_ON = 3_000  # iterations in an outage: at most 20,000 at the programs' pace


def test_a_hundred_thousand_points_of_three_runs_are_in_both_backends(stack: Stack, tmp_path: Path) -> None:
    runs, points = ("whole-a", "whole-b", "whole-c"), 33_334
    train(tmp_path, runs, points, stack.otlp_http)
    for run_id in runs:
        all_in_prometheus(stack, run_id, points)
        all_in_mlflow(stack, run_id, points)
    series = stack.samples('{__name__=~"ml_.+|tracelet_iteration",tracelet_run_id=~"whole-."}')
    assert len(series) == 2 * len(KEYS) * len(runs)


class Training:
    """Programs that go on until told; their iterations, one number a run, are read from files."""

    def __init__(self, folder: Path, run_ids: tuple[str, ...]) -> None:
        self.folder = folder
        self.run_ids = run_ids

    def iterations(self) -> list[int]:
        """How far each of them is, to within 50."""
        files = [self.folder / run_id for run_id in self.run_ids]
        return [int(file.read_text()) if file.exists() else 0 for file in files]

    def goes_on(self, seconds: float) -> None:
        """Return after so many seconds; every program has logged thousands of iterations in them."""
        before, until = self.iterations(), time.monotonic() + seconds
        wait_until(
            lambda: (
                time.monotonic() > until
                and all(now >= then + GOES_ON for now, then in zip(self.iterations(), before, strict=True))
            ),
            seconds + 120,
            lambda: f"training stands still: from {before} to {self.iterations()} iterations",
        )

    def enough(self) -> None:
        """Tell them to end."""
        (self.folder / "enough").touch()


@contextmanager
def stopped(stack: Stack, *names: str) -> Iterator[None]:
    """Ended by SIGTERM, and started again on their old ports."""
    for name in names:
        stack.stop(name)
    yield
    for name in names:
        stack.start(name)


@contextmanager
def hanging(stack: Stack, name: str) -> Iterator[None]:
    """Stopped in the middle of what they do: connections stay, nothing answers."""
    stack.pause(name)
    try:
        yield
    finally:
        stack.resume(name)


@pytest.fixture(scope="module")
def frail(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack whose pieces are taken away."""
    with Stack(tmp_path_factory.mktemp("frail")) as running:
        yield running


def test_a_minute_without_each_piece_loses_and_doubles_nothing_and_training_goes_on(
    frail: Stack, tmp_path: Path
) -> None:
    training = Training(tmp_path, ("outage-a", "outage-b"))
    with trainings(tmp_path / "spools", training.run_ids, tmp_path, frail.otlp_http) as programs:
        wait_until(lambda: min(training.iterations()) > 500, 60, lambda: f"{training.iterations()} iterations")
        with stopped(frail, "collector"):
            training.goes_on(OUTAGE_S)
        with hanging(frail, "collector"):
            training.goes_on(OUTAGE_S)
        # One backend's trouble is none of the other's: both branches fail at once, each in its own way.
        with stopped(frail, "prometheus"), hanging(frail, "mlflow"):
            training.goes_on(OUTAGE_S)
        with hanging(frail, "prometheus"), stopped(frail, "mlflow"):
            training.goes_on(OUTAGE_S)
        chance = random.Random(4)
        for _ in range(5):
            time.sleep(chance.random())  # anywhere in a request
            frail.kill("gateway")
            frail.start("gateway")
        training.enough()
        for program in programs:
            said, _ = program.communicate(timeout=400)
            assert program.returncode == 0, said
    for run_id, iterations in zip(training.run_ids, training.iterations(), strict=True):
        assert iterations > 4 * GOES_ON
        all_in_prometheus(frail, run_id, iterations * len(KEYS))
        all_in_mlflow(frail, run_id, iterations * len(KEYS))
