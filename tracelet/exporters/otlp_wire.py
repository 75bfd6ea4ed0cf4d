"""What both OTLP transports share: the answer to one request, where requests go, and keeping secrets out of words."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit, urlunsplit

from tracelet.errors import ConfigError
from tracelet.exporters.headers_file import file_here, headers_in
from tracelet.guard import logger
from tracelet.otlp import semconv
from tracelet.sieve import Sieve

__all__ = [
    "WIRE_HEADER",
    "Options",
    "Reply",
    "Sender",
    "fingerprint",
    "options_for",
    "redacted_headers",
    "remembered",
    "said",
    "suppressed",
]

PREFIX = "OTEL_EXPORTER_OTLP_"
WIRE_HEADER = (semconv.RESOURCE_WIRE_VERSION, semconv.WIRE_VERSION)
"""On every request of ours: a gateway answers 401 and 403 to those who send it, and 503 to collectors."""
_FILE_VARIABLES = ("CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE")
_REASON_CHARACTERS = 500


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one request.

    - accepted: it is there; `rejected` of its items are not (partial success)
    - refused: the request itself is at fault (400, INVALID_ARGUMENT)
    - too_large: 413 and its like
    - fault: the server failed in itself (500, INTERNAL), perhaps over this request
    - later: try again, after `after_s` if given; `loud` where a person has to do something
    """

    kind: Literal["accepted", "refused", "too_large", "fault", "later"]
    reason: str = ""
    rejected: int = 0
    after_s: float | None = None
    loud: bool = False
    credentials: bool = False  # refused for who we are: they are read anew before the next try
    unresolved: bool = False  # the channel keeps to that for up to two minutes: the next try has a new one
    elsewhere: bool = False  # only this signal's address is at fault, others may go on


@dataclass(frozen=True, slots=True)
class Options:
    """How one signal is sent; None leaves it to OTel's exporter, which reads its own variables."""

    signal: str
    protocol: str
    endpoint: str | None
    headers: Mapping[str, str]
    compression: str | None
    timeout_s: float | None
    environ: Mapping[str, str]
    headers_file: str | None = None

    def ready(self) -> Options:
        """These options with the headers that stand in the file now.

        Raises:
            ValueError, OSError: see `headers_in`.
        """
        if self.headers_file is None:
            return self
        return dataclasses.replace(self, headers={**headers_in(self.headers_file), **self.headers}, headers_file=None)

    def variable(self, name: str) -> str | None:
        """OTEL_EXPORTER_OTLP_<SIGNAL>_<name>, else OTEL_EXPORTER_OTLP_<name>; empty counts as unset."""
        return _variable(self.environ, self.signal, name)

    def files(self) -> tuple[str, ...]:
        """The certificate and key files that the variables name."""
        return tuple(path for name in _FILE_VARIABLES if (path := self.variable(name)))

    def sieve(self) -> Sieve:
        """Takes every header value and credential out of a text, however it came here."""
        return Sieve(self.environ, [{"headers": self.headers, "endpoint": self.endpoint or ""}])


class Sender(Protocol):
    """Sends requests of one signal."""

    def send(self, body: bytes) -> Reply:
        """Send one encoded request, once; no retries here."""
        ...

    def close(self) -> None:
        """Let the connection go, without waiting."""
        ...


def _variable(environ: Mapping[str, str], signal: str, name: str) -> str | None:
    for variable in (f"{PREFIX}{signal.upper()}_{name}", f"{PREFIX}{name}"):
        value = environ.get(variable, "").strip()
        if value:
            return value
    return None


def remembered(spec: Mapping[str, Any], secrets: Mapping[str, Any]) -> dict[str, str]:
    """The variables about addresses that training had, for a shipper with others."""
    return dict(secrets.get("environment") or spec.get("environment") or {})


