"""An artifact's bytes put to the gateway over HTTP, in pieces, from where an earlier try was cut off.

HEAD  /v1/artifacts/<run>/<sha256>     404, or 200 with Upload-Offset (bytes there) and Upload-Complete (?0, ?1)
                                       tracelet.artifact.event: for which event; until MLflow has it the file stays
PATCH /v1/artifacts/<run>/<sha256>     Upload-Offset, Upload-Length: append; 204 more to come, 201 complete,
                                       409 another offset, 413 too large, 422 other bytes than the digest says,
                                       423 somebody else is at it, 507 no room
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tracelet.addresses import without_credentials
from tracelet.exporters.artifact_names import EVENT_HEADER, WHY_HEADER, event_mark, gateway_uri, plain_name
from tracelet.exporters.artifact_place import NeverTaken, Waiting
from tracelet.exporters.original import Original
from tracelet.exporters.otlp_wire import WIRE_HEADER, said, suppressed
from tracelet.exporters.retry_after import retry_after
from tracelet.sieve import Sieve

__all__ = ["TOKEN", "TOKEN_FILE", "GatewayPlace"]

TOKEN = "TRACELET_ARTIFACT_TOKEN"
TOKEN_FILE = "TRACELET_ARTIFACT_TOKEN_FILE"
_PIECE = 8 << 20
_READ = 1 << 18
_TIMEOUT_S = (10.0, 600.0)  # the last piece is answered when the gateway has read and flushed the whole


class GatewayPlace:
    """The gateway that the run's telemetry ends at, or any other with the same folder."""

    def __init__(self, address: str, environ: Mapping[str, str]) -> None:
        self._base = address.rstrip("/") + "/v1/artifacts"
        self._shown = without_credentials(address)
        self._environ = environ
        self._session: Any = None

    def uri(self, run_id: str, sha256: str, path: str) -> str:
        """Opaque: the gateway knows the run, and where it keeps what."""
        return gateway_uri(sha256)

    def put(self, run_id: str, sha256: str, path: str, original: Original) -> None:
        """See `artifact_place.Place`."""
        address = f"{self._base}/{plain_name(run_id)}/{sha256}"
        event = {EVENT_HEADER: event_mark(original.logged_unix_nano, path)}
        offset, is_complete = self._offset(address, event)
        while not is_complete:
            if offset > original.size:
                raise Waiting(f"{self._shown} has more bytes of {path!r} than there are", loud=True)
            original.file.seek(offset)
            size = min(_PIECE, original.size - offset)
            reply = self._ask(
                "PATCH",
                address,
                {
                    "Upload-Offset": str(offset),
                    "Upload-Length": str(original.size),
                    "Content-Length": str(size),
                    **event,
                },
                _read(original, size),
            )
            if reply.status_code == 422:
                original.digest()  # raises Changed, where it is our file that is not as it was
                raise Waiting(f"{self._shown} got other bytes of {path!r} than were sent; it begins again")
            self._refused(reply, path, (201, 204, 409))
            offset, is_complete = _state(reply)
            if reply.status_code == 409:
                offset, is_complete = self._offset(address, event)
        # The gateway has compared the digest: it has what was logged, whatever has become of the file meanwhile.

    def _offset(self, address: str, event: dict[str, str]) -> tuple[int, bool]:
        reply = self._ask("HEAD", address, event, None)
        if reply.status_code == 404 and WIRE_HEADER[0] in reply.headers:
            return 0, False
        if reply.status_code == 404:
            raise Waiting(f"{self._shown} takes no artifacts (404): is it the gateway's address?", loud=True)
        self._refused(reply, address, (200,))
        return _state(reply)

    def _refused(self, reply: Any, path: str, fine: tuple[int, ...]) -> None:
        status = reply.status_code
        if status in fine:
            return
        words = self._clean(reply.text or reply.headers.get(WHY_HEADER) or reply.reason or "", self._token())
        if status == 413:
            raise NeverTaken(f"{self._shown} takes no file as large as {path!r}: {words}")
        if status in (401, 403):
            raise Waiting(f"{self._shown} refuses artifacts of ours ({status}: {words}): check {TOKEN}", loud=True)
        raise Waiting(
            f"{self._shown} answers {status} to an artifact: {words}",
            retry_after(reply.headers.get("Retry-After")),
            loud=status in (404, 405, 507) or 300 <= status < 400,
        )

    def _ask(self, method: str, address: str, headers: dict[str, str], body: Iterator[bytes] | None) -> Any:
        import requests

        if self._session is None:
            self._session = requests.Session()
        sent = {WIRE_HEADER[0]: WIRE_HEADER[1], **headers}
        token = self._token()
        if token:
            sent["Authorization"] = f"Bearer {token}"
        authority = self._environ.get("OTEL_EXPORTER_OTLP_CERTIFICATE", "").strip()
        given: dict[str, Any] = {"verify": authority} if authority and address.startswith("https:") else {}
        shown = tuple(
            self._environ.get(f"OTEL_EXPORTER_OTLP_CLIENT_{name}", "").strip() for name in ("CERTIFICATE", "KEY")
        )
        if shown[0]:
            given["cert"] = shown if shown[1] else shown[0]
        try:
            with suppressed():
                return self._session.request(
                    method, address, headers=sent, data=body, timeout=_TIMEOUT_S, allow_redirects=False, **given
                )
        except requests.exceptions.InvalidHeader as error:  # its own text would show the token
            raise Waiting(f"{TOKEN} isn't legal in a header (a line break in it?)", loud=True) from error
        except (requests.RequestException, OSError) as error:
            self._session.close()
            self._session = None
            why = self._clean(str(error), token)
            where = urlsplit(self._shown).netloc
            raise Waiting(f"the gateway {where} can't be reached with an artifact: {why}") from error

    def _clean(self, text: str, token: str) -> str:
        return said(text, Sieve(self._environ, [{"headers": {"authorization": token}}, self._base]))

    def _token(self) -> str:
        """Read anew each time: a file may hold another token now."""
        file = self._environ.get(TOKEN_FILE, "").strip()
        if not file:
            return self._environ.get(TOKEN, "").strip()
        try:
            return Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise Waiting(f"can't read the token in {TOKEN_FILE}: {error}", loud=True) from error


class _Piece:
    """A part of a file, with the length that requests puts into the header."""

    def __init__(self, original: Original, size: int) -> None:
        self._file = original.file
        self._left = size
        self.len = size

    def __iter__(self) -> Iterator[bytes]:
        while piece := self.read(_READ):
            yield piece

    def read(self, most: int = -1) -> bytes:
        piece = self._file.read(self._left if most < 0 else min(most, self._left))
        self._left -= len(piece)
        return piece


def _read(original: Original, size: int) -> Any:
    return _Piece(original, size) if size else b""


def _state(reply: Any) -> tuple[int, bool]:
    text = reply.headers.get("Upload-Offset", "")
    if not text.isdecimal():
        raise Waiting("the gateway doesn't say how much of an artifact it has: is it one?", loud=True)
    return int(text), reply.headers.get("Upload-Complete") == "?1"
