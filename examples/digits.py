"""Train a digit classifier and watch it arrive: the whole way, from `log_metric` to MLflow (and to OTLP, if you ask).

Run it from any folder, with or without a network:

    make demo                                   # or: .venv/bin/python examples/digits.py
    OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4318 make demo     # the same run as OTLP too
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import ConfusionMatrixDisplay, accuracy_score, log_loss
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

import tracelet

CLASSES = np.arange(10)
METRICS = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")


@dataclass(frozen=True)
class Config:
    """What the run is made with; each field is an option of the command line and a param of the run."""

    epochs: int = 40
    batch_size: int = 64
    hidden: int = 64  # neurons of the hidden layer
    learning_rate: float = 0.002
    seed: int = 7


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, log, and say where the result is; 0 when everything has been delivered."""
    config = read_config(arguments)
    backend = ["mlflow", "otlp"] if os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") else "mlflow"

    exp = tracelet.start_logging(
        exp_name="digits", project="tracelet-demo", backend=backend, tags={"example": "digits"}
    )
    exp.log_params({"model": "MLPClassifier", "data": "scikit-learn digits", **asdict(config)})

    history, model, data = train(exp, config)
    log_files(exp, config, model, data)

    print("delivering ...", flush=True)
    delivered = exp.flush(timeout=60)
    exp.stop()
    print_summary(exp, history, delivered)
    return 0 if delivered else 1


def read_config(arguments: Sequence[str] | None) -> Config:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in asdict(Config()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"[{default}]")
    return Config(**vars(parser.parse_args(arguments)))


def train(
    exp: tracelet.Experiment, config: Config
) -> tuple[dict[str, list[float]], MLPClassifier, tuple[np.ndarray, ...]]:
    """Go over the training images once an epoch, in mini-batches, and log four metrics after each."""
    images, labels = load_digits(return_X_y=True)
    train_x, val_x, train_y, val_y = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=config.seed
    )
    scaler = StandardScaler().fit(train_x)
    train_x, val_x = scaler.transform(train_x), scaler.transform(val_x)

    model = MLPClassifier(
        hidden_layer_sizes=(config.hidden,), learning_rate_init=config.learning_rate, random_state=config.seed
    )
    shuffle = np.random.default_rng(config.seed)
    history: dict[str, list[float]] = {name: [] for name in METRICS}

    with tqdm(range(1, config.epochs + 1), desc="training", unit="epoch") as progress:
        for epoch in progress:
            exp.set_iteration(epoch)
            order = shuffle.permutation(len(train_x))
            for start in range(0, len(order), config.batch_size):
                batch = order[start : start + config.batch_size]
                model.partial_fit(train_x[batch], train_y[batch], classes=CLASSES)

            with exp.span("validate"):
                values = evaluate(model, train_x, train_y, val_x, val_y)
            exp.log_metrics(values)
            for name, value in values.items():
                history[name].append(value)
            progress.set_postfix(
                {name: f"{values[name]:.4f}" for name in ("train_loss", "val_loss", "val_accuracy")}, refresh=False
            )
    return history, model, (val_x, val_y)


def evaluate(
    model: MLPClassifier, train_x: np.ndarray, train_y: np.ndarray, val_x: np.ndarray, val_y: np.ndarray
) -> dict[str, float]:
    values: dict[str, float] = {}
    for part, x, y in (("train", train_x, train_y), ("val", val_x, val_y)):
        probabilities = model.predict_proba(x)
        values[f"{part}_loss"] = float(log_loss(y, probabilities, labels=CLASSES))
        values[f"{part}_accuracy"] = float(accuracy_score(y, probabilities.argmax(axis=1)))
    return values


def log_files(exp: tracelet.Experiment, config: Config, model: MLPClassifier, data: tuple[np.ndarray, ...]) -> None:
    """Log a plot, the model and its config; each is copied at the call, so the folder may go at once."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        display = ConfusionMatrixDisplay.from_estimator(model, *data, cmap="Blues", colorbar=False)
        display.figure_.savefig(folder / "confusion_matrix.png", dpi=120)
        plt.close(display.figure_)
        exp.log_artifact(folder / "confusion_matrix.png", "plots/confusion_matrix.png")

        (folder / "model.pkl").write_bytes(pickle.dumps(model))
        exp.log_artifact(folder / "model.pkl", "model/digits.pkl")

        (folder / "config.json").write_text(json.dumps(asdict(config), indent=2))
        exp.log_artifact(folder / "config.json", "model/config.json")


def print_summary(exp: tracelet.Experiment, history: dict[str, list[float]], delivered: bool) -> None:
    epochs = len(history["val_loss"])
    print(f"\n{'metric':<16}{'first':>10}{'last':>10}{'best':>10}  at epoch")
    for name, values in history.items():
        best = int(np.argmin(values) if name.endswith("loss") else np.argmax(values))
        print(f"{name:<16}{values[0]:>10.4f}{values[-1]:>10.4f}{values[best]:>10.4f}  {best + 1} of {epochs}")

    stats = exp.stats
    links = {name: link for name, link in exp.links(timeout=10).items() if link.startswith("http")}
    print(f"\nrun {exp.id}: {stats.logged} values logged, {stats.waiting} waiting, {stats.refused} refused")
    for destination, link in links.items():
        print(f"  {destination}: {link}")
    if not delivered:
        print("Not everything has arrived yet. `tracelet runs` shows what waits, `tracelet ship` sends it.")
    print(f"\nSee it in MLflow:\n\n  {ui_command()}\n")


def ui_command() -> str:
    """The command that opens this run in MLflow's UI, from whichever folder it is typed."""
    address = os.environ.get("MLFLOW_TRACKING_URI", "")
    if address.startswith("http"):
        return f"{sys.executable} -m webbrowser {address}"
    store = address or f"sqlite:///{Path.cwd() / 'mlflow.db'}"
    return f"{sys.executable} -m mlflow ui --backend-store-uri {store}    # then open http://127.0.0.1:5000"


if __name__ == "__main__":
    raise SystemExit(main())
