"""Takes the bytes of an artifact at the call: a copy in the spool, or a reference to a large file.

A copy, because training code rewrites its files; never a hard link, which would show the new bytes. A file of more
than `REFERENCE_ABOVE` bytes is copied only where that costs nothing (a reflink), else its size, time and inode are
noted, and compared before and after the upload. Nothing is left behind when anything is refused.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import math
import os
import posixpath
import secrets
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import time_ns

from tracelet.core import process
from tracelet.errors import FileMissing, InvalidValue, SpoolError, SpoolFull
from tracelet.guard import Guard, logger
from tracelet.records import ArtifactLogged

__all__ = ["REFERENCE_ABOVE", "destination", "take"]

REFERENCE_ABOVE = 1_000_000_000
"""Bytes beyond which a file is referenced instead of copied: copying 1 GB holds training up for 1 to 3 s."""

_FICLONE = 0x40049409  # linux/fs.h
_CHUNK = 1 << 20
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_once = Guard(interval_s=math.inf)
process.renew_after_fork(_once.after_fork_in_child)


@dataclass(frozen=True, slots=True)
class _File:
    source: str  # absolute
    path: str  # in the run's artifacts
    status: os.stat_result


def take(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str] | None,
    folder: Path,
    copy: bool | None = None,
    *,
    room: int | None = None,
    clock: Callable[[], int] = time_ns,
) -> list[ArtifactLogged]:
    """One record for each file of `source`, in the order of their names; copies stand in `folder`/artifacts.

    `path` is the *file* the artifact shall be; None, or a path that ends in "/", takes the file's own name. For a
    folder it is the folder its content shall be in, None the folder's own name; links are followed.
    `copy` None: a copy, or above `REFERENCE_ABOVE` a reference where a reflink can't be had; True and False decide.
    `room`: the most bytes that copies may take; None: no limit.

    Raises:
        FileMissing: there is nothing at `source`.
        InvalidValue: it can't be read or is no file or folder, or `path` can't be a place among artifacts.
        SpoolFull: no room for the copies.

    Cost: reads and writes every byte of what is copied (1 to 3 s a GB on a local disk; by a reflink it is read alone,
    for the digest); a `stat` for a reference.
    Durability: a copy survives the death of the process.
    """
    if not isinstance(source, (str, bytes, os.PathLike)):
        raise InvalidValue(f"an artifact has to be named by its path, not by a {type(source).__name__}", path=source)
    try:
        absolute = os.path.abspath(os.fsdecode(source))
    except FileNotFoundError:
        raise FileMissing(
            f"the working folder, to which {source!a} is relative, no longer exists", path=source
        ) from None
    files = list(_files(absolute, path))
    if not files:
        logger.warning("artifact %s is an empty folder: nothing is logged", absolute)
    store = folder / "artifacts"
    records: list[ArtifactLogged] = []
    try:
        for file in files:
            record = _take_file(file, store, copy, room, clock())
            if record.stored is not None and room is not None:
                room -= record.size
            records.append(record)
    except BaseException:  # Ctrl-C in a long copy too: a copy without a record would stay for ever
        for record in records:
            _remove(folder, record.stored)
        raise
    return records


# ---- what, and under which name ----------------------------------------------------------------------------------


def destination(path: str | os.PathLike[str]) -> str:
    """`path` as a place among a run's artifacts: relative, with single slashes; "" is their root.

    Raises:
        InvalidValue: absolute, with `..`, a backslash or NUL, empty, or not UTF-8.

    Examples:
        >>> from tracelet.core.artifacts import destination
        >>> destination("models//./epoch_10.pth")
        'models/epoch_10.pth'
    """
    text: object = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        raise InvalidValue(f"an artifact's path has to be a str, not {type(text).__name__}", name=text)
    reason = None
    if not text.strip():
        reason = "is empty"
    elif text.startswith("/") or text[1:3] in (":/", ":\\"):
        reason = "is absolute; it is a place among the run's artifacts"
    elif ".." in text.split("/"):
        reason = "leads out of the run's artifacts by '..'"
    elif "\\" in text or "\0" in text:
        reason = "holds a backslash or NUL; use / between folders"
    else:
        try:
            text.encode()
        except UnicodeEncodeError:
            reason = "holds half a character (a lone surrogate)"
    if reason is not None:
        raise InvalidValue(f"an artifact's path {text!a} {reason}", name=text)
    normal = posixpath.normpath(text)
    return "" if normal == "." else normal


def _files(source: str, path: str | os.PathLike[str] | None) -> Iterator[_File]:
    try:
        status = os.stat(source)
    except (FileNotFoundError, NotADirectoryError):
        raise FileMissing(f"there is no file or folder {source}", path=source) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in it
        raise InvalidValue(f"artifact {source!a} can't be read: {error}", path=source) from error
    name = _legal(os.path.basename(source)) or "root"
    if stat.S_ISDIR(status.st_mode):
        prefix = name if path is None else destination(path)
        yield from _walk(source, prefix, [(status.st_dev, status.st_ino)])
    elif stat.S_ISREG(status.st_mode):
        place = name if path is None else destination(path)
        if path is not None and (not place or os.fspath(path).endswith("/")):
            place = posixpath.join(place, name)
        yield _File(source, place, status)
    else:  # opening a pipe would wait for its other end
        raise InvalidValue(f"artifact {source} is neither a file nor a folder", path=source)


def _walk(folder: str, prefix: str, above: list[tuple[int, int]]) -> Iterator[_File]:
    """The files under `folder`. `above` are the folders we stand in, so that a link to one of them is seen."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise InvalidValue(f"artifact {folder} can't be read: {error}", path=folder) from error
    for name in names:
        source = os.path.join(folder, name)
        place = posixpath.join(prefix, _legal(name))
        try:
            status = os.stat(source)
        except OSError as error:  # a broken link, or a file that is just being renamed
            logger.warning("artifact %s is left out: %s", ascii(source), error)
            continue
        key = (status.st_dev, status.st_ino)
        if stat.S_ISREG(status.st_mode):
            yield _File(source, place, status)
        elif not stat.S_ISDIR(status.st_mode):
            logger.warning("artifact %s is left out: it is neither a file nor a folder", ascii(source))
        elif key in above:
            logger.warning("artifact %s is left out: it is a link to a folder it is in", ascii(source))
        else:
            yield from _walk(source, place, [*above, key])


