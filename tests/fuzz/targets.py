"""What a fuzzer feeds: every decoder of what lies on a disk, each with a valid input to begin with.

A target takes bytes and either returns or raises what its decoder documents. `python -m tests.fuzz.targets NAME ...`
runs one under atheris, with atheris's own arguments behind the name.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from tracelet import codec
from tracelet.errors import SpoolFormatError
from tracelet.records import ErrorInfo, ParamsLogged, Record, WriterEnded, WriterOpened
from tracelet.spool import frames, store
from tracelet.spool.cursor import Journal, Progress, journal_name
from tracelet.spool.journal import line
from tracelet.spool.points import Header
from tracelet.spool.reader import Position, SlotRange, SpoolReader
from tracelet.spool.seal import read_seal, seal_name, write_seal

__all__ = ["TARGETS", "Target"]

W = "00000000000000aa"


class Target(NamedTuple):
    """One decoder under fuzz."""

    run: Callable[[bytes], None]
    seed: bytes


@contextmanager
def _folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def _header(data: bytes) -> None:
    with suppress(SpoolFormatError):
        Header.unpack(data)


def _frames(data: bytes) -> None:
    with _folder() as folder:
        path = folder / frames.frames_name(W, 1)
        path.write_bytes(data)
        reader = SpoolReader(folder)
        try:
            with suppress(SpoolFormatError):
                for kind, payload in reader.scan_frames(W):
                    _record(bytes((kind,)) + payload)
        finally:
            reader.close()


def _record(data: bytes) -> None:
    with suppress(SpoolFormatError):
        codec.decode(data[0] if data else 0, data[1:])


def _seal(data: bytes) -> None:
    with _folder() as folder:
        (folder / seal_name(W, 1)).write_bytes(data)
        with suppress(SpoolFormatError):
            read_seal(folder, W, 1)


def _segment(data: bytes) -> None:
    with _folder() as folder:
        (folder / f"{W}.lock").touch()
        (folder / f"{W}-000001.points").write_bytes(data)
        reader = SpoolReader(folder)
        try:
            position = Position()
            with suppress(SpoolFormatError):
                for _ in range(1 + len(data) // 32):
                    ranges, after = reader.poll(W, position, 1000, dead=True)
                    for piece in ranges:
                        reader.read(piece)
                    if after == position:
                        return
                    position = after
                raise AssertionError("it reads on for ever")
        finally:
            reader.close()


def _journal(data: bytes) -> None:
    with _folder() as folder:
        (folder / journal_name("file-1")).write_bytes(data)
        with suppress(SpoolFormatError):
            Journal(folder, "file-1").close()
            again = Journal(folder, "file-1")
            again.ack(again.intend([], {}, {}, {}), delivered=0, refused=0) if again.pending is None else None
            again.close()


def _manifest(data: bytes) -> None:
    with _folder() as folder:
        (folder / store.MANIFEST).write_bytes(data)
        with suppress(SpoolFormatError):
            found = store.read_manifest(folder)
            if found is not None:
                assert all(isinstance(one, str) for one in found.destinations)
            progress = Progress(folder)
            progress.refresh()


def _valid(kind: int, payload: bytes) -> bytes:
    return frames.pack_frame(kind, 0, payload)


def _records() -> Iterator[Record]:
    yield WriterOpened(1, "first", 2, 0, "k", 1, {"service.name": "p"})
    yield ParamsLogged(2, {"lr": 0.1, "layers": 3, "name": "é", "on": True})
    yield WriterEnded(3, "FAILED", "exit", ErrorInfo("E", "m", "s"), 1)


def _frames_seed() -> bytes:
    with _folder() as folder:
        writer = frames.FrameWriter(folder, W, lambda _: None)
        for record in _records():
            writer.append(*codec.encode(record))
        writer.close()
        return (folder / frames.frames_name(W, 1)).read_bytes()


def _seal_seed() -> bytes:
    with _folder() as folder:
        fd = os.open(folder / "segment", os.O_RDWR | os.O_CREAT)
        os.pwrite(fd, bytes(12_288), 0)
        write_seal(folder, W, 1, fd, 200)
        os.close(fd)
        return (folder / seal_name(W, 1)).read_bytes()


def _segment_seed() -> bytes:
    from tests.unit.spool.pens import TEXT, end, pen

    with _folder() as folder:
        writer = pen(folder, slots_per_segment=32)
        for i in range(20):
            writer.log("a", i / 2, i)
        writer.frame(TEXT, b"text", 1)
        end(writer)
        (path,) = folder.glob("*.points")
        return path.read_bytes()


def _journal_seed() -> bytes:
    with _folder() as folder:
        kept = Journal(folder, "file-1")
        for i in range(3):
            kept.ack(
                kept.intend([SlotRange(W, 1, i, i + 1)], {W: Position(1, i + 1)}, {}, {"s": (i, i)}),
                delivered=1,
                refused=0,
            )
            kept.remember({"run_id": str(i)})
            kept._compact(anyway=i == 1)
        kept.intend([SlotRange(W, 1, 3, 4)], {W: Position(1, 4, ((1, 2),))}, {"note": 1}, {})
        kept.close()
        return (folder / journal_name("file-1")).read_bytes()


def _manifest_seed() -> bytes:
    with _folder() as folder:
        destinations = ({"id": "file-1", "kind": "file", "spec": {"path": "/x"}},)
        ended = {"status": "FAILED", "end_unix_nano": 5, "error": {"type": "E", "message": "m"}, "exit_code": 1}
        attempt = store.Attempt("k", 1, 2, 0, destinations, ended)
        store.update_manifest(folder, lambda _: store.Manifest("r", "p", "e", "n", attempts=(attempt,)))
        return (folder / store.MANIFEST).read_bytes()


def _line_body(data: bytes) -> None:
    """The body of a journal's line under a right checksum: what damage alone never makes, and a stranger can."""
    text = data.decode("utf-8", "replace").encode("ascii", "backslashreplace").replace(b"\n", b" ")
    kind, _, body = text.partition(b" ")
    rest = kind + b" " + body
    _journal(line("journal", {"mark": "m", "format": 1, "destination": "file-1"}) + b"%08x %s\n" % (crc32(rest), rest))


TARGETS: dict[str, Target] = {
    "header": Target(_header, Header(W, 1, 32, 8).pack()),
    "segment": Target(_segment, _segment_seed()),
    "frames": Target(_frames, _frames_seed()),
    "record": Target(_record, b"\x0a" + codec.encode(list(_records())[2])[1]),
    "seal": Target(_seal, _seal_seed()),
    "journal": Target(_journal, _journal_seed()),
    "journal line": Target(
        _line_body, b'intent {"n":1,"ranges":[],"positions":{"aa":[1,2,[]]},"stamps":{},"note":{},"extra":{}}'
    ),
    "manifest": Target(_manifest, _manifest_seed()),
}


def main() -> None:
    """Fuzz one target until its time is over or it finds something."""
    import atheris

    name = sys.argv.pop(1)
    atheris.instrument_all()
    atheris.Setup(sys.argv, TARGETS[name].run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
