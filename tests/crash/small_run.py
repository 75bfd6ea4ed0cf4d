"""A small run to ship, of which its destination refuses one point: for shippers that meet a fault at a line of ours.

It has two writers, several segments each, all that a shipper does with them comes by: batches, a dead letter, the end,
seals, segments moved out of the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.shipper_process import StoreFile, arrived
from tests.shipping import add_attempt, end, open_writer, put, start
from tracelet.exporters.base import Answer, Refusal, Rejected
from tracelet.records import Batch, ParamsLogged
from tracelet.shipper.deadletter import DeadLetters
from tracelet.spool.cursor import Progress

__all__ = ["Server", "assert_shipped", "make"]

POINTS, BAD = 300, 77


class Server(StoreFile):
    """A destination in a file, which says after a batch has arrived that it does not take one of its points."""

    max_points = 100

    def begin(self, batch: Batch, note: Mapping[str, Any] | None = None) -> Any:
        return _Picky(super().begin(batch, note), batch)


class _Picky:
    note: Mapping[str, Any] = {}

    def __init__(self, arriving: Any, batch: Batch) -> None:
        self._arriving, self._batch = arriving, batch

    def attempt(self) -> Answer:
        answer: Answer = self._arriving.attempt()
        bad = [n for part in self._batch.parts for n in part.points.iterations if n == BAD]
        return Rejected(tuple(Refusal("point", "no", {"iteration": n}) for n in bad)) if bad else answer


def make(folder: Path) -> None:
    """Log the run, to its end; nobody ships it yet."""
    attempt = add_attempt(folder, "a")
    writers = [open_writer(folder, attempt, role, slots_per_segment=64) for role in ("first", "child")]
    start(writers[0])
    for i in range(POINTS):
        writers[i % 2].log(f"m{i % 3}", float(i), i)
    put(writers[0], ParamsLogged(1, {"lr": 0.1}))
    for writer in writers:
        end(writer)


def assert_shipped(folder: Path, file: Path, about: object) -> None:
    """Everything has arrived in `file`, in effect once, and the folder says so; `about` is for the message."""
    batches: dict[int, dict[str, Any]] = {}
    for line in arrived(file):
        line.pop("pid")
        assert batches.setdefault(line["number"], line) == line, ("a repeat differs from the first", about)
    assert sorted(v for one in batches.values() for _, _, v, _, _ in one["points"]) == list(range(POINTS)), about
    assert [end["status"] for one in batches.values() for end in one["ends"]] == ["FINISHED"], about
    assert [letter.facts for letter in DeadLetters(folder, "memory-a").waiting()] == [{"iteration": BAD}], about
    progress = Progress(folder)
    progress.refresh()
    there = progress.destinations["memory-a"]
    assert (there.delivered, there.refused) == (POINTS - 1, 1), about
    assert not list(folder.glob("*.points")), about  # all of it counts as delivered
