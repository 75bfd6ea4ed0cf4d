"""Addresses without what lets somebody in: for manifests, logs and messages."""

from __future__ import annotations

from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

__all__ = ["DATABASES", "sounds_secret", "without_credentials"]

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
"""Engines whose addresses SQLAlchemy reads: the user in them is a part of the address."""

_SECRET_WORDS = ("password", "passwd", "pwd", "secret", "token", "key", "credential", "auth", "sig")


def without_credentials(uri: str) -> str:
    """`uri` without what lets somebody in: for the manifest, for logs and messages.

    Over HTTP all of `user:password@` goes (a token is often the user alone); a database's address keeps its user,
    which is part of it. Query parameters whose names sound secret go.

    Examples:
        >>> from tracelet.addresses import without_credentials
        >>> without_credentials("postgresql://ml:s3cret@db/runs"), without_credentials("https://token@host/x")
        ('postgresql://ml@db/runs', 'https://host/x')
    """
    parts = urlsplit(uri)
    user_info, at, host = parts.netloc.rpartition("@")
    netloc = host
    if at and parts.scheme.partition("+")[0].lower() in DATABASES:
        user = user_info.partition(":")[0]
        netloc = f"{user}@{host}" if user else host
    query = parts.query
    if any(sounds_secret(name) for name, _ in parse_qsl(query, keep_blank_values=True)):
        pairs = [(n, v) for n, v in parse_qsl(query, keep_blank_values=True) if not sounds_secret(n)]
        query = urlencode(pairs, quote_via=quote)
    if netloc == parts.netloc and query == parts.query:
        return uri  # untouched: urlunsplit would write `sqlite:////x` with two slashes less
    return urlunsplit((parts.scheme, netloc, parts.path, query, parts.fragment))


def sounds_secret(name: str) -> bool:
    """Whether a parameter of this name would let somebody in."""
    return any(word in unquote(name).lower() for word in _SECRET_WORDS)