def options_for(
    signal: str, spec: Mapping[str, Any], secrets: Mapping[str, Any], environ: Mapping[str, str]
) -> Options:
    """The options of one signal.

    An argument wins over this process's variables, these over those of training (in the spec, so that
    `tracelet ship` elsewhere still knows the address).

    Raises:
        ConfigError: a protocol that isn't http/protobuf or grpc.
    """
    known = remembered(spec, secrets)
    protocol = (
        spec.get("protocol")
        or _variable(environ, signal, "PROTOCOL")
        or _variable(known, signal, "PROTOCOL")
        or "http/protobuf"
    )
    if protocol not in ("http/protobuf", "grpc"):
        raise ConfigError(
            f"OTLP protocol {protocol!r} for {signal} can't be sent: set {PREFIX}PROTOCOL to http/protobuf or grpc",
            protocol=protocol,
        )
    return Options(
        signal=signal,
        protocol=protocol,
        endpoint=_endpoint(signal, protocol, secrets.get("endpoint") or spec.get("endpoint"), known, environ),
        headers={name.lower(): value for name, value in (secrets.get("headers") or {}).items()},
        compression=spec.get("compression"),
        timeout_s=spec.get("timeout_s"),
        environ=environ,
        headers_file=file_here(spec.get("headers_file"), "TRACELET_OTLP_HEADERS_FILE", environ),
    )


def _endpoint(
    signal: str, protocol: str, argument: str | None, remembered: Mapping[str, str], environ: Mapping[str, str]
) -> str | None:
    if argument is not None:
        return _with_path(argument, signal, protocol)
    own = environ.get(f"{PREFIX}{signal.upper()}_ENDPOINT", "").strip() or None
    shared = environ.get(f"{PREFIX}ENDPOINT", "").strip()
    if own or shared:
        # OTel's exporter finds it there; but it writes the path behind a query, `?key=1/v1/metrics`.
        return _with_path(shared, signal, protocol) if not own and urlsplit(shared).query else None
    exact = remembered.get(f"{PREFIX}{signal.upper()}_ENDPOINT")
    if exact:
        return exact
    base = remembered.get(f"{PREFIX}ENDPOINT")
    return _with_path(base, signal, protocol) if base else None


def _with_path(base: str, signal: str, protocol: str) -> str:
    if protocol == "grpc":
        return base
    # Many people paste the address of one signal; all three are next to each other.
    parts = urlsplit(base)
    stem = re.sub(r"/v1/(metrics|traces|logs)/?$", "", parts.path).rstrip("/")
    return urlunsplit(parts._replace(path=f"{stem}/v1/{signal}"))


def fingerprint(*paths: str | None) -> tuple[object, ...]:
    """Changes when one of these files does."""
    found: list[object] = []
    for path in paths:
        try:
            status = None if path is None else os.stat(path)
        except OSError:
            status = None
        found.append(status and (status.st_mtime_ns, status.st_size, status.st_ino))
    return tuple(found)


@contextlib.contextmanager
def suppressed() -> Iterator[None]:
    """No instrumentation of this process (requests, grpc) traces what is sent in the block."""
    from opentelemetry import context

    current = context.get_current()
    # The keys that OTel's own exporters and instrumentations use; private names, hence the care.
    for name in ("_SUPPRESS_INSTRUMENTATION_KEY", "_SUPPRESS_HTTP_INSTRUMENTATION_KEY"):
        key = getattr(context, name, None)
        if key is not None:
            current = context.set_value(key, True, current)
    token = context.attach(current)
    try:
        yield
    finally:
        context.detach(token)


@contextlib.contextmanager
def redacted_headers() -> Iterator[None]:
    """In the block OTel does not log a malformed header, which it would with its secret; we say that there is one."""

    def redact(record: logging.LogRecord) -> bool:
        logger.warning("an entry of %sHEADERS is no name=value pair and is left out (its text is kept secret)", PREFIX)
        return False

    noisy = logging.getLogger("opentelemetry.util.re")
    noisy.addFilter(redact)
    try:
        yield
    finally:
        noisy.removeFilter(redact)


def said(text: str, sieve: Callable[[str], str]) -> str:
    """The words of others on one line and not too long, without secrets.

    Sieved before it is cut: half a token is no secret that a sieve knows.
    """
    text = " ".join(sieve(text).split())
    return text if len(text) <= _REASON_CHARACTERS else text[:_REASON_CHARACTERS] + " …"
