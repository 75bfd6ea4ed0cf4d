"""Fill a stack: three short runs with curves, params, phases and an end each, one of which fails.

Needs nothing but tracelet, and a minute. With docker-compose.yml: `docker compose run --rm example`. Else:

    OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4318 .venv/bin/python examples/to_the_stack.py

`scripts/stack.py up` says at its start which address to use in place of that one (`otlp_http`).
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import time
from collections.abc import Sequence

import tracelet

LEARNING_RATES = (0.1, 0.01, 0.9)  # the last one is too much
STEPS_AN_EPOCH = 50


def main(arguments: Sequence[str] | None = None) -> int:
    """Log the runs one after the other; 0 when all has been delivered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=20.0, help="how long each run takes")
    chosen = parser.parse_args(arguments)
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    if not endpoint:
        print("Say where the collector is: OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4318", file=sys.stderr)
        return 2
    delivered = True
    for seed, learning_rate in enumerate(LEARNING_RATES, 1):
        delivered &= one_run(learning_rate, seed, chosen.epochs, chosen.seconds)
    print("delivered" if delivered else f"not all of it has arrived at {endpoint} yet: `tracelet runs` says what waits")
    return 0 if delivered else 1


def one_run(learning_rate: float, seed: int, epochs: int, seconds: float) -> bool:
    """Pretend to train; whether all of the run has been delivered."""
    exp = tracelet.start_logging(exp_name=f"lr-{learning_rate}", project="to-the-stack", backend="otlp")
    exp.log_params({"learning_rate": learning_rate, "seed": seed, "epochs": epochs, "optimizer": "sgd"})
    print(f"run {exp.id} with a learning rate of {learning_rate}")
    noise, pause = random.Random(seed), seconds / (epochs * STEPS_AN_EPOCH)
    try:
        with exp:
            for epoch in range(epochs):
                train_epoch(exp, epoch, learning_rate, noise, pause)
    except FloatingPointError as error:
        print(f"  it failed, as it should: {error}")
    return exp.flush(timeout=60)


def train_epoch(exp: tracelet.Experiment, epoch: int, learning_rate: float, noise: random.Random, pause: float) -> None:
    """One pass over no data; raises FloatingPointError when the learning rate is too high."""
    first = epoch * STEPS_AN_EPOCH
    exp.log_metric("epoch", epoch, iteration=first)
    with exp.span("epoch", {"epoch": epoch}):
        for step in range(first, first + STEPS_AN_EPOCH):
            loss = 0.1 + 2.2 * math.exp(-step * learning_rate / 6) + noise.gauss(0, 0.03)
            if learning_rate > 0.5:
                loss = 2.3 * math.exp(step / 60) + noise.gauss(0, 0.2)
            exp.log_metric("train/loss", loss, iteration=step)
            exp.log_metric("train/grad_norm", abs(noise.gauss(1, 0.2)) + loss / 4, iteration=step)
            time.sleep(pause)
    exp.log_metric("val/accuracy", min(0.98, max(0.1, 1 - loss / 2.5)), iteration=first + STEPS_AN_EPOCH - 1)
    if loss > 50:
        raise FloatingPointError(f"the loss is {loss:.0f}: training diverges")


if __name__ == "__main__":
    raise SystemExit(main())
