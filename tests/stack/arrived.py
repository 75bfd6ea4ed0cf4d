"""Whether all of a training has arrived, point for point: in Prometheus at its own millisecond, in MLflow with step."""

from __future__ import annotations

from tests.stack.harness import Backends, wait_until
from tests.stack.training import KEYS, value_of


def count_in_prometheus(stack: Backends, run_id: str) -> int:
    """How many samples of a run's own metrics are stored."""
    found = stack.samples(f'{{__name__=~"ml_.+",tracelet_run_id="{run_id}"}}')
    return sum(len(samples) for _, samples in found)


def all_in_prometheus(stack: Backends, run_id: str, points: int, within_s: float = 180.0) -> None:
    """Every point is there, none twice; each has beside it, at the same millisecond, the iteration it was logged at."""
    wait_until(
        lambda: count_in_prometheus(stack, run_id) >= points,
        within_s,
        lambda: f"{run_id}: {count_in_prometheus(stack, run_id)} of {points} samples",
    )
    for key in KEYS:
        labels = f'tracelet_metric_key="{key}",tracelet_run_id="{run_id}"'
        values = stack.samples(f'{{__name__=~"ml_.+",{labels}}}')
        iterations = stack.samples(f"tracelet_iteration{{{labels}}}")
        assert len(values) == len(iterations) == 1, f"{run_id} {key}: {len(values)} and {len(iterations)} series"
        assert "iteration" not in " ".join(values[0][0].keys() - {"__name__"})
        at = dict(iterations[0][1])
        assert len(at) == len(iterations[0][1]) == len(values[0][1]) == points // len(KEYS)
        assert [(at.get(ms), value) for ms, value in values[0][1]] == [
            (float(i), value_of(key, i)) for i in range(points // len(KEYS))
        ]


def all_in_mlflow(stack: Backends, run_id: str, points: int, within_s: float = 180.0) -> None:
    """Every point is there with its step, none twice, in a run that has ended."""
    run = stack.mlflow_run(run_id, within_s, status="FINISHED")["info"]["run_id"]
    for key in KEYS:
        wanted = [(i, value_of(key, i)) for i in range(points // len(KEYS))]
        wait_until(
            lambda key=key, wanted=wanted: len(stack.mlflow_history(run, key)) >= len(wanted),  # type: ignore[misc]
            within_s,
            lambda key=key, wanted=wanted: f"{run_id} {key}: {len(stack.mlflow_history(run, key))} of {len(wanted)}",  # type: ignore[misc]
        )
        rows = stack.mlflow_history(run, key)
        assert [(step, value) for step, _, value in rows] == wanted


def all_in_both(stack: Backends, run_id: str, points: int, within_s: float = 180.0) -> None:
    """Every point is in both, at the same millisecond: a person who looks at one finds it in the other."""
    all_in_prometheus(stack, run_id, points, within_s)
    all_in_mlflow(stack, run_id, points, within_s)
    run = stack.mlflow_run(run_id)["info"]["run_id"]
    for key in KEYS:
        labels = f'tracelet_metric_key="{key}",tracelet_run_id="{run_id}"'
        ((_, iterations),) = stack.samples(f"tracelet_iteration{{{labels}}}")
        rows = stack.mlflow_history(run, key)
        assert [(at, step) for step, at, _ in rows] == [(at, int(step)) for at, step in iterations]
