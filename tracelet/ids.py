"""The ids of runs, attempts, traces, spans and instances, and how one follows from another.

Trace, root span and instance ids are derived, so that any process that knows a run's id and its attempt's key can
name them without asking: training code, the shipper, another rank, and `tracelet ship` a week later.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import uuid
from collections.abc import Sequence

from tracelet.errors import ConfigError

__all__ = [
    "derived_attempt_key",
    "derived_run_id",
    "instance_id",
    "new_attempt_key",
    "new_run_id",
    "new_span_id",
    "rank_span_id",
    "root_span_id",
    "trace_id",
    "valid_run_id",
]

# The namespace that OpenTelemetry's resource conventions give for derived service.instance.id values.
_INSTANCE_NAMESPACE = uuid.UUID("4d63009a-8d0f-11ee-aad7-4c796ed8e320")
_RUN_NAMESPACE = uuid.UUID("0f3c1b0e-6d0c-5b7e-9c1f-1f1a1d5f7a52")
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def new_run_id() -> str:
    """A new random run id: 32 hexadecimal digits."""
    return uuid.uuid4().hex


def derived_run_id(facts: Sequence[object]) -> str:
    """The id of the run that these facts name, a UUID of version 5: 32 hexadecimal digits, the same for the same facts.

    For processes that share a run and can't speak with one another; the facts have to differ between any two launches.
    """
    return uuid.uuid5(_RUN_NAMESPACE, json.dumps(list(facts), separators=(",", ":"))).hex


def derived_attempt_key(run_id: str, facts: Sequence[object]) -> str:
    """The key of the attempt of a run that these facts name: 16 hexadecimal digits, as `new_attempt_key` gives."""
    text = json.dumps(["attempt", run_id, *facts], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def valid_run_id(text: str) -> str:
    """`text` itself, if it can be a run id; it names a folder, so it is checked.

    Raises:
        ConfigError: not 1 to 128 letters, digits, '.', '_' or '-', or not beginning with a letter or digit.

    Examples:
        >>> from tracelet.ids import valid_run_id
        >>> valid_run_id("nightly-42")
        'nightly-42'
    """
    if not isinstance(text, str) or _RUN_ID.fullmatch(text) is None:
        raise ConfigError(
            f"run_id {text!r} can't name a run: use 1 to 128 letters, digits, '.', '_' or '-',"
            " beginning with a letter or digit",
            run_id=text,
        )
    return text


def new_attempt_key() -> str:
    """64 random bits as 16 hexadecimal digits: the key of one start of a run."""
    return secrets.token_hex(8)


def new_span_id() -> str:
    """A new span id, 16 hexadecimal digits, never zero (zero is invalid in the W3C trace context)."""
    while True:
        span = secrets.token_hex(8)
        if int(span, 16):
            return span


def _derive(what: str, run_id: str, attempt_key: str, size: int) -> str:
    digest = hashlib.sha256(f"tracelet/{what}/{run_id}/{attempt_key}".encode()).digest()[:size]
    # An all-zero id is invalid in the W3C trace context; one chance in 2**64, and free to exclude.
    return (digest if any(digest) else b"\x01" * size).hex()


def trace_id(run_id: str, attempt_key: str) -> str:
    """The trace id of an attempt: 32 hexadecimal digits."""
    return _derive("trace", run_id, attempt_key, 16)


def root_span_id(run_id: str, attempt_key: str) -> str:
    """The id of an attempt's root span: 16 hexadecimal digits."""
    return _derive("root", run_id, attempt_key, 8)


def rank_span_id(run_id: str, attempt_key: str, rank: int) -> str:
    """The id of the span of one rank of an attempt, a child of the root span; rank 0 has the root span itself."""
    return root_span_id(run_id, attempt_key) if rank == 0 else _derive(f"rank/{rank}", run_id, attempt_key, 8)


def instance_id(run_id: str, attempt_key: str, rank: int) -> str:
    """`service.instance.id` of one rank of an attempt: a UUID of version 5."""
    return str(uuid.uuid5(_INSTANCE_NAMESPACE, f"{run_id}/{attempt_key}/{rank}"))
