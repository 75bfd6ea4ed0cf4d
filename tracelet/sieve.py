"""The one sieve that takes secrets out of text: of logs, dead letters, errors, and what commands print."""

from __future__ import annotations

import base64
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from tracelet.addresses import MASK, shown_address, sounds_secret, user_info

__all__ = ["Sieve", "SievedLines", "open_text"]

_SHORTEST = 4  # a shorter secret would blot out half of every line

# By whole words: TOKENIZERS_PARALLELISM=false must not blot out every "false".
_SECRET = re.compile(
    r"(?:^|_)(?:\w*PASSWORD|PASSWD|SECRETS?|\w*TOKENS?|CREDENTIALS?|HEADERS|API_?KEY|ACCESS_?KEY(?:_ID)?|PRIVATE_?KEY)"
    r"(?:_|$)",
    re.IGNORECASE,
)
_PLACE = re.compile(r"_(?:FILE|PATH|DIR)$", re.IGNORECASE)  # where a secret is; a message has to name it
_COUNT = re.compile(r"TOKENS(?:_|$)", re.IGNORECASE)  # MAX_NEW_TOKENS=1024 must not blot out every 1024
_USER = re.compile(r"(.*)(?:PASSWORD|PASSWD)$", re.IGNORECASE)
_USER_NAMES = ("USERNAME", "USER")
_NO_SECRETS = frozenset({"true", "false", "none", "null", "enabled", "disabled", "default", "basic", "bearer"})
_ADDRESS = re.compile(r"(?:ENDPOINT|UR[IL]|PROXY)$", re.IGNORECASE)  # a variable that holds one, and nothing else
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s,;\"'<>]+")


class Sieve:
    """Takes secrets out of any text: those of an environment, and those given besides.

    For the words of others: an exception's, a server's that repeats what it was sent, a driver's. It knows a secret as
    it is, percent-quoted, as JSON has it, and in the base64 of a user with a password, which is what HTTP sends of
    `user:password@` in an address. `secrets` are mappings as `choice.choose` makes them.

    Never for what a user logged: that has to arrive as it is.

    Examples:
        >>> from tracelet.sieve import Sieve
        >>> Sieve({"MLFLOW_TRACKING_URI": "http://bob:hunter2@host"})("401: bad credentials 'Basic Ym9iOmh1bnRlcjI='")
        "401: bad credentials 'Basic ***'"
    """

    def __init__(self, environ: Mapping[str, str], secrets: Iterable[object] = ()) -> None:
        found: set[str] = set()
        for name, value in environ.items():
            if _SECRET.search(name) and not _PLACE.search(name) and not (_COUNT.search(name) and value.isdecimal()):
                found.update(_of_secret(name, value))
                found.update(_of_pair(name, value, environ))
            found.update(_of_uris(value))
            if _ADDRESS.search(name):
                found.update(_of_address(value.strip()))
        for secret in secrets:
            _collect(secret, found)
        forms = {form for secret in found for form in (secret, unquote(secret)) for form in _forms(form)}
        telling = (form for form in forms if len(form) >= _SHORTEST and form.lower() not in _NO_SECRETS)
        self._secrets = sorted(telling, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            if secret in text:
                text = text.replace(secret, MASK)
        return open_text(text)


def open_text(text: str) -> str:
    """`text` with each address in it rid of user, password and secret-sounding parameters."""
    return _URI.sub(lambda match: shown_address(match[0]), text) if "://" in text else text


def _forms(secret: str) -> Iterator[str]:
    yield secret
    yield quote(secret, safe="", errors="surrogateescape")  # the environment's bytes may be no text
    yield quote(secret, errors="surrogateescape")
    yield json.dumps(secret)[1:-1]
    yield repr(secret)[1:-1]


def _basic(user: str, password: str) -> Iterator[str]:
    """What HTTP's basic authentication makes of both, in both alphabets, with the padding and without."""
    pair = f"{user}:{password}".encode("utf-8", "surrogateescape")
    for encoded in (base64.b64encode(pair), base64.urlsafe_b64encode(pair)):
        yield encoded.decode("ascii")
        yield encoded.decode("ascii").rstrip("=")


def _of_secret(name: str, value: str) -> Iterator[str]:
    value = value.strip()
    if name.upper().endswith("_HEADERS"):
        for part in value.split(","):
            yield from _of_header(unquote(part.partition("=")[2].strip()))
    else:
        yield value


def _of_header(value: str) -> Iterator[str]:
    yield value
    yield from value.split()  # "Bearer abc" is echoed as "abc" by some servers


def _of_pair(name: str, password: str, environ: Mapping[str, str]) -> Iterator[str]:
    """The base64 of MLFLOW_TRACKING_USERNAME with MLFLOW_TRACKING_PASSWORD, and of other such pairs."""
    match = _USER.match(name)
    for user in (environ.get(match[1] + each) for each in _USER_NAMES) if match else ():
        if user:
            yield from _basic(user, password)


def _of_uris(text: str) -> Iterator[str]:
    for match in _URI.finditer(text):
        yield from _of_address(match[0])


def _of_address(uri: str) -> Iterator[str]:
    """What lets somebody in of one address, which may lack its scheme: `bob:s3cret@host:4318`."""
    try:
        query = urlsplit(uri).query
    except ValueError:
        query = ""
    for name, value in parse_qsl(query):
        if sounds_secret(name):
            yield value
    info = user_info(uri)
    if not info:
        return
    user, colon, password = info.partition(":")
    if colon:
        yield from (info, password)
    elif uri.partition("://")[0].lower() in ("http", "https") or "://" not in uri:
        yield user  # mostly a token; a database's user is part of its address, and shown
    yield from _basic(unquote(user), unquote(password))


def _collect(secrets: object, found: set[str]) -> None:
    """The secret texts in what `choice.choose` calls secrets: headers' values, and credentials in addresses."""
    if isinstance(secrets, str):
        found.update(_of_uris(secrets))
        found.update(_of_address(secrets))
    elif isinstance(secrets, Mapping):
        for name, value in secrets.items():
            if name == "headers" and isinstance(value, Mapping):
                for content in value.values():
                    found.update(_of_header(str(content)))
            elif isinstance(value, str) and _SECRET.search(str(name)) and not _PLACE.search(str(name)):
                found.add(value)
            else:
                _collect(value, found)


class SievedLines(logging.Formatter):
    """Lines of a log, time and level in front, with the sieve over all of it: tracebacks are words of others, too."""

    def __init__(self, sieve: Sieve) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self._sieve = sieve

    def format(self, record: logging.LogRecord) -> str:
        """The line as it may be written."""
        return self._sieve(super().format(record))
