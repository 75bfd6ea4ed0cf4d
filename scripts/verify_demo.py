"""Reads the demo's newest run back from MLflow and says what is missing: `verify_demo.py TRACKING_URI [WITHIN_S]`."""

from __future__ import annotations

import sys
import time

from mlflow import MlflowClient
from mlflow.entities import Run

METRICS = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
ARTIFACTS = {"plots/confusion_matrix.png", "model/digits.pkl", "model/config.json"}
EPOCHS = 30


def newest_run(client: MlflowClient) -> Run | None:
    """The newest run called `digits` of the experiment `tracelet-demo`."""
    experiment = client.get_experiment_by_name("tracelet-demo")
    if experiment is None:
        return None
    runs = client.search_runs([experiment.experiment_id], "attributes.run_name = 'digits'", max_results=1)
    return runs[0] if runs else None


def artifacts(client: MlflowClient, run_id: str, folder: str | None = None) -> set[str]:
    """The paths of all files of the run."""
    found: set[str] = set()
    for entry in client.list_artifacts(run_id, folder):
        found |= artifacts(client, run_id, entry.path) if entry.is_dir else {entry.path}
    return found


def missing(client: MlflowClient) -> list[str]:
    """What the demo's run lacks; empty when it is complete."""
    run = newest_run(client)
    if run is None:
        return ["the run"]
    lacks = [] if run.info.status == "FINISHED" else [f"status FINISHED (it is {run.info.status})"]
    for name in METRICS:
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, name)]
        if len(steps) < EPOCHS or steps != sorted(set(steps)):
            lacks.append(f"{EPOCHS} epochs of {name} (there are {len(steps)})")
    lacks += [f"param {key}" for key in ("model", "epochs", "learning_rate", "seed") if key not in run.data.params]
    lacks += [f"artifact {path}" for path in sorted(ARTIFACTS - artifacts(client, run.info.run_id))]
    return lacks


def main(tracking_uri: str, within_s: float = 30.0) -> int:
    """Look until nothing is missing, at most `within_s`; 0 if the run is complete."""
    client = MlflowClient(tracking_uri)
    until = time.monotonic() + within_s
    while (lacks := missing(client)) and time.monotonic() < until:
        time.sleep(0.5)
    print("complete" if not lacks else "missing: " + ", ".join(lacks))
    return int(bool(lacks))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], *map(float, sys.argv[2:])))
