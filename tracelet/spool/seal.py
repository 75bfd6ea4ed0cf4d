"""Seals: a checksum for each 4 KiB page of a segment that nobody writes to any more.

A seal file is `magic, version, writer id, segment, used slots, pages`, then a crc32 for each page (page 0 is the
segment's header), then the crc32 of all that. It is made by the shipper; a checksum of each record would cost training
0.12 us a point.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from tracelet.spool.pages import PAGE, Pread

__all__ = ["VERSION", "Seal", "foreign_version", "read_seal", "seal_name", "write_seal"]

MAGIC = b"TRLTSEAL"
VERSION = 1
_HEADER = struct.Struct("<8sI16sIII")


class Seal(NamedTuple):
    """How many slots of a segment were used, and the checksum of each of its pages."""

    slots: int
    crcs: tuple[int, ...]


def seal_name(writer: str, number: int) -> str:
    """The file name of a segment's seal."""
    return f"{writer}-{number:06d}.seal"


def write_seal(folder: Path, writer: str, number: int, fd: int, slots: int, *, pread: Pread = os.pread) -> Seal:
    """Seal the segment open as `fd`; the file appears whole or not at all."""
    crcs: list[int] = []
    size = os.fstat(fd).st_size
    for at in range(0, size, PAGE):
        crcs.append(crc32(pread(fd, PAGE, at)))
    data = _HEADER.pack(MAGIC, VERSION, writer.encode("ascii"), number, slots, len(crcs))
    data += struct.pack(f"<{len(crcs)}I", *crcs)
    data += crc32(data).to_bytes(4, "little")
    path = folder / seal_name(writer, number)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            if os.write(new, data) != len(data):
                raise OSError(28, "No space left on device")
        finally:
            os.close(new)
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return Seal(slots, tuple(crcs))


def read_seal(folder: Path, writer: str, number: int) -> Seal | None:
    """The seal of a segment; None where there is none, none that is whole, or one of another version."""
    data = _whole(folder, writer, number)
    if data is None:
        return None
    magic, version, _, _, slots, pages = _HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION or len(data) != _HEADER.size + 4 * pages + 4:
        return None
    return Seal(slots, struct.unpack_from(f"<{pages}I", data, _HEADER.size))


def foreign_version(folder: Path, writer: str, number: int) -> int | None:
    """The version of a whole seal that this release can't read: not to be written over. None: there is no such."""
    data = _whole(folder, writer, number)
    if data is None:
        return None
    magic, version, *_ = _HEADER.unpack_from(data)
    return int(version) if magic == MAGIC and version != VERSION else None


def _whole(folder: Path, writer: str, number: int) -> bytes | None:
    for place in (folder, folder / "delivered"):
        try:
            data = (place / seal_name(writer, number)).read_bytes()
        except FileNotFoundError:
            continue
        except OSError:  # a disk that can't read it: as good as damaged
            return None
        if len(data) < _HEADER.size + 4 or crc32(data[:-4]).to_bytes(4, "little") != data[-4:]:
            return None
        return data
    return None
