"""The whole way, from training to Prometheus and MLflow, while each piece between fails in turn.

Pattern: two programs log without end; a piece is stopped, or hangs, for a minute; the programs go on meanwhile; at the
end every point is asked for, in both backends. Limit: 12 minutes.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.stack.arrived import all_in_both
from tests.stack.endless import GOES_ON, Training
from tests.stack.harness import Stack, is_running, text_of, wait_until
from tests.stack.training import KEYS, finished, train, trainings

OUTAGE_S = 60.0


def test_a_hundred_thousand_points_of_three_runs_are_in_both_backends(stack: Stack, tmp_path: Path) -> None:
    runs, points = ("whole-a", "whole-b", "whole-c"), 33_334
    train(tmp_path, runs, points, stack.otlp_http)
    for run_id in runs:
        all_in_both(stack, run_id, points)
    series = stack.samples('{__name__=~"ml_.+|tracelet_iteration",tracelet_run_id=~"whole-."}')
    assert len(series) == 2 * len(KEYS) * len(runs)


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
        if is_running(stack.pid(name)):
            stack.resume(name)


@pytest.fixture(scope="module")
def frail(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack whose pieces are taken away."""
    with Stack(tmp_path_factory.mktemp("frail")) as running:
        yield running


def in_flight(stack: Stack) -> float:
    """Requests that the collector has sent to the gateway and that are not answered."""
    found = re.findall(
        r'^otelcol_exporter_in_flight_requests\{.*"otlp_http/gateway".*\} (\S+)$',
        text_of(stack.collector_metrics),
        re.M,
    )
    return sum(map(float, found))


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
        for _ in range(2):
            with hanging(frail, "gateway"):  # and once it is certain that a request is on its way to it
                wait_until(lambda: in_flight(frail) > 0, 60, lambda: text_of(frail.collector_metrics))
                frail.kill("gateway")
            frail.start("gateway")
        training.enough()
        finished(programs)
    for run_id, iterations in zip(training.run_ids, training.iterations(), strict=True):
        assert iterations > 4 * GOES_ON
        all_in_both(frail, run_id, iterations * len(KEYS))
