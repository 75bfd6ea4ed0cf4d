"""How an artifact's bytes are addressed between a training host, a store and a gateway: all three have to agree."""

from __future__ import annotations

import hashlib
import posixpath
import re

__all__ = [
    "EVENT_HEADER",
    "GATEWAY_SCHEME",
    "WHY_HEADER",
    "event_mark",
    "gateway_digest",
    "gateway_uri",
    "had_name",
    "held_at",
    "is_digest",
    "is_event_mark",
    "plain_name",
    "store_path",
    "wanted_name",
]

GATEWAY_SCHEME = "tracelet-gateway"

WHY_HEADER = "tracelet.why"
"""Why a gateway refuses a file: the answer to a HEAD has no body to say it in."""

EVENT_HEADER = "tracelet.artifact.event"
"""Names the event that a file is put for (`event_mark`): until that is delivered the gateway keeps the file."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


def plain_name(run_id: str) -> str:
    """A run's folder: its id, or a digest of one that is no plain name.

    Examples:
        >>> plain_name("5f3a-1"), plain_name("../etc")
        ('5f3a-1', 'run-f7f9121fdb53d8de1eccbfa65c4bd976')
    """
    if _PLAIN.fullmatch(run_id):
        return run_id
    return "run-" + hashlib.sha256(run_id.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def store_path(run_id: str, sha256: str, path: str) -> str:
    """Where an artifact stands below a store: <run>/<2 digits>/<sha256>/<name>; the same bytes, the same place.

    Examples:
        >>> store_path("r1", "ab" * 32, "models/best 1.pt")[-12:]
        'ab/best_1.pt'
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "_", posixpath.basename(path))[:128].lstrip(".") or "artifact"
    return f"{plain_name(run_id)}/{sha256[:2]}/{sha256}/{name}"


def gateway_uri(sha256: str) -> str:
    """The address of bytes that were put to the gateway, which knows the rest from the run.

    Examples:
        >>> gateway_uri("ab" * 32)[:30]
        'tracelet-gateway:sha256:ababab'
    """
    return f"{GATEWAY_SCHEME}:sha256:{sha256}"


def gateway_digest(uri: str) -> str | None:
    """The digest in an address of `gateway_uri`'s kind, None for any other text."""
    head = f"{GATEWAY_SCHEME}:sha256:"
    digest = uri.removeprefix(head)
    return digest if uri.startswith(head) and is_digest(digest) else None


def is_digest(text: str) -> bool:
    """Whether `text` is a sha256 as we write it: 64 digits, lower case."""
    return _DIGEST.fullmatch(text) is not None


def held_at(run_id: str, sha256: str) -> str:
    """Where a gateway keeps bytes that were put to it, below its folder for artifacts."""
    return f"{plain_name(run_id)}/{sha256}"


def event_mark(time_unix_nano: int, path: str) -> str:
    """Names one artifact event of a run on both sides: what it says of the file's name, and when it was logged.

    Examples:
        >>> event_mark(1_800_000_000_000_000_000, "models/best.pt")
        'e9fcf427c9c9cf9e'
    """
    # As text stands on the wire, which has no lone surrogates.
    return hashlib.sha256(f"{time_unix_nano} {path}".encode("utf-8", "backslashreplace")).hexdigest()[:16]


def is_event_mark(text: str) -> bool:
    """Whether `text` is one that `event_mark` could have made."""
    return re.fullmatch(r"[0-9a-f]{16}", text) is not None


def wanted_name(sha256: str, event: str) -> str:
    """The mark beside a held file that an event (empty: an unnamed one) may still need."""
    return f"{sha256}.for-{event or 'unnamed'}"


def had_name(sha256: str, event: str) -> str:
    """The mark beside a held file that MLflow has for an event; the address of that MLflow is in it."""
    return f"{sha256}.had-{event or 'unnamed'}"
