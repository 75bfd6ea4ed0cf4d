"""One kept-alive HTTP connection to an MLflow server: who we are, TLS, proxies, and telling "not sent" from "unclear".

Standard library, and certifi's authorities. Credentials, tokens and certificates are MLflow's own variables and files;
they are read when a connection is made and again after every refusal, so a renewed token is seen. No error text ever
holds one.
"""

from __future__ import annotations

import base64
import configparser
import http.client
import os
import socket
import ssl
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO
from urllib.parse import SplitResult, urlsplit
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]  # since 3.3, but not in typeshed

from tracelet.errors import ConfigError
from tracelet.exporters.mlflow.transport import NotNow, Unclear
from tracelet.sieve import Sieve

__all__ = ["Connection", "Reply", "authorization"]

# uvicorn, which serves MLflow, closes a connection that was idle for 5 s; a request sent into that close is unclear.
_IDLE_S = 4.0
_CHUNK = 1 << 20
_CLIENT_HINT = "; if it asks for a certificate, name ours in MLFLOW_TRACKING_CLIENT_CERT_PATH, and see that it knows it"
_DEFAULT_TIMEOUT_S = 120.0  # what MLflow's own client waits (MLFLOW_HTTP_REQUEST_TIMEOUT)


@dataclass(frozen=True, slots=True)
class Reply:
    """A server's answer."""

    status: int
    body: bytes
    headers: Mapping[str, str]  # names in lower case


