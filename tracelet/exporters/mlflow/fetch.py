"""Opening an address that came over the wire: what the gateway holds itself, or what is below prefixes it was given.

Anybody who may send telemetry may name any address, so nothing here is opened because it can be. A path below a folder
is walked one component at a time without following links, so that neither `..`, nor an encoding of it, nor a link
planted a moment ago leads out; web addresses are never opened, and neither is anything but a plain file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

from tracelet.errors import ConfigError
from tracelet.exporters.artifact_names import GATEWAY_SCHEME, gateway_digest, had_name, held_at, wanted_name
from tracelet.exporters.mlflow.transport import NotNow
from tracelet.exporters.original import CHUNK, Changed
from tracelet.guard import guard
from tracelet.records import ArtifactLogged

__all__ = ["MAX_BYTES", "Fetched", "OnlyReference", "Sources"]

MAX_BYTES = 5 * 1024**3
"""Larger files stay where they are, and MLflow gets a reference, unless the setting says otherwise."""

# Schemes that can't be prefixes: the web, other names of local files, and fsspec's wrappers of other addresses.
_NEVER = frozenset(
    (
        *("http", "https", "local", "data", "zip", "tar", "libarchive", "dir", "reference", "jupyter", "git", "github"),
        *("simplecache", "filecache", "blockcache", "cached", "generic", "asyncwrapper"),
    )
)
_LINK = "it leads through a link, a device or a pipe, which are never followed"
_OUTSIDE = "the gateway opens no address there (--artifact-prefix)"


class OnlyReference(Exception):
    """These bytes are not fetched, and never will be; the text says why, for the reference that stands for them."""


@dataclass(frozen=True, slots=True)
class _Prefix:
    head: str  # "file://", "s3://bucket"
    path: str  # "/shared", "/team": without a slash at the end


class Sources:
    """What a destination may open: its spec's `artifact_prefixes`, `artifact_dir` and `artifact_max_bytes`.

    Raises:
        ConfigError: a prefix that can't be one.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self._folder: str | None = spec.get("artifact_dir")
        self._where = str(spec.get("tracking_uri", ""))
        most = spec.get("artifact_max_bytes")
        self._max_bytes = MAX_BYTES if most is None else int(most)
        self._prefixes = tuple(_prefix(str(text)) for text in spec.get("artifact_prefixes") or ())

    def open(self, run_id: str, artifact: ArtifactLogged) -> Fetched:
        """The bytes of an artifact with an address; the caller closes `file`.

        Raises:
            OnlyReference: by a rule, by size, or because nothing is there.
            NotNow: the store can't be reached.
        """
        uri = artifact.uri or ""
        if artifact.size > self._max_bytes:
            raise OnlyReference(f"{artifact.size} bytes are more than this gateway copies ({self._max_bytes})")
        is_held = uri.startswith(f"{GATEWAY_SCHEME}:")
        file = self._held(run_id, artifact, uri) if is_held else self._below(uri)
        fetched = Fetched(file, artifact)
        try:
            fetched.measure()
        except BaseException:
            fetched.close()
            raise
        return fetched

    def settle(self, run_id: str, artifact: ArtifactLogged, event: str) -> None:
        """The bytes that the gateway holds for this event are at the destination: it need not keep them for that.

        A mark beside the file, which another destination does not take for its own; the gateway deletes the file once
        no other event needs it. A mark that can't be written keeps the file.
        """
        folder, digest = self._held_in(run_id, artifact)
        if folder is None:
            return
        with guard("note that an artifact is delivered"):
            handle = os.open(f"{folder}/{had_name(digest, event)}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with os.fdopen(handle, "w", encoding="utf-8") as mark:
                mark.truncate()
                mark.write(self._where)
                mark.flush()
                os.fsync(handle)  # before what keeps the file goes
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{folder}/{wanted_name(digest, event)}")

    def is_settled(self, run_id: str, artifact: ArtifactLogged, event: str) -> bool:
        """Whether an earlier try, before a crash, brought this event's bytes to the destination."""
        folder, digest = self._held_in(run_id, artifact)
        try:
            with open(f"{folder}/{had_name(digest, event)}", encoding="utf-8") as mark:
                return folder is not None and mark.read() == self._where
        except OSError:
            return False

    def _held_in(self, run_id: str, artifact: ArtifactLogged) -> tuple[str | None, str]:
        digest = gateway_digest(artifact.uri or "")
        if digest is None or self._folder is None:
            return None, ""
        return os.path.dirname(f"{self._folder}/{held_at(run_id, digest)}"), digest

    def _held(self, run_id: str, artifact: ArtifactLogged, uri: str) -> BinaryIO:
        digest = gateway_digest(uri)
        if digest is None or (artifact.sha256 is not None and artifact.sha256 != digest):
            raise OnlyReference("the address is not that of the bytes that the event describes")
        if self._folder is None:
            raise OnlyReference("no folder of a gateway is known here")
        return _open_below(self._folder, held_at(run_id, digest))

    def _below(self, uri: str) -> BinaryIO:
        head, path = _split(uri)
        for prefix in self._prefixes:
            if prefix.head == head and path.startswith(prefix.path + "/"):
                inner = path[len(prefix.path) + 1 :]
                if prefix.head == "file://":
                    return _open_below(prefix.path or "/", inner)
                return _open_remote(f"{head}{path}")
        raise OnlyReference(_OUTSIDE)


def _prefix(text: str) -> _Prefix:
    address = text if "://" in text or not text.startswith("/") else f"file://{text}"
    scheme = urlsplit(address).scheme
    if scheme in _NEVER or not scheme:
        raise ConfigError(
            f"{text!r} can't be an artifact prefix: use a folder (file:///shared) or a store (s3://bucket)"
        )
    try:
        head, path = _split(address.rstrip("/") or address)
    except OnlyReference as no:
        raise ConfigError(f"{text!r} can't be an artifact prefix: {no}") from no
    if not path and head == "file://":
        raise ConfigError(f"{text!r} can't be an artifact prefix: all files of this machine would be below it")
    return _Prefix(head, path)


def _split(uri: str) -> tuple[str, str]:
    """Scheme and host, and the decoded path, of an address that has only one reading."""
    if not uri or "::" in uri or "\\" in uri or any(ord(c) < 0x20 or ord(c) == 0x7F for c in uri):
        raise OnlyReference("the address is none that is opened")
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise OnlyReference(f"the address is none that is opened: {error}") from error
    if not parts.scheme or parts.query or parts.fragment or "?" in uri or "#" in uri or "@" in parts.netloc:
        raise OnlyReference("the address is none that is opened")
    is_file = parts.scheme == "file"
    if parts.scheme in _NEVER or (is_file and parts.netloc not in ("", "localhost")):
        raise OnlyReference(_OUTSIDE)
    path = unquote(parts.path, errors="surrogateescape") if is_file else parts.path
    pieces = path.split("/")[1:]
    readings = [piece for one in pieces for piece in (one, unquote(one), unquote(unquote(one)))]
    if any(piece in ("", ".", "..") or "\x00" in piece for piece in readings) or (path and path[0] != "/"):
        raise OnlyReference("the address is not plain: it has empty parts, '.' or '..'")
    return f"{parts.scheme}://{'' if is_file else parts.netloc}", path


def _open_below(root: str, path: str) -> BinaryIO:
    """A plain file below `root`, reached without following one link on the way."""
    parts = path.split("/")
    try:
        folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # the prefix itself was given by a person
    except OSError as error:
        raise NotNow(f"the folder {root} for artifacts can't be opened: {error}", loud=True) from error
    try:
        for part in parts[:-1]:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.close(folder)
            folder = inner
        # Not blocking: the other end of a pipe would be waited for.
        handle = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError as error:
        raise OnlyReference("nothing is there (any more)") from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            raise OnlyReference(_LINK) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENAMETOOLONG):
            raise OnlyReference(f"it can't be opened: {error.strerror}") from error
        raise NotNow(f"an artifact below {root} can't be opened: {error}") from error
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OnlyReference(_LINK)
    return os.fdopen(handle, "rb")


