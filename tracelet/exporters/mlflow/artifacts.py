"""A file of the run into MLflow's artifacts, under exactly the path it was logged as, whatever stands behind them.

Through the tracking server's proxy it is streamed, to a folder it is copied and put in place at once; for a cloud
store mlflow's own repositories are used, with a symbolic link that has the wanted name.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, unquote, urlsplit

from tracelet.exporters.base import Refusal
from tracelet.exporters.mlflow.connection import Connection
from tracelet.exporters.mlflow.fetch import Fetched, OnlyReference, Sources
from tracelet.exporters.mlflow.limits import ARTIFACT_PATH_BYTES
from tracelet.exporters.mlflow.rest import explain
from tracelet.exporters.mlflow.transport import NotNow, Refused, Unclear
from tracelet.exporters.original import CHUNK, Changed, Original, place_of, umask
from tracelet.records import ArtifactLogged

__all__ = ["REFERENCE_SUFFIX", "ArtifactStore", "reference", "unsafe"]

REFERENCE_SUFFIX = ".reference.json"

_PROXY = "/api/2.0/mlflow-artifacts/artifacts/"
_LIST = "/api/2.0/mlflow-artifacts/artifacts"


class ArtifactStore:
    """Where a run's files go. `connection` is the tracking server's, None for a database.

    `sources` says what may be opened of addresses that came over the wire; None: nothing.
    """

    def __init__(
        self,
        connection: Connection | None,
        environ: Mapping[str, str],
        sources: Sources | None = None,
        tracking_uri: str | None = None,
    ) -> None:
        """`tracking_uri`: whom mlflow's own repositories ask for the way to a store (`dbfs:`, `runs:`)."""
        self._tracking_uri = tracking_uri
        self._sources = sources or Sources({})
        self._connection = connection
        self._environ = environ

    def put(self, artifact_uri: str, folder: str, artifact: ArtifactLogged) -> Refusal | None:
        """Store one logged file; None once it is there.

        Raises:
            NotNow: the store can't be reached, or wants something from a person.
        """
        facts = {"path": artifact.path, "source": artifact.source, "stored": artifact.stored, "size": artifact.size}
        reason = unsafe(artifact.path)
        if reason is not None:
            return Refusal("artifact", reason, facts)
        at = place_of(artifact, folder)
        try:
            with open(at, "rb") as file:
                Original(file, artifact, at).check()
                self._store(artifact_uri, artifact.path, Original(file, artifact, at))
        except Changed as changed:
            return Refusal("artifact", str(changed), facts)
        except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
            return Refusal("artifact", f"{at} can't be read any more: {error}", facts)
        except Refused as no:
            return Refusal("artifact", f"MLflow refuses {artifact.path!r}: {no}", facts)
        return None

    def put_received(
        self, artifact_uri: str, run_id: str, artifact: ArtifactLogged, event: str = ""
    ) -> tuple[str | None, Refusal | None]:
        """Store a file that is named by an address: its bytes, or `<path>.reference.json` and why.

        `event` is the `event_mark` of what told of it, by which a gateway that holds the bytes may let them go.

        Raises:
            NotNow: where the bytes are, or where they go, can't be reached.
        """
        reason = unsafe(artifact.path)
        if reason is not None:
            return None, Refusal(
                "artifact", reason, {"path": artifact.path, "uri": artifact.uri, "size": artifact.size}
            )
        try:
            fetched = self._sources.open(run_id, artifact)
            try:
                self._store(artifact_uri, artifact.path, fetched)
            finally:
                fetched.close()
            self._sources.settle(run_id, artifact, event)
        except (OnlyReference, Changed) as no:
            if self._sources.is_settled(run_id, artifact, event):
                return None, None  # it came before a crash, and the gateway has let its copy go since
            why = str(no)
        except Refused as no:
            return None, Refusal(
                "artifact", f"MLflow refuses {artifact.path!r}: {no}", {"path": artifact.path, "uri": artifact.uri}
            )
        else:
            return None, None
        return why, self.put_text(artifact_uri, artifact.path + REFERENCE_SUFFIX, reference(artifact, why))

    def put_text(self, artifact_uri: str, path: str, text: str) -> Refusal | None:
        """Store `text` as a file of UTF-8; None once it is there."""
        content = text.encode("utf-8", "backslashreplace")
        try:
            self._store(artifact_uri, path, _Text(content))
        except Refused as no:
            return Refusal("artifact", f"MLflow refuses {path!r}: {no}", {"path": path, "text": text})
        return None

    def _store(self, artifact_uri: str, path: str, original: _Bytes) -> None:
        parts = urlsplit(artifact_uri)
        if parts.scheme == "mlflow-artifacts" and self._connection is not None and not parts.netloc:
            _through_proxy(self._connection, posixpath.join(parts.path.lstrip("/"), path), original)
        elif parts.scheme in ("", "file"):
            root = unquote(parts.path) if parts.scheme else artifact_uri
            _into_folder(Path(root), path, original)
        else:
            _by_mlflow(artifact_uri, path, original, self._tracking_uri)


