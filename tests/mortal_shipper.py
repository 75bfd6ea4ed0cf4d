"""A real shipper that dies as a person would have it die: between a destination's answer and its own note of it.

python -m tests.mortal_shipper FOLDER SEEN      (killed once for each batch whose number is not yet in the folder SEEN)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.shipper_process import REPO
from tracelet import codec, ids
from tracelet.core import values
from tracelet.errors import RunClosed
from tracelet.otlp import semconv
from tracelet.records import MetricNamed, RunStarted, WriterEnded, WriterOpened
from tracelet.spool import store
from tracelet.spool.cursor import Journal, Progress
from tracelet.spool.writer import Writer

__all__ = ["logged_by_ranks", "ship_with_deaths"]

SECONDS_EACH = 60.0


def ship_with_deaths(folder: Path, environ: Mapping[str, str], *, at_most: int = 40) -> int:
    """Ship a folder by as many shippers as it takes, each killed at its first new acknowledgement; how many died."""
    seen = folder.parent / "seen"
    seen.mkdir(exist_ok=True)
    for deaths in range(at_most):
        process = subprocess.run(
            [sys.executable, "-m", "tests.mortal_shipper", str(folder), str(seen)],
            cwd=REPO,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS_EACH,
            check=False,
        )
        if process.returncode == 0:
            return deaths
        assert process.returncode == -signal.SIGKILL, process.stderr.decode(errors="replace")[-3000:]
    raise AssertionError(f"it was never done: {progress_of(folder)}")


def progress_of(folder: Path) -> Any:
    progress = Progress(folder)
    progress.refresh()
    return progress.destinations


def logged_by_ranks(
    folder: Path,
    run_id: str,
    destinations: Sequence[Mapping[str, Any]],
    rows: Mapping[int, Sequence[tuple[str, float, int]]],
) -> None:
    """A run that has ended, logged by these ranks on this host: name, value and iteration of each point."""
    key, now = ids.new_attempt_key(), time.time_ns()
    attempt = store.Attempt(key, now, os.getpid(), 0, destinations=tuple(destinations))
    manifest = store.Manifest(run_id, "repeats", "digits", f"name of {run_id}")
    store.update_manifest(folder, lambda before: (before or manifest).with_attempt(attempt))
    for rank, points in rows.items():
        resource = {
            "service.name": "repeats",
            "service.namespace": "tracelet",
            "service.instance.id": ids.instance_id(run_id, key, rank),
            semconv.PROJECT: "repeats",
            semconv.EXPERIMENT_NAME: "digits",
            semconv.RUN_ID: run_id,
            semconv.RUN_NAME: f"name of {run_id}",
            semconv.RUN_ATTEMPT: key,
            semconv.RANK: rank,
        }
        writer = Writer(
            folder,
            role="first",
            opening=lambda role, rank=rank, resource=resource: codec.encode(  # type: ignore[misc]
                WriterOpened(now, role, os.getpid(), rank, key, now, resource)
            ),
            name_frame=lambda metric_id, name: codec.encode(MetricNamed(metric_id, name)),
            check_name=values.check_name,
            to_float=values.to_float,
            to_iteration=values.to_iteration,
            closed=lambda: RunClosed("closed"),
        )
        if rank == 0:
            writer.frame(*codec.encode(RunStarted(now, f"name of {run_id}", {}, {})), now)
        for name, value, iteration in points:
            writer.log(name, value, iteration)
        writer.end(*codec.encode(WriterEnded(time.time_ns(), "FINISHED", "stop")), time.time_ns())


def _main(folder: str, seen: str) -> int:
    from tracelet.shipper.process import main

    acknowledge = Journal.ack

    def ack(self: Journal, intent: Any, **facts: Any) -> None:
        mark = Path(seen) / str(intent.number)
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        acknowledge(self, intent, **facts)

    Journal.ack = ack  # type: ignore[method-assign]
    return main([folder])


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
