"""How long a server asks us to wait (`Retry-After`, RetryInfo), and how much of it is granted; for every exporter."""

from __future__ import annotations

import datetime
import time
from email.utils import parsedate_to_datetime

__all__ = ["granted", "retry_after"]

_SHORTEST_S = 1.0
_LONGEST_S = 3600.0


def granted(asked_s: float | None) -> float | None:
    """A server's wish within bounds: at most an hour, and None, our own growing back-off, where it is under a second.

    `Retry-After: 0` was 500 requests a second against a server that had asked for mercy (measured).

    Examples:
        >>> from tracelet.exporters.retry_after import granted
        >>> granted(0.0), granted(7.5), granted(86400.0)
        (None, 7.5, 3600.0)
    """
    if asked_s is None or not asked_s >= _SHORTEST_S:  # not NaN either
        return None
    return min(asked_s, _LONGEST_S)


def retry_after(value: str | None, *, now_s: float | None = None) -> float | None:
    """Seconds to wait by the header `Retry-After` (RFC 9110, 10.2.3), which is a number of them or an HTTP date.

    None where it asks for nothing, or for nothing that can be read. So does a moment that is past: a server's clock a
    minute behind ours must not make us ask at once, again and again.

    Examples:
        >>> from tracelet.exporters.retry_after import retry_after
        >>> retry_after("120"), retry_after("Thu, 01 Jan 1970 00:01:00 GMT", now_s=50.0), retry_after("soon")
        (120.0, 10.0, None)
    """
    value = (value or "").strip()
    if value.isdecimal():
        return granted(float(value))
    try:
        moment = parsedate_to_datetime(value)
    except (ValueError, OverflowError):  # no date, or one beyond what Python counts
        return None
    if moment.tzinfo is None:  # "-0000": UTC, nothing said about where
        moment = moment.replace(tzinfo=datetime.UTC)
    return granted(moment.timestamp() - (time.time() if now_s is None else now_s))