def _legal(name: str) -> str:
    """A file's name as part of a path in any store: bytes that are no UTF-8, and backslashes, as %xx."""
    raw = os.fsencode(name)
    return raw.replace(b"\\", b"%5c").decode("utf-8", "backslashreplace").replace("\\x", "%")


# ---- its bytes ---------------------------------------------------------------------------------------------------


def _take_file(file: _File, store: Path, copy: bool | None, room: int | None, now: int) -> ArtifactLogged:
    status, kind = file.status, _media_type(file.path)
    if copy is not False:
        stored = f"artifacts/{secrets.token_hex(8)}"
        taken = _copy(file, store, store.parent / stored, copy, room)
        if taken is not None:
            size, digest = taken
            return ArtifactLogged(now, file.path, file.source, stored, size, digest, kind)
        _once.limited(
            "reference",
            "artifact %s (%.1f GB) is not copied: it is read when it is uploaded, and must not change until then;"
            " copy=True makes a copy (said once)",
            file.source,
            status.st_size / 1e9,
        )
    if not os.access(file.source, os.R_OK):
        raise InvalidValue(f"artifact {file.source} can't be read: no permission", path=file.source)
    return ArtifactLogged(
        now, file.path, file.source, None, status.st_size, None, kind, status.st_mtime_ns, status.st_ino
    )


def _copy(file: _File, store: Path, target: Path, copy: bool | None, room: int | None) -> tuple[int, str] | None:
    """Size and digest of the copy at `target`, or None for a file that is better referenced."""
    try:
        # O_NONBLOCK: it may have become a pipe since it was looked at, and training must not hang.
        source = os.open(file.source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise FileMissing(f"file {file.source} has gone while it was logged", path=file.source) from None
    except OSError as error:
        raise InvalidValue(f"artifact {file.source} can't be read: {error}", path=file.source) from error
    done = False
    try:
        if room is not None and os.fstat(source).st_size > room:
            raise SpoolFull(
                f"no room for a copy of {file.source}: TRACELET_MAX_BYTES leaves {max(room, 0)} bytes;"
                " copy=False logs a reference",
                path=file.source,
            )
        try:
            store.mkdir(mode=0o700, exist_ok=True)
            out = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _spool_error(file, error) from error
        try:
            if _reflink(source, out):
                result = _digest(file, out)  # of our copy: the file itself may change meanwhile
            elif copy is None and os.fstat(source).st_size > REFERENCE_ABOVE:
                return None
            else:
                result = _digest(file, source, out)
            done = True
        finally:
            try:
                os.close(out)
            except OSError as error:  # where a write is only a promise (NFS, FUSE), what had no room is told here
                done = False
                raise _spool_error(file, error) from error
            finally:
                if not done:
                    with contextlib.suppress(OSError):
                        os.unlink(target)
        return result
    finally:
        os.close(source)


def _reflink(source: int, out: int) -> bool:
    """Let `out` share the blocks of `source` (btrfs, XFS, bcachefs); False where the file system can't."""
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(out, _FICLONE, source)
    except OSError:
        return False
    return True


def _digest(file: _File, source: int, out: int | None = None) -> tuple[int, str]:
    """Size and SHA-256 of what is read from `source`, written to `out` on the way, each byte read once."""
    sha = hashlib.sha256()
    size = 0
    buffer = memoryview(bytearray(_CHUNK))
    while True:
        try:
            count = os.readv(source, [buffer])
        except OSError as error:
            raise InvalidValue(f"artifact {file.source} can't be read: {error}", path=file.source) from error
        if not count:
            return size, sha.hexdigest()
        piece = buffer[:count]
        sha.update(piece)
        size += count
        while out is not None and piece:
            try:
                piece = piece[os.write(out, piece) :]
            except OSError as error:
                raise _spool_error(file, error) from error


def _spool_error(file: _File, error: OSError) -> SpoolError:
    kind = SpoolFull if error.errno in _NO_ROOM else SpoolError
    return kind(
        f"no copy of {file.source} could be made in the spool: {error}; copy=False logs a reference", path=file.source
    )


def _remove(folder: Path, stored: str | None) -> None:
    if stored is not None:
        with contextlib.suppress(OSError):
            (folder / stored).unlink(missing_ok=True)


def _media_type(path: str) -> str:
    try:
        import mimetypes  # reads the system's tables, on the first artifact

        kind, encoding = mimetypes.guess_type(path)
    except OSError:  # they can't be opened: no descriptors are left, for example
        return "application/octet-stream"
    if encoding is not None:
        return {"gzip": "application/gzip", "bzip2": "application/x-bzip2", "xz": "application/x-xz"}.get(
            encoding, "application/octet-stream"
        )
    return kind or "application/octet-stream"
