"""Processes for tests: `ship` is a real shipper over a destination in a file; `train` a program that logs into a run.

python -m tests.shipper_process ship FOLDER STORE
python -m tests.shipper_process train FOLDER STORE POINTS HOW      (starts a shipper, as training does)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tracelet.exporters.base import Answer, Delivered
from tracelet.records import AttemptEnded, Batch, Heartbeat, RunInfo

REPO = Path(__file__).resolve().parent.parent


class StoreFile:
    """A destination whose server is a file: one line a batch that arrived, appended in one write."""

    max_points = 500
    linger_s = 0.05
    rising_limit_s = 60.0

    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self, run: RunInfo, memory: Mapping[str, Any]) -> Answer:
        return Delivered()

    def memory(self) -> Mapping[str, Any]:
        return {"run_id": "in-a-file"}

    def begin(self, batch: Batch, note: Mapping[str, Any] | None = None) -> Any:
        return _Arriving(self._path, batch)

    def beat(self, batch: Batch, heartbeat: Heartbeat) -> None:
        pass

    def close(self) -> None:
        pass


class _Arriving:
    note: Mapping[str, Any] = {}

    def __init__(self, path: Path, batch: Batch) -> None:
        self._path, self._batch = path, batch

    def attempt(self) -> Answer:
        points = [
            [part.writer_id, part.points.names[m], v, i, t]
            for part in self._batch.parts
            for m, v, i, t in zip(
                part.points.metric_ids,
                part.points.values,
                part.points.iterations,
                part.points.time_unix_nano,
                strict=True,
            )
        ]
        ends = [
            {"status": record.status, "end": record.end_unix_nano, "error": repr(record.error)}
            for part in self._batch.parts
            for record in part.records
            if isinstance(record, AttemptEnded)
        ]
        line = json.dumps({"number": self._batch.number, "points": points, "ends": ends, "pid": os.getpid()})
        with open(self._path, "a", encoding="ascii") as file:
            file.write(line + "\n")
        time.sleep(0.003)  # it has arrived, and the answer is still on its way: where a kill hurts most
        return Delivered()


def command(*arguments: object) -> list[str]:
    """The command line of one of these processes; run it in the repository's root."""
    return [sys.executable, "-m", "tests.shipper_process", *map(str, arguments)]


def launch(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    """Start one of these processes."""
    return subprocess.Popen(command(*arguments), cwd=REPO, **options)


def arrived(path: Path) -> list[dict[str, Any]]:
    """The batches in the store, in order of arrival, repeats included."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _ship(folder: Path, store: Path) -> int:
    from tracelet.shipper.process import main

    return main([str(folder)], build=lambda destination, secrets, environ: StoreFile(store))


def _train(folder: Path, store: Path, points: int, how: str) -> int:
    from tests.shipping import add_attempt, end, open_writer, start

    attempt = add_attempt(folder, "a")
    writer = open_writer(folder, attempt)
    start(writer)
    if how != "off":
        launch("ship", folder, store, stdin=subprocess.DEVNULL, start_new_session=True)
    for i in range(points):
        writer.log(f"m{i % 10}", float(i), i)
        if i % 100 == 0:
            time.sleep(0.002)
    print(points, flush=True)  # every call has returned
    match how:
        case "wait to be killed":
            sys.stdin.read()
        case "wait with a child":
            if os.fork() == 0:
                writer.after_fork_in_child()
                writer.log("child", 1.0, 0)
                print("child", os.getpid(), flush=True)
                sys.stdin.read()
                os._exit(0)
            sys.stdin.read()
        case "exit 3":
            end(writer, "FINISHED", "exit")
            _wait_for_shipper(folder)
            raise SystemExit(3)
        case "exit 0":
            end(writer, "FINISHED", "exit")
            _wait_for_shipper(folder)
        case _:
            end(writer, "FINISHED", "exit")
    return 0


def _wait_for_shipper(folder: Path) -> None:
    """As `stop()` and the exit hook do: they wait for delivery, so a shipper is there before the program is gone."""
    from tests.shipping import until
    from tracelet.spool.lease import shipper_alive

    until(lambda: shipper_alive(folder))


if __name__ == "__main__":
    what, folder_, store_, *rest = sys.argv[1:]
    sys.exit(
        _ship(Path(folder_), Path(store_))
        if what == "ship"
        else _train(Path(folder_), Path(store_), int(rest[0]), rest[1])
    )