class Connection:
    """Sends one request after another to `base_uri`; reconnects by itself, never repeats a request by itself."""

    def __init__(self, base_uri: str, secrets: Mapping[str, str], environ: Mapping[str, str]) -> None:
        parts = urlsplit(base_uri)
        if not parts.hostname:
            raise ConfigError(f"the tracking URI {base_uri!r} names no host", tracking_uri=base_uri)
        self.prefix = parts.path.rstrip("/")
        self.origin = _origin(parts)
        self._parts = parts
        self._secrets = secrets
        self._environ = environ
        self._timeout_s = _timeout(environ)
        self._http: http.client.HTTPConnection | None = None
        self._headers: dict[str, str] = {}
        self._through_proxy = False
        self._used_at = 0.0
        self._answered = False  # whether this connection has brought an answer
        self.requests = 0
        self.until: float | None = None
        """Of the monotonic clock: no request begins after it, and none waits longer. None: each has its time-out."""

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        content_type: str = "application/json",
        stream: tuple[BinaryIO, int] | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> Reply:
        """Send and wait for the answer.

        `stream` is an open file and its size, sent in pieces of 1 MiB instead of `body`.

        Raises:
            NotNow: the server was not reached; nothing was sent.
            Unclear: something was sent and no answer came.
        """
        limit_s = self._limit_s()
        connection = self._connected(limit_s)
        connection.timeout = limit_s
        if connection.sock is not None:  # else http.client makes it anew, with this limit
            connection.sock.settimeout(limit_s)
        target = self.prefix + path
        headers = {**self._headers, **(extra or {})}
        payload: bytes | Iterator[bytes] | None = body
        if stream is not None:
            headers["Content-Length"] = str(stream[1])
            payload = iter(lambda: stream[0].read(_CHUNK), b"")
        if payload is not None:
            headers["Content-Type"] = content_type
        self.requests += 1
        try:
            try:
                connection.request(method, (self.origin if self._through_proxy else "") + target, payload, headers)
            except (BrokenPipeError, ConnectionResetError):
                # The server may have answered before it had read everything (a 4xx to a large upload): look.
                if stream is None:
                    raise
            self._acknowledge_at_once()
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            # By TLS 1.3 a server looks at our certificate when for us the handshake is over: it hangs up on a request.
            unknown = self._parts.scheme == "https" and not self._answered and not isinstance(error, TimeoutError)
            hint = _CLIENT_HINT if unknown else ""
            unclear = Unclear(f"no answer from {self.origin}: {_words(error)}{hint}", loud=unknown)
            unclear.may_be_running = isinstance(error, TimeoutError)
            raise unclear from error
        self._used_at = time.monotonic()
        self._answered = True
        if answer.will_close or answer.status in (401, 403) or answer.status >= 500:
            self.close()  # after a 500 MLflow's server resets the connection without having said so
        if answer.status >= 300:
            content = self._sieved(content)
        return Reply(answer.status, content, {name.lower(): value for name, value in answer.getheaders()})

    def close(self) -> None:
        """Drop the connection; the next request makes a new one and reads credentials anew."""
        if self._http is not None:
            self._http.close()
            self._http = None

    def _limit_s(self) -> float:
        if self.until is None:
            return self._timeout_s
        left = self.until - time.monotonic()
        if left <= 0:
            raise NotNow(f"the time for this is over, and {self.origin} has not been asked")
        return min(self._timeout_s, left)

    def _connected(self, limit_s: float) -> http.client.HTTPConnection:
        if self._http is not None and time.monotonic() - self._used_at > _IDLE_S:
            self.close()
        if self._http is None:
            self._headers = {"Accept": "application/json", "User-Agent": "tracelet"}
            sent_as = authorization(self._secrets, self._environ)
            if sent_as is not None:
                self._headers["Authorization"] = sent_as
            fresh = self._new(limit_s)
            try:
                fresh.connect()
            except (OSError, http.client.HTTPException) as error:
                fresh.close()
                loud = isinstance(error, ssl.SSLCertVerificationError)
                raise NotNow(f"can't reach {self.origin}: {_words(error)}{_tls_hint(error)}", loud=loud) from error
            self._http, self._answered = fresh, False
        return self._http

    def _sieved(self, content: bytes) -> bytes:
        """An error's words without what was sent: servers repeat headers. Before anybody cuts them, or logs them."""
        shown = {name: value for name, value in self._headers.items() if name.endswith("Authorization")}
        sieve = Sieve(self._environ, [self._secrets, {"headers": shown}])
        return sieve(content.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")

    def _new(self, limit_s: float) -> http.client.HTTPConnection:
        parts, secure = self._parts, self._parts.scheme == "https"
        host, port = parts.hostname or "", parts.port or (443 if secure else 80)
        proxy = _proxy_for(parts, self._environ)
        context = _tls(self._environ) if secure else None
        at = (proxy.hostname or "", proxy.port or 80) if proxy is not None else (host, port)
        self._through_proxy = proxy is not None and not secure
        connection: http.client.HTTPConnection
        if context is not None:
            connection = http.client.HTTPSConnection(*at, timeout=limit_s, context=context, blocksize=_CHUNK)
        else:
            connection = http.client.HTTPConnection(*at, timeout=limit_s, blocksize=_CHUNK)
        if proxy is not None:
            said = _basic(proxy.username, proxy.password) if proxy.username else None
            if secure:
                connection.set_tunnel(host, port, {"Proxy-Authorization": said} if said else {})
            elif said:
                self._headers["Proxy-Authorization"] = said
        return connection

    def _acknowledge_at_once(self) -> None:
        # With more than one worker MLflow's server leaves Nagle on, and its answer's second piece waits 43 ms for our
        # delayed acknowledgement. The flag holds only until the next one, so it is set for each request. Linux only.
        option = getattr(socket, "TCP_QUICKACK", None)
        if option is not None and sys.platform == "linux" and self._http is not None and self._http.sock is not None:
            try:
                self._http.sock.setsockopt(socket.IPPROTO_TCP, option, 1)
            except OSError:
                pass  # it is only about speed


def authorization(secrets: Mapping[str, str], environ: Mapping[str, str]) -> str | None:
    """The Authorization header, by MLflow's own rules: user and password, from the URI, the variables or
    ~/.mlflow/credentials, before MLFLOW_TRACKING_TOKEN."""
    stored = _credentials_file(environ)
    user = secrets.get("username") or environ.get("MLFLOW_TRACKING_USERNAME") or stored.get("mlflow_tracking_username")
    word = secrets.get("password") or environ.get("MLFLOW_TRACKING_PASSWORD") or stored.get("mlflow_tracking_password")
    if user and word:
        return _basic(user, word)
    token = environ.get("MLFLOW_TRACKING_TOKEN")
    return f"Bearer {token}" if token else None


def _basic(user: str | None, password: str | None) -> str:
    return "Basic " + base64.b64encode(f"{user or ''}:{password or ''}".encode()).decode("ascii")


def _credentials_file(environ: Mapping[str, str]) -> Mapping[str, str]:
    home = environ.get("HOME") or os.path.expanduser("~")
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(os.path.join(home, ".mlflow", "credentials"), encoding="utf-8")
    except (OSError, configparser.Error, UnicodeDecodeError):
        return {}
    return dict(parser["mlflow"]) if parser.has_section("mlflow") else {}


def _tls(environ: Mapping[str, str]) -> ssl.SSLContext:
    names = ("MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")  # in MLflow's client's order
    authority = next((environ[name] for name in names if environ.get(name)), None)
    try:
        folder = authority if authority and os.path.isdir(authority) else None
        context = ssl.create_default_context(cafile=None if folder else authority or None, capath=folder)
        if not authority:
            _add_certifi(context)
        client = environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH")
        if client:
            context.load_cert_chain(client)
    except OSError as error:  # also ssl.SSLError
        raise NotNow(
            f"can't read the certificates named by MLFLOW_TRACKING_SERVER_CERT_PATH ({authority}) and"
            f" MLFLOW_TRACKING_CLIENT_CERT_PATH: {_words(error)}",
            loud=True,
        ) from error
    if environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _add_certifi(context: ssl.SSLContext) -> None:
    """The authorities MLflow's client knows: slim images and standalone Pythons have none of the system's."""
    try:
        import certifi
    except ImportError:
        return
    context.load_verify_locations(certifi.where())


def _tls_hint(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return "; name the authority's file in MLFLOW_TRACKING_SERVER_CERT_PATH"
    return ""


def _proxy_for(parts: SplitResult, environ: Mapping[str, str]) -> SplitResult | None:
    """The proxy that the usual variables name for this address, as `requests` (so MLflow's client) reads them."""
    proxies = {}
    for name in ("http", "https", "all", "no"):
        value = environ.get(f"{name}_proxy") or environ.get(f"{name.upper()}_PROXY")
        if value:
            proxies[name] = value
    address = proxies.get(parts.scheme) or proxies.get("all")
    if not address or proxy_bypass_environment(parts.netloc.rpartition("@")[2], proxies):
        return None
    return urlsplit(address if "//" in address else f"//{address}")


def _timeout(environ: Mapping[str, str]) -> float:
    try:
        return max(1.0, float(environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT") or _DEFAULT_TIMEOUT_S))
    except ValueError:
        return _DEFAULT_TIMEOUT_S


def _origin(parts: SplitResult) -> str:
    host = parts.hostname or ""
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{f':{parts.port}' if parts.port else ''}"


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
