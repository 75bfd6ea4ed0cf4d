"""What a destination refused for good, one JSON object a line, on disk before the batch counts as done."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tracelet.exporters.base import Refusal

__all__ = ["DeadLetters"]


class DeadLetters:
    """`rejected-<destination>.jsonl`: time, destination, batch, what, reason, facts.

    `write` returns when the lines are on the disk; where it raises, none of them is. Written again after a crash
    (`repeat=True`), a batch's lines that are already there are left out.
    """

    def __init__(self, folder: Path, destination_id: str) -> None:
        self.path = folder / f"rejected-{destination_id}.jsonl"
        self._destination = destination_id

    def write(self, batch: int, items: Sequence[Refusal], *, time_unix_nano: int, repeat: bool = False) -> None:
        """Append `items` of a batch."""
        there = self._written_for(batch) if repeat else set()
        lines: list[str] = []
        for item in items:
            line = {
                "time_unix_nano": time_unix_nano,
                "destination": self._destination,
                "batch": batch,
                "what": item.what,
                "reason": item.reason,
                "facts": dict(item.facts),
            }
            if _content(line) not in there:
                lines.append(json.dumps(line, default=str) + "\n")
        if not lines:
            return
        with open(self.path, "a+b", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            if before and os.pread(file.fileno(), 1, before - 1) != b"\n":  # what a crash left of a line
                lines.insert(0, "\n")
            data = "".join(lines).encode("ascii")
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)  # all of it is written again
                raise

    def _written_for(self, batch: int) -> set[str]:
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return set()
        found = set()
        for raw in text.splitlines():
            try:
                line = json.loads(raw)
            except ValueError:  # a torn line of the crash; what it held is written again
                continue
            if line.get("batch") == batch:
                found.add(_content(line))
        return found


def _content(line: dict[str, Any]) -> str:
    return json.dumps([line["what"], line["reason"], line["facts"]], sort_keys=True, default=str)
