"""Names and values in the form MLflow takes: what is changed is changed the same way each time, and recognisably.

MLflow refuses a whole request for one bad name, and cuts long values without a word; so both are settled here first.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from functools import lru_cache
from urllib.parse import urlparse, urlunparse

from tracelet.exporters.mlflow.limits import KEY_CHARS, MARKED_NAME_CHARS

__all__ = ["capped", "digest", "encodable", "file_name", "legal_name", "legal_path", "shorten", "text_of"]

# utils/validation.py validate_param_and_metric_name: `\w` is Unicode's. MLflow's own pattern ends in `$`, which lets a
# trailing newline pass; ours doesn't.
_LEGAL = re.compile(r"[/\w.\- :]+")
_ILLEGAL_CHARACTER = re.compile(r"[^/\w.\- :]")


def digest(text: str) -> str:
    """8 hexadecimal digits that stand for `text`."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


@lru_cache(maxsize=65536)
def legal_name(name: str) -> str:
    """`name` itself if MLflow takes it as a key, else its legal form with 8 digits of the original's hash.

    The hash keeps two originals apart that would become the same, so no state and no order of arrival is needed.

    Examples:
        >>> legal_name("train/loss"), legal_name("accuracy@5")
        ('train/loss', 'accuracy_5-aec7bbf4')
    """
    if len(name) <= KEY_CHARS and _LEGAL.fullmatch(name) is not None and _is_own_path(name):
        return name
    replaced = _ILLEGAL_CHARACTER.sub("_", name)
    parts = [part for part in replaced.split("/") if part not in ("", ".", "..")]
    kept = "/".join(parts)[: MARKED_NAME_CHARS - 9].rstrip("/")
    return f"{kept or '_'}-{digest(name)}"


def _is_own_path(name: str) -> bool:
    normal = posixpath.normpath(name)
    return normal == name and normal != "." and not normal.startswith(("..", "/"))


# utils/uri.py validate_path_is_safe, at the server: decodes %XX until none is left, refuses '#', escapes control
# characters, strips spaces in front. Lone surrogates (a file name that is not UTF-8) can't be written into an address.
_ILLEGAL_IN_PATH = re.compile("%[0-9A-Fa-f]{2}|^ +|[#\\x00-\\x1f\\x7f\ud800-\udfff]")

_ADDRESS_MARKS = re.compile(r"[?;:\[\]]")


def legal_path(path: str) -> str:
    """`path` itself if MLflow keeps an artifact's path as it is, else a form with 8 digits of the original's hash.

    Examples:
        >>> legal_path("plots/loss.png"), legal_path("plots/50%25.png")
        ('plots/loss.png', 'plots/50_-757d185c.png')
    """
    if _ILLEGAL_IN_PATH.search(path) is None and _is_own_address(path):
        return path
    stem, extension = posixpath.splitext(_ADDRESS_MARKS.sub("_", _ILLEGAL_IN_PATH.sub("_", path)))
    return f"{stem}-{digest(path)}{extension}"


def _is_own_address(path: str) -> bool:
    """The server takes a path apart as an address, and puts it together again: an empty query goes, for one."""
    try:
        return urlunparse(urlparse(path)) == path
    except ValueError:
        return False


def text_of(value: object) -> str:
    """A param's value as MLflow's own client writes it: `str(value)`.

    Examples:
        >>> text_of(True), text_of(0.001), text_of(float("nan"))
        ('True', '0.001', 'nan')
    """
    return encodable(value if isinstance(value, str) else str(value))


def encodable(text: str) -> str:
    r"""`text`, with what no database takes written out: NUL as `\x00`, lone surrogates as `\udc80`."""
    if "\x00" in text:
        text = text.replace("\x00", "\\x00")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text


def capped(text: str, limit: int) -> str:
    """`text` if it has at most `limit` characters, else a prefix with 8 digits of its hash."""
    return text if len(text) <= limit else f"{text[: limit - 9]}-{digest(text)}"


def shorten(text: str, limit: int, kept_at: str) -> str:
    """A prefix of `text` of at most `limit` characters with a mark that says where the whole is, and its digest."""
    mark = f" ... [cut by tracelet: {len(text)} characters, sha256 {digest(text)}, whole in artifact {kept_at}]"
    return text[: limit - len(mark)] + mark


def file_name(key: str) -> str:
    """A file name of at most 113 plain characters that stands for `key` alone."""
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', key)[:100]}-{digest(key)}.txt"