def _open_remote(uri: str) -> BinaryIO:
    try:
        import fsspec  # type: ignore[import-untyped]

        return cast(BinaryIO, fsspec.open(uri, "rb").open())
    except (ImportError, ValueError) as error:
        raise NotNow(f"an artifact at {urlsplit(uri).scheme}:// needs a package here: {error}", loud=True) from error
    except (FileNotFoundError, IsADirectoryError) as error:
        raise OnlyReference("nothing is there (any more)") from error
    except PermissionError as error:
        raise NotNow(f"the store of an artifact refuses this gateway: {error}", loud=True) from error
    except OSError as error:
        raise NotNow(f"the store of an artifact can't be read: {type(error).__name__}: {error}") from error


class _Hashing:
    """A file that knows the digest of what was read of it since it was last at its start."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.count = 0

    def read(self, size: int = -1) -> bytes:
        piece = self._file.read(size)
        self.digest.update(piece)
        self.count += len(piece)
        return piece

    def seek(self, offset: int, whence: int = 0) -> int:
        if (offset, whence) != (0, 0):
            raise OSError("only to the start")
        self.digest, self.count = hashlib.sha256(), 0
        return self._file.seek(0)


class Fetched:
    """An artifact's bytes as `artifacts.ArtifactStore` sends them: what is sent is what is compared."""

    at = ""

    def __init__(self, file: BinaryIO, artifact: ArtifactLogged) -> None:
        self._raw = file
        self._reader = _Hashing(file)
        self.file = cast(BinaryIO, self._reader)
        self.size = artifact.size
        self._sha256 = artifact.sha256

    def measure(self) -> None:
        """Raise `OnlyReference` if there are more or fewer bytes than the event says."""
        there = self._raw.seek(0, os.SEEK_END)
        self._raw.seek(0)
        if there != self.size:
            raise OnlyReference(f"{there} bytes are there, and the event says {self.size}")

    def digest(self) -> None:
        """Read it once, compare, and go back to the start."""
        self.file.seek(0)
        while self.file.read(CHUNK):
            pass
        self.check()
        self.file.seek(0)

    def check(self) -> None:
        """After it was sent: what was read is what the event describes."""
        if self._reader.count != self.size:
            raise Changed(f"{self._reader.count} bytes were read, and the event says {self.size}")
        self.compare(self._reader.digest.hexdigest())

    def compare(self, sha256: str) -> None:
        """Raise `Changed` for another digest than the event's."""
        if self._sha256 is not None and sha256 != self._sha256:
            raise Changed(f"the bytes there have the sha256 {sha256}, and the event says {self._sha256}")

    def close(self) -> None:
        """Let the file go."""
        self._raw.close()
