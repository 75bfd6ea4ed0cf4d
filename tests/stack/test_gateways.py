"""Two gateways behind one collector, and one of them killed: its runs wait, the other's go on, nothing is lost.

Pattern: two programs log without end, each to another gateway; one gateway is killed in the middle, and comes back
after both programs have ended. Limit: 8 minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from tests.stack.arrived import all_in_mlflow, all_in_prometheus
from tests.stack.harness import Stack, wait_until
from tests.stack.training import KEYS, trainings


def run_of_gateway(number: int) -> str:
    """A run id whose hash gateways.yaml gives to that gateway."""
    names = (f"one-of-two-{n}" for n in range(100))
    return next(name for name in names if (sha256(name.encode()).hexdigest()[0] in "01234567") == (number == 1))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A collector with gateways.yaml over it, and both gateways with one MLflow."""
    with Stack(tmp_path_factory.mktemp("two"), gateways=2) as running:
        yield running


def test_the_runs_of_a_killed_gateway_wait_and_those_of_the_other_go_on(two: Stack, tmp_path: Path) -> None:
    living, waiting = run_of_gateway(1), run_of_gateway(2)

    def rows(run_id: str) -> int:
        run = two.mlflow_run(run_id)["info"]["run_id"]
        return len(two.mlflow_history(run, KEYS[0]))

    with trainings(tmp_path / "spools", (living, waiting), tmp_path, two.otlp_http) as programs:
        for run_id in (living, waiting):
            wait_until(lambda run_id=run_id: rows(run_id) > 100, 90, lambda: "a run is not in MLflow")  # type: ignore[misc]
        two.kill("gateway-2")
        of_the_killed, of_the_other = rows(waiting), rows(living)
        wait_until(lambda: rows(living) > of_the_other + 2_000, 120, lambda: f"{living} stands at {rows(living)}")
        (tmp_path / "enough").touch()
        for program in programs:
            said, _ = program.communicate(timeout=120)
            assert program.returncode == 0, said  # the collector keeps what the dead one should have
    points = {run_id: int((tmp_path / run_id).read_text()) * len(KEYS) for run_id in (living, waiting)}
    all_in_mlflow(two, living, points[living])
    for run_id in (living, waiting):
        all_in_prometheus(two, run_id, points[run_id])
    assert rows(waiting) == of_the_killed
    assert two.mlflow_run(waiting)["info"]["status"] == "RUNNING"
    two.start("gateway-2")
    all_in_mlflow(two, waiting, points[waiting])
