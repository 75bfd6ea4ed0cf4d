"""Keeps secrets out of what is printed: what may be shown of a variable, and a last sieve over every line."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from urllib.parse import unquote, urlsplit

from tracelet.backends import without_credentials

__all__ = ["Sieve", "shown"]

_MASK = "***"
_SHORTEST = 4  # a shorter secret would blot out half of every line; it is never printed as such anyway

# Variables whose value says where things go, not who may: all others are shown as set, without their value.
_OPEN = re.compile(
    r"OTEL_(?:SERVICE_NAME|SDK_DISABLED|EXPORTER_OTLP_(?:\w+_)?(?:ENDPOINT|PROTOCOL|COMPRESSION|TIMEOUT|INSECURE))"
    r"|MLFLOW_(?:TRACKING_URI|EXPERIMENT_NAME|TRACKING_INSECURE_TLS|HTTP_REQUEST_TIMEOUT"
    r"|TRACKING_SERVER_CERT_PATH|TRACKING_CLIENT_CERT_PATH)"
    r"|(?:HTTPS?|ALL|NO)_PROXY"
    r"|TRACELET_(?:BACKEND|PROJECT|EXPERIMENT_NAME|DIR|SHIPPER|RUN_ID|KEEP|MAX_BYTES|GRACE)",
    re.IGNORECASE,
)
# By whole words: TOKENIZERS_PARALLELISM=false must not blot out every "false".
_SECRET = re.compile(
    r"(?:^|_)(?:\w*PASSWORD|PASSWD|SECRETS?|\w*TOKENS?|CREDENTIALS?|HEADERS|API_?KEY|ACCESS_?KEY(?:_ID)?|PRIVATE_?KEY)"
    r"(?:_|$)",
    re.IGNORECASE,
)
_NO_SECRETS = frozenset({"true", "false", "none", "null", "enabled", "disabled", "default"})
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s,;\"'<>]+")


def shown(name: str, value: str) -> str:
    """What may be printed of the variable `name`: an address without credentials, or only that it is set.

    Examples:
        >>> from tracelet.cli.masking import shown
        >>> shown("OTEL_EXPORTER_OTLP_HEADERS", "api-key=s3cret"), shown("MLFLOW_TRACKING_TOKEN", "abc")
        ('set (api-key=***)', 'set')
    """
    if name.upper().endswith("_HEADERS"):
        names = [part.partition("=")[0].strip() for part in value.split(",") if "=" in part]
        return f"set ({', '.join(f'{header}={_MASK}' for header in names)})" if names else "set"
    if _OPEN.fullmatch(name):
        return open_text(value)
    return "set"


def open_text(text: str) -> str:
    """`text` with each address in it rid of user, password and secret-sounding parameters."""
    return _URI.sub(lambda match: _without(match[0]), text)


def _without(uri: str) -> str:
    try:
        return without_credentials(uri)
    except ValueError:  # not an address after all
        return uri.partition("://")[0] + "://" + _MASK


class Sieve:
    """Takes secrets out of any text: those of an environment, and those given besides.

    For the words of others: an exception's, a server's, a driver's.
    """

    def __init__(self, environ: Mapping[str, str], secrets: Iterable[object] = ()) -> None:
        found: set[str] = set()
        for name, value in environ.items():
            if _SECRET.search(name):
                found.update(_of_secret(name, value))
            found.update(_of_uris(value))
        for secret in secrets:
            _collect(secret, found)
        telling = (s for s in found if len(s) >= _SHORTEST and s.lower() not in _NO_SECRETS)
        self._secrets = sorted(telling, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, _MASK)
        return open_text(text)


def _of_secret(name: str, value: str) -> Iterable[str]:
    value = value.strip()
    if name.upper().endswith("_HEADERS"):
        for part in value.split(","):
            header = part.partition("=")[2].strip()
            for form in (header, unquote(header)):
                yield form
                yield from (word for word in form.split() if word.lower() not in ("basic", "bearer"))
    else:
        yield value
        yield unquote(value)


def _of_uris(text: str) -> Iterable[str]:
    for match in _URI.finditer(text):
        try:
            parts = urlsplit(match[0])
        except ValueError:
            continue
        user_info, at, _ = parts.netloc.rpartition("@")
        if not at:
            continue
        user, colon, password = user_info.partition(":")
        for secret in (user_info, password) if colon else (user,):
            yield secret
            yield unquote(secret)
        yield base64.b64encode(unquote(user_info).encode()).decode("ascii")


def _collect(secrets: object, found: set[str]) -> None:
    """The secret texts in what `backends.choose` calls secrets: headers' values, and credentials in addresses."""
    if isinstance(secrets, str):
        found.update(_of_uris(secrets))
    elif isinstance(secrets, Mapping):
        for name, value in secrets.items():
            if name == "headers" and isinstance(value, Mapping):
                for header, content in value.items():
                    found.update(_of_secret("_HEADERS", f"{header}={content}"))
            else:
                _collect(value, found)