def reference(artifact: ArtifactLogged, why: str) -> str:
    """What stands in MLflow for a file that is not there: where it is, how to know it, and why it was not copied."""
    facts = {
        "uri": artifact.uri,
        "digest": None if artifact.sha256 is None else f"sha256:{artifact.sha256}",
        "size": artifact.size,
        "media_type": artifact.media_type,
        "why": why,
    }
    return json.dumps(facts, indent=2) + "\n"


def unsafe(path: str) -> str | None:
    """Why `path` can't name a file inside the run's artifacts, or None if it can."""
    leaves = path.startswith(("/", "../")) or path in (".", "..")
    if not path or path != posixpath.normpath(path) or leaves:
        return f"the artifact path {path!r} leaves the run's folder or is not plain: use one such as 'models/best.pt'"
    if "\x00" in path or any(len(part.encode("utf-8", "replace")) > ARTIFACT_PATH_BYTES for part in path.split("/")):
        return f"the artifact path {path[:80]!r} has a part that no file system takes (over 255 bytes, or a NUL)"
    return None


class _Text:
    """A text of ours as if it were a file."""

    def __init__(self, content: bytes) -> None:
        self.file: BinaryIO = io.BytesIO(content)
        self.size = len(content)
        self.at = ""

    def check(self) -> None: ...

    def digest(self) -> None:
        self.file.seek(0)

    def compare(self, sha256: str) -> None: ...


_Bytes = Original | Fetched | _Text


def _through_proxy(connection: Connection, path: str, original: _Bytes) -> None:
    original.digest()
    address = _PROXY + quote(path, safe="/")
    kind = "application/octet-stream"
    try:
        reply = connection.request("PUT", address, stream=(original.file, original.size), content_type=kind)
        if reply.status != 200:
            raise explain(reply, connection)
    except Unclear:
        taken = _taken(connection, path)
        if taken is not None:
            raise Refused("ALREADY_EXISTS", taken) from None
        raise
    try:
        original.check()
    except Changed:
        connection.request("DELETE", address)  # a mixture of two states is nobody's file
        raise


def _taken(connection: Connection, path: str) -> str | None:
    """Why a server that fails with 5xx will always fail: a file stands where `path` needs a folder, or the reverse."""
    parts = path.split("/")
    for depth in range(3, len(parts)):  # experiment, run and "artifacts" are MLflow's own
        folder, name = "/".join(parts[:depth]), parts[depth]
        reply = connection.request("GET", f"{_LIST}?path={quote(folder, safe='')}")
        try:
            entries = {file["path"]: bool(file.get("is_dir")) for file in json.loads(reply.body).get("files", ())}
        except (ValueError, AttributeError, KeyError, TypeError):
            return None
        is_last = depth == len(parts) - 1
        if entries.get(name) is is_last:  # a folder where the file should go, a file where a folder should be
            return f"{'/'.join(parts[3 : depth + 1])!r} is already a {'folder' if is_last else 'file'} of this run"
    return None


def _into_folder(root: Path, path: str, original: _Bytes) -> None:
    target = root / path
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".tracelet-", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as out:
                original.file.seek(0)
                digest = hashlib.sha256()
                while piece := original.file.read(CHUNK):
                    digest.update(piece)
                    out.write(piece)
            original.compare(digest.hexdigest())
            original.check()
            os.chmod(temporary, 0o666 & ~umask())
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
    except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
        raise Refused("ALREADY_EXISTS", f"a file stands where a folder is needed, or the reverse: {error}") from error
    except OSError as error:
        raise NotNow(
            f"can't write the artifact {target}: {error}. MLflow says that this run's files belong there; if that"
            " is a folder of another machine, start the MLflow server with --serve-artifacts",
            loud=True,
        ) from error


def _by_mlflow(artifact_uri: str, path: str, original: _Bytes, tracking_uri: str | None) -> None:
    from tracelet.exporters.mlflow.store import artifact_repository

    original.digest()
    scratch = tempfile.mkdtemp(prefix="tracelet-")
    try:
        named = os.path.join(scratch, posixpath.basename(path))
        if original.at:
            os.symlink(os.path.abspath(original.at), named)
        else:
            with open(named, "wb") as copy:
                shutil.copyfileobj(original.file, copy, CHUNK)
        repository = artifact_repository(artifact_uri, tracking_uri)
        try:
            repository.log_artifact(named, posixpath.dirname(path) or None)
            original.check()
        except Changed:
            repository.delete_artifacts(path)
            raise
        except Exception as error:
            # The stores' SDKs raise what they like; all of it means that the file is not there yet.
            raise NotNow(f"can't store the artifact {path!r} at {urlsplit(artifact_uri).scheme}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
