"""What lies on a spool's disk: any bytes end well, and what a decoder takes of them, encoded again, is the same."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from zlib import crc32

from tests.fuzz.target import Target
from tests.fuzz.target import folder as empty
from tracelet import codec, settings
from tracelet.core.claim import claim
from tracelet.core.launchers import Launch
from tracelet.errors import SpoolError, SpoolFormatError
from tracelet.records import ErrorInfo, ParamsLogged, Record, WriterEnded, WriterOpened
from tracelet.shipper.upkeep import keep_rule, max_bytes
from tracelet.spool import frames, store
from tracelet.spool.cursor import Journal, Progress, journal_name
from tracelet.spool.home import LEASE, Watch, read_lease
from tracelet.spool.journal import line
from tracelet.spool.points import Header
from tracelet.spool.reader import Position, SlotRange, SpoolReader
from tracelet.spool.seal import read_seal, seal_name, write_seal

__all__ = ["SPOOL_TARGETS"]

W = "00000000000000aa"


def _header(data: bytes) -> None:
    with suppress(SpoolFormatError):
        found = Header.unpack(data)
        assert found is None or data.startswith(found.pack())


def _frames(data: bytes) -> None:
    with empty() as folder:
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
        found = codec.decode(data[0] if data else 0, data[1:])
        if found is not None:
            written = codec.encode(found)  # compared as written: NaN is not itself, and an order of keys says nothing
            again = codec.decode(*written)
            assert again is not None
            assert codec.encode(again) == written


def _seal(data: bytes) -> None:
    with empty() as folder:
        (folder / seal_name(W, 1)).write_bytes(data)
        with suppress(SpoolFormatError):
            read_seal(folder, W, 1)


def _segment(data: bytes) -> None:
    with empty() as folder:
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
    with empty() as folder:
        (folder / journal_name("file-1")).write_bytes(data)
        with suppress(SpoolFormatError):
            Journal(folder, "file-1").close()
            again = Journal(folder, "file-1")
            again.ack(again.intend([], {}, {}, {}), delivered=0, refused=0) if again.pending is None else None
            again._compact(anyway=True)
            last = Journal(folder, "file-1")
            assert repr(last._state) == repr(again._state)
            again.close()
            last.close()


def _manifest(data: bytes) -> None:
    with empty() as folder:
        (folder / store.MANIFEST).write_bytes(data)
        with suppress(SpoolFormatError):
            found = store.read_manifest(folder)
            progress = Progress(folder)
            progress.refresh()
            if found is not None:
                assert all(isinstance(one, str) for one in found.destinations)
                newest = found.attempts[-1:]
                max_bytes(found.attempts)
                keep_rule(newest[0].extra.get("keep") if newest else None)
                store.update_manifest(folder, lambda _: found)
                assert repr(store.read_manifest(folder)) == repr(found)
                _started_again(folder, found)


def _started_again(folder: Path, found: store.Manifest) -> None:
    """A start that finds this manifest in its run's folder, or on another host."""
    root = folder / "root"
    for host in (store.run_folder(root, "run").name, "another-host"):
        store.update_manifest(root / "run" / host, lambda _: found)
        for launch in (None, Launch(1, 2, ("torchrun", "x"), (0, 1), True)):
            given = settings.resolve({"run_id": "run", "dir": root}, {}, environ={}, cwd=folder, argv=["t.py"])
            with suppress(SpoolError):
                claim(given, destinations=(), now=1, launch=launch)


def _lease(data: bytes) -> None:
    with empty() as folder:
        (folder / LEASE).write_bytes(data)
        read_lease(folder)
        Watch(folder).is_missed()


def _valid(kind: int, payload: bytes) -> bytes:
    return frames.pack_frame(kind, 0, payload)


def _records() -> Iterator[Record]:
    yield WriterOpened(1, "first", 2, 0, "k", 1, {"service.name": "p"})
    yield ParamsLogged(2, {"lr": 0.1, "layers": 3, "name": "é", "on": True})
    yield WriterEnded(3, "FAILED", "exit", ErrorInfo("E", "m", "s"), 1)


def _frames_seed() -> bytes:
    with empty() as folder:
        writer = frames.FrameWriter(folder, W, lambda _: None)
        for record in _records():
            writer.append(*codec.encode(record))
        writer.close()
        return (folder / frames.frames_name(W, 1)).read_bytes()


def _seal_seed() -> bytes:
    with empty() as folder:
        fd = os.open(folder / "segment", os.O_RDWR | os.O_CREAT)
        os.pwrite(fd, bytes(12_288), 0)
        write_seal(folder, W, 1, fd, 200)
        os.close(fd)
        return (folder / seal_name(W, 1)).read_bytes()


def _segment_seed() -> bytes:
    from tests.unit.spool.pens import TEXT, end, pen

    with empty() as folder:
        writer = pen(folder, slots_per_segment=32)
        for i in range(20):
            writer.log("a", i / 2, i)
        writer.frame(TEXT, b"text", 1)
        end(writer)
        (path,) = folder.glob("*.points")
        return path.read_bytes()


def _journal_seed() -> bytes:
    with empty() as folder:
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
    with empty() as folder:
        destinations = ({"id": "file-1", "kind": "file", "spec": {"path": "/x"}},)
        ended = {"status": "FAILED", "end_unix_nano": 5, "error": {"type": "E", "message": "m"}, "exit_code": 1}
        attempt = store.Attempt("k", 1, 2, 0, destinations, ended)
        store.update_manifest(folder, lambda _: store.Manifest("r", "p", "e", "n", attempts=(attempt,)))
        return (folder / store.MANIFEST).read_bytes()


def _unchecked(manifest: bytes) -> bytes:
    """Without its checksum, as one that somebody has edited; with a launch."""
    fields = json.loads(manifest)
    del fields["crc32"]
    launch = {"world": 2, "restarts": [0, 0], "all_here": True, "ranks": {"0": 1}}
    fields["attempts"][0] |= {"launch": launch, "keep": {"max_age_s": 1.0, "max_bytes": 5}, "max_bytes": 9}
    return json.dumps(fields).encode()


def _line_body(data: bytes) -> None:
    """The body of a journal's line under a right checksum: what damage alone never makes, and a stranger can."""
    text = data.decode("utf-8", "replace").encode("ascii", "backslashreplace").replace(b"\n", b" ")
    kind, _, body = text.partition(b" ")
    rest = kind + b" " + body
    _journal(line("journal", {"mark": "m", "format": 1, "destination": "file-1"}) + b"%08x %s\n" % (crc32(rest), rest))


SPOOL_TARGETS: dict[str, Target] = {
    "header": Target(_header, (Header(W, 1, 32, 8).pack(),)),
    "segment": Target(_segment, (_segment_seed(),)),
    "frames": Target(_frames, (_frames_seed(),)),
    "record": Target(_record, tuple(bytes((kind,)) + payload for kind, payload in map(codec.encode, _records()))),
    "seal": Target(_seal, (_seal_seed(),)),
    "journal": Target(_journal, (_journal_seed(),)),
    "journal line": Target(
        _line_body, (b'intent {"n":1,"ranges":[],"positions":{"aa":[1,2,[]]},"stamps":{},"note":{},"extra":{}}',)
    ),
    "manifest": Target(_manifest, (_manifest_seed(), _unchecked(_manifest_seed()))),
    "lease": Target(_lease, (b'{"holder": "a", "beat": 17, "renewed_unix_nano": 5, "host": "h"}',)),
}
