"""Addresses without what lets somebody in: for manifests, logs and messages."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

__all__ = ["DATABASES", "MASK", "shown_address", "shown_names", "sounds_secret", "user_info", "without_credentials"]

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
"""Engines whose addresses SQLAlchemy reads: the user in them is a part of the address."""

MASK = "***"
"""What stands for a secret in a text."""

_SECRET_WORDS = ("password", "passwd", "pwd", "secret", "token", "key", "credential", "auth", "sig")


def without_credentials(uri: str) -> str:
    """`uri` without what lets somebody in: for the manifest, for logs and messages.

    Over HTTP all of `user:password@` goes (a token is often the user alone); a database's address keeps its user,
    which is part of it. Query parameters whose names sound secret go. So it is for addresses that are mistyped, too:
    without a scheme, or with a slash in the password that should be `%2F`.

    Raises:
        ValueError: it can't be taken apart.

    Examples:
        >>> from tracelet.addresses import without_credentials
        >>> without_credentials("postgresql://ml:s3cret@db/runs"), without_credentials("https://token@host/x")
        ('postgresql://ml@db/runs', 'https://host/x')
        >>> without_credentials("bob:s3cret@host:4318"), without_credentials("http://bob:s3/cret@host")
        ('host:4318', 'http://host')
    """
    urlsplit(uri)  # raises here, and not only for what is left of it
    scheme, slashes, rest = _cut(uri)
    info = user_info(uri)
    if info:
        user = info.partition(":")[0] if scheme.partition("+")[0].lower() in DATABASES else ""
        rest = (f"{user}@" if user else "") + rest[len(info) + 1 :]
    shown = scheme + slashes + rest
    parts = urlsplit(shown)
    if any(sounds_secret(name) for name, _ in parse_qsl(parts.query, keep_blank_values=True)):
        pairs = [(n, v) for n, v in parse_qsl(parts.query, keep_blank_values=True) if not sounds_secret(n)]
        return urlunsplit(parts._replace(query=urlencode(pairs, quote_via=quote)))
    return shown  # as it was written: urlunsplit would write `sqlite:////x` with two slashes less


def shown_address(uri: str) -> str:
    """`uri` without credentials; masked where it can't be taken apart."""
    try:
        return without_credentials(uri)
    except ValueError:
        scheme, slashes, _ = _cut(uri)
        return scheme + slashes + MASK


def shown_names(text: str) -> str:
    """Names with commas between, as they may be shown where somebody has put an address among them.

    Examples:
        >>> from tracelet.addresses import shown_names
        >>> shown_names("mlflow, http://bob:s3,cret@host"), shown_names("mlflow,otlp")
        ('***', 'mlflow,otlp')
    """
    return MASK if re.search("[:/@?#=]", text) else text  # all of it: a password may have commas, too


def user_info(uri: str) -> str:
    """What stands before the host's `@` in an address, be it without a scheme; "" if nothing does.

    Examples:
        >>> from tracelet.addresses import user_info
        >>> user_info("http://bob:s3cret@host:1/a@b"), user_info("http://host:1/a@b"), user_info("bob:s3/cret@host")
        ('bob:s3cret', '', 'bob:s3/cret')
    """
    _, _, rest = _cut(uri)
    head = re.split("[/?#]", rest, maxsplit=1)[0]
    if "@" in head:
        return head.rpartition("@")[0]
    port = head.rpartition(":")[2] if ":" in head and not head.endswith("]") else ""
    # `bob:s3/cret@host`: what should be a port is none, so the slash is a part of the password.
    return rest.rpartition("@")[0] if port and not port.isdecimal() and "@" in rest else ""


def _cut(uri: str) -> tuple[str, str, str]:
    scheme, slashes, rest = uri.partition("://")
    return (scheme, slashes, rest) if slashes else ("", "", uri)


def sounds_secret(name: str) -> bool:
    """Whether a parameter of this name would let somebody in."""
    return any(word in unquote(name).lower() for word in _SECRET_WORDS)
