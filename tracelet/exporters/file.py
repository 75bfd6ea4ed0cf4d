"""The file exporter: OTLP JSON lines, which a collector's `otlp_json_file` receiver reads back.

One line is one request: one signal of one Resource. Several runs may write to one file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tracelet.exporters.base import Answer, Delivered, RetryLater
from tracelet.otlp import semconv
from tracelet.otlp.encode import Load, swells
from tracelet.otlp.encode_json import json_line
from tracelet.otlp.plan import Ledger, Plan, heartbeat_load, plan
from tracelet.records import Batch, Heartbeat, RunInfo

__all__ = ["FileExporter"]

_OURS = b'{"resource'  # every line of ours begins so
_LOCKED_S = 0.1


class FileExporter:
    """Appends to the file `spec["path"]`, each batch flushed to disk before it counts as delivered.

    A repeat does not double lines: the note holds where the file ended before the batch, and only lines that don't
    stand behind that place are written.
    """

    max_points = 16_000
    linger_s = 1.0
    rising_limit_s: float | None = 60.0
    shows_repeats = True

    def __init__(self, spec: Mapping[str, Any], secrets: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        self._path = Path(spec["path"])
        self._ledger = Ledger()

    def open(self, run: RunInfo, memory: Mapping[str, Any]) -> Answer:
        """Make the file's folder."""
        self._ledger = Ledger.from_json(memory)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return RetryLater(f"the folder of {self._path} can't be made: {error}", loud=True)
        return Delivered()

    def memory(self) -> Mapping[str, Any]:
        """What later batches need of those that are through, and where the file is."""
        return {**self._ledger.to_json(), "link": self._path.as_uri()}

    def begin(self, batch: Batch, note: Mapping[str, Any] | None = None) -> _FileDelivery:
        """Prepare a batch; with `note`, lines that are there already are not written again."""
        planned = plan(batch, self._ledger, note)
        offset = note.get("offset", 0) if note else self._size()
        return _FileDelivery(self, planned, {**planned.note, "offset": offset}, unclear=note is not None)

    def beat(self, batch: Batch, heartbeat: Heartbeat) -> None:
        """Append the run's state, unless the file can't be had at once."""
        try:
            with self.locked() as file:
                if file is not None:
                    append(file, [json_line(heartbeat_load(batch, heartbeat, self._ledger)).encode()])
                    self._ledger.beaten(heartbeat)
        except OSError:
            pass  # best effort; a batch that meets the same trouble says so

    def close(self) -> None:
        """The file is open only while it is written."""

    def through(self, planned: Plan) -> None:
        """The batch is on disk."""
        self._ledger = self._ledger.after(planned)

    @property
    def path(self) -> Path:
        """Where the lines go."""
        return self._path

    def _size(self) -> int:
        try:
            return self._path.stat().st_size
        except OSError:
            return 0

    @contextmanager
    def locked(self) -> Iterator[int | None]:
        """The file, open and ours alone; None while another shipper is writing to it."""
        file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            yield file
        finally:
            os.close(file)  # and the lock with it


class _FileDelivery:
    """One batch on its way to the file."""

    def __init__(self, exporter: FileExporter, planned: Plan, note: Mapping[str, Any], *, unclear: bool) -> None:
        self._exporter = exporter
        self._planned = planned
        self._note = note
        self._unclear = unclear  # whether some of the lines may be there

    @property
    def note(self) -> Mapping[str, Any]:
        """Where the file ended before this batch, and what a repeat needs to make the same lines."""
        return self._note

    def attempt(self) -> Answer:
        """Append what isn't there, and flush it to disk."""
        lines = [line for load in self._planned.loads for line in _lines(load)]
        try:
            with self._exporter.locked() as file:
                if file is None:
                    return RetryLater("another run is writing to the file", after_s=_LOCKED_S)
                if self._unclear:
                    there = _digests(file, self._note["offset"])
                    lines = [line for line in lines if _digest(line) not in there]
                self._unclear = True
                append(file, lines)
                os.fsync(file)
        except OSError as error:
            return RetryLater(f"{self._exporter.path} can't be written: {error}", loud=True)
        self._exporter.through(self._planned)
        return Delivered()


def _lines(load: Load) -> list[bytes]:
    # The receiver's own limit of a line is 1 MiB (max_log_size); longer ones would be cut in two. What it reads goes on
    # as a request.
    if not swells(load):
        line = json_line(load).encode()
        if len(line) <= semconv.REQUEST_MAX_BYTES or len(load) < 2:
            return [line]
    first, second = load.halves()
    return _lines(first) + _lines(second)


def append(file: int, lines: Sequence[bytes]) -> None:
    """Write whole lines at the end, or none of them.

    Raises:
        OSError: the disk is full or gone; what was written of them has been cut off again.
    """
    end = os.fstat(file).st_size
    whole = _whole_end(file, end)
    if whole != end:
        os.ftruncate(file, whole)  # a writer died within its line, and repeats it
    data = b"".join(line + b"\n" for line in lines)
    if whole and os.pread(file, 1, whole - 1) != b"\n":
        data = b"\n" + data  # somebody else's last line, left as it is
    try:
        while data:
            data = data[os.write(file, data) :]
    except OSError:
        os.ftruncate(file, whole)
        raise


def _whole_end(file: int, end: int) -> int:
    """Where the last line that isn't a torn one of ours ends."""
    at = end
    while at > 0:
        start = max(0, at - 65_536)
        block = os.pread(file, at - start, start)
        newline = block.rfind(b"\n")
        if newline >= 0 or start == 0:
            line = start + newline + 1
            return line if _is_torn(os.pread(file, end - line, line)) else end
        at = start
    return end


def _is_torn(tail: bytes) -> bool:
    """Whether what stands behind the last newline is the beginning of a line of ours."""
    if not tail or not _OURS.startswith(tail[: len(_OURS)]):
        return False
    try:
        json.loads(tail)
    except ValueError:
        return True
    return False  # whole but for its newline


def _digests(file: int, offset: int) -> set[bytes]:
    """Digests of the lines behind `offset`; of all, where the file has been made anew since."""
    if os.fstat(file).st_size < offset:
        offset = 0
    with open(os.dup(file), "rb") as lines:
        lines.seek(offset)
        return {_digest(line.rstrip(b"\n")) for line in lines}


def _digest(line: bytes) -> bytes:
    return hashlib.blake2b(line, digest_size=16).digest()
