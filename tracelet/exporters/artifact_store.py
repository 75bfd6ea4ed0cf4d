"""Making an artifact's bytes reachable before its event leaves by OTLP: in a store both sides reach, or at the gateway.

    TRACELET_ARTIFACT_STORE      a folder (file:///shared/runs) or any URL fsspec opens (s3://, gs://, abfs://)
    TRACELET_ARTIFACT_GATEWAY    https://gateway:4318, with TRACELET_ARTIFACT_TOKEN or TRACELET_ARTIFACT_TOKEN_FILE

With neither, the event says where the file was, and that is all there is. Both ways are by content: what is there with
the right size is not sent again.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from tracelet.addresses import without_credentials
from tracelet.errors import ConfigError
from tracelet.exporters.artifact_names import store_path
from tracelet.exporters.artifact_place import Place, Waiting
from tracelet.exporters.original import CHUNK, Original, umask

__all__ = ["GATEWAY", "STORE", "place_for", "where_artifacts_go"]

STORE = "TRACELET_ARTIFACT_STORE"
GATEWAY = "TRACELET_ARTIFACT_GATEWAY"


def place_for(environ: Mapping[str, str]) -> Place | None:
    """Where this environment sends artifacts; None: nowhere, an event is then a reference.

    Raises:
        ConfigError: both are named, or one that can't be an address.
    """
    store, gateway = environ.get(STORE, "").strip(), environ.get(GATEWAY, "").strip()
    if store and gateway:
        raise ConfigError(f"{STORE} and {GATEWAY} are both set: artifacts go to one of them; unset the other")
    if gateway:
        if urlsplit(gateway).scheme not in ("http", "https") or not urlsplit(gateway).hostname:
            raise ConfigError(f"{GATEWAY} has to be a gateway's address, such as https://gateway:4318")
        from tracelet.exporters.artifact_gateway import GatewayPlace

        return GatewayPlace(gateway, environ)
    if not store:
        return None
    parts = urlsplit(store)
    if parts.scheme in ("http", "https"):
        raise ConfigError(f"{STORE} can't be a web address: files can't be written there; {GATEWAY} names a gateway")
    if parts.scheme in ("", "file"):
        folder = unquote(parts.path) if parts.scheme else store
        if not folder.startswith("/") or parts.netloc not in ("", "localhost"):
            raise ConfigError(f"{STORE} is {store!r}, but a folder needs its whole path: file:///shared/runs")
        return _Folder(Path(folder))
    return _Fsspec(store.rstrip("/"))


def where_artifacts_go(environ: Mapping[str, str]) -> str:
    """One sentence for `doctor`: what becomes of the files that runs log, where they are sent by OTLP.

    Raises:
        ConfigError: as `place_for`.

    Examples:
        >>> where_artifacts_go({"TRACELET_ARTIFACT_STORE": "file:///shared/runs"})
        'go to the store file:///shared/runs (TRACELET_ARTIFACT_STORE)'
        >>> where_artifacts_go({})
        'stay where they are: events name their place only (TRACELET_ARTIFACT_STORE, TRACELET_ARTIFACT_GATEWAY)'
    """
    if place_for(environ) is None:
        return f"stay where they are: events name their place only ({STORE}, {GATEWAY})"
    for name, what in ((STORE, "go to the store"), (GATEWAY, "are put to the gateway")):
        if environ.get(name, "").strip():
            return f"{what} {without_credentials(environ[name].strip())} ({name})"
    raise AssertionError("place_for found an address where there is none")


class _Folder:
    """A folder that both sides see (NFS, a shared volume)."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def uri(self, run_id: str, sha256: str, path: str) -> str:
        return "file://" + quote(str(self._root / store_path(run_id, sha256, path)))

    def put(self, run_id: str, sha256: str, path: str, original: Original) -> None:
        target = self._root / store_path(run_id, sha256, path)
        try:
            if target.is_file() and target.stat().st_size == original.size:
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            self._copy(original, target)
        except OSError as error:
            raise Waiting(f"can't write the artifact to {STORE}: {error}", loud=True) from error

    @staticmethod
    def _copy(original: Original, target: Path) -> None:
        handle, temporary = tempfile.mkstemp(prefix=".tracelet-", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as out:
                original.digest()
                while piece := original.file.read(CHUNK):
                    out.write(piece)
                out.flush()
                os.fsync(out.fileno())
            original.check()
            os.chmod(temporary, 0o666 & ~umask())
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class _Fsspec:
    """Whatever fsspec opens: s3://, gs://, abfs://, ..."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._shown = without_credentials(root)

    def uri(self, run_id: str, sha256: str, path: str) -> str:
        return f"{self._shown}/{store_path(run_id, sha256, path)}"

    def put(self, run_id: str, sha256: str, path: str, original: Original) -> None:
        try:
            import fsspec  # type: ignore[import-untyped]
        except ImportError as error:
            raise Waiting(
                f"{STORE} is {self._shown}, which needs the package fsspec and that store's own: install"
                " tracelet-otel[artifacts] (or [s3], [gcs], [azure]) in the environment of the shipper",
                loud=True,
            ) from error
        try:
            system, target = fsspec.core.url_to_fs(f"{self._root}/{store_path(run_id, sha256, path)}")
            if _size_there(system, target) == original.size:
                return
            original.digest()
            system.makedirs(target.rpartition("/")[0], exist_ok=True)
            system.put_file(original.at, target)
        except (ImportError, ValueError) as error:
            raise Waiting(f"{STORE} {self._shown} can't be used here: {error}", loud=True) from error
        except OSError as error:
            raise Waiting(f"can't write the artifact to {self._shown}: {type(error).__name__}: {error}") from error
        original.check()


def _size_there(system: Any, target: str) -> int | None:
    system.invalidate_cache()
    try:
        return int(system.info(target)["size"])
    except FileNotFoundError:
        return None
