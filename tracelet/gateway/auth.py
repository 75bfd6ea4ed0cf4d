"""Who may send: bearer tokens from a file that is read again when it changes.

    [[token]]
    name = "team-a"                     # owner of the runs it makes; in logs and manifests
    sha256 = "9f86d0..."                # or token = "...", or token_file = "a file beside this one"
    projects = ["vision", "speech"]     # or ["*"]
    expires = 2027-01-01T00:00:00Z      # optional

Tokens are compared by their SHA-256, in a time that says nothing of them, and never stand in a log, an error or a
metric. While a rotation goes on, both tokens are listed under one name.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
import threading
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tracelet.errors import ConfigError
from tracelet.gateway.callers import Caller
from tracelet.gateway.limits import Refused
from tracelet.guard import guard, logger

__all__ = ["WIRE_VERSION_HEADER", "Auth", "Token", "read_tokens"]

WIRE_VERSION_HEADER = "tracelet.wire.version"
"""Our own clients send it: they keep what a 401 or 403 refuses. A collector would drop it."""

_FRESH_S = 2.0  # a file changed so short before it was read may change again without another time of change
_FIELDS = frozenset(("name", "token", "token_file", "sha256", "projects", "expires"))


@dataclass(frozen=True, slots=True)
class Token:
    """One line of the file; the token itself is not kept."""

    name: str
    digest: bytes
    projects: tuple[str, ...] | None  # None: all
    expires: float | None  # seconds since 1970

    def __repr__(self) -> str:
        return f"Token(name={self.name!r})"


class Auth:
    """Turns a request's headers into a `Caller`, or refuses it.

    Without a `path` everybody is taken, and an `Authorization` header is not looked at.

    Raises:
        ConfigError: the file can't be read or understood. Later, when it changes, the tokens of before stay in force.
    """

    def __init__(self, path: Path | None, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._tokens: tuple[Token, ...] = ()
        self._seen: tuple[object, ...] = ()
        self._watched: tuple[Path, ...] = ()
        self.is_bad = False
        """The file as it is now can't be used; the tokens of before are in force."""
        if path is not None:
            self._watched = (path,)
            self._read()

    @property
    def is_open(self) -> bool:
        """Whether no token is asked for."""
        return self._path is None

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """Who sends these headers (names in lower case).

        Raises:
            Refused: no token (401), or one that is not listed or has expired (401).
        """
        ours = bool(headers.get(WIRE_VERSION_HEADER, "").strip())
        if self._path is None:
            return Caller(ours=ours)
        self._refresh()
        scheme, _, given = headers.get("authorization", "").strip().partition(" ")
        given = given.strip()
        if scheme.lower() != "bearer" or not given:
            raise Refused(401, "no token", "this gateway asks for a token: Authorization: Bearer ...")
        digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        found = None
        for token in self._tokens:  # all of them, whichever fits: the time taken says nothing
            if hmac.compare_digest(token.digest, digest):
                found = token
        if found is None:
            raise Refused(401, "wrong token", "the token is not one this gateway knows")
        if found.expires is not None and self._clock() >= found.expires:
            raise Refused(401, "expired token", f"the token of {found.name!r} has expired")
        return Caller(found.name, found.projects, ours)

    def _refresh(self) -> None:
        with self._lock:
            if self._state() == self._seen:
                return
            try:
                self._read()
            except ConfigError as error:
                self.is_bad = True
                self._seen = self._state()
                guard.limited("tokens file", "%s; the tokens of before stay in force", error)

    def _read(self) -> None:
        assert self._path is not None
        state = self._state()
        tokens, files = read_tokens(self._path)
        first = not self._seen
        self._tokens, self._watched, self.is_bad = tokens, (self._path, *files), False
        # What was looked at before reading: a change in between is seen the next time. With new files, all again.
        self._seen = state if len(state) == len(self._watched) else ()
        logger.info(
            "%s %d tokens from %s: %s",
            "read" if first else "read again",
            len(tokens),
            self._path,
            ", ".join(sorted({token.name for token in tokens})),
        )

    def _state(self) -> tuple[object, ...]:
        return tuple(_identity(path) for path in self._watched)


def _identity(path: Path) -> object:
    try:
        found = os.stat(path)
        fresh = time.time() - found.st_mtime < _FRESH_S
        # A second change within the clock's tick leaves the same time: while it is fresh, the content is what counts.
        content = hashlib.sha256(path.read_bytes()).digest() if fresh and stat.S_ISREG(found.st_mode) else b""
    except OSError as error:
        return error.errno
    return (found.st_ino, found.st_mtime_ns, found.st_size, content)


def read_tokens(path: Path) -> tuple[tuple[Token, ...], tuple[Path, ...]]:
    """The tokens of a file, and the files that it names.

    Raises:
        ConfigError: it can't be read or understood; the text names the entry, never a token.
    """
    try:
        content = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise ConfigError(f"the tokens file {path} can't be read: {error.strerror}", path=str(path)) from None
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError; its text could quote the line
        place = re.search(r"\(at [^)]*\)", str(error))
        raise ConfigError(
            f"the tokens file {path} is no TOML {place[0] if place else ''}".rstrip(), path=str(path)
        ) from None
    entries = content.pop("token", None)
    if content or not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"the tokens file {path} has to consist of [[token]] tables", path=str(path))
    files: list[Path] = []
    tokens = tuple(_token(path, number, entry, files) for number, entry in enumerate(entries, 1))
    return tokens, tuple(files)


def _token(path: Path, number: int, entry: Mapping[str, Any], files: list[Path]) -> Token:
    def wrong(what: str) -> ConfigError:
        return ConfigError(f"the tokens file {path}, [[token]] number {number}: {what}", path=str(path))

    unknown = sorted(entry.keys() - _FIELDS)
    if unknown:
        raise wrong(f"{unknown[0]!r} is no field; there are {', '.join(sorted(_FIELDS))}")
    name = entry.get("name")
    if not isinstance(name, str) or not name.strip():
        raise wrong("it needs a name")
    if len(entry.keys() & {"token", "token_file", "sha256"}) != 1:
        raise wrong("it needs one of token, token_file and sha256")
    projects = entry.get("projects")
    if not isinstance(projects, list) or not projects or not all(isinstance(p, str) and p for p in projects):
        raise wrong('projects has to be a list of names, or ["*"] for all')
    expires = entry.get("expires")
    if expires is not None and (not isinstance(expires, datetime) or expires.tzinfo is None):
        raise wrong("expires has to be a date and time with its zone, such as 2027-01-01T00:00:00Z")
    return Token(
        name,
        _digest(path, entry, files, wrong),
        None if "*" in projects else tuple(projects),
        None if expires is None else expires.timestamp(),
    )


def _digest(path: Path, entry: Mapping[str, Any], files: list[Path], wrong: Callable[[str], ConfigError]) -> bytes:
    if "sha256" in entry:
        text = entry["sha256"]
        if not isinstance(text, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", text):
            raise wrong("sha256 has to be 64 hexadecimal digits")
        return bytes.fromhex(text)
    token = entry.get("token")
    if "token_file" in entry:
        name = entry["token_file"]
        if not isinstance(name, str) or not name:
            raise wrong("token_file has to be the name of a file")
        files.append(path.parent / name)
        try:
            token = files[-1].read_text().strip()
        except (OSError, ValueError):
            raise wrong("its token_file can't be read") from None
    if not isinstance(token, str) or not token.strip():
        raise wrong("the token is empty")
    return hashlib.sha256(token.strip().encode()).digest()
