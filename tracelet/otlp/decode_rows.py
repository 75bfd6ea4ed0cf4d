"""Data points as they mostly are, read in bulk: runs of rows that differ in time, value and iteration alone.

The reverse of `encode_points`, by the same forms. What has any other shape (other attributes, mixed widths all the
time, a sender with another order of fields) is left to whoever reads points one by one.
"""

from __future__ import annotations

from array import array
from typing import Any

__all__ = ["rows_of"]


def rows_of(gauge: Any, count: int) -> tuple[array[int], array[float], array[int]] | None:
    """Times, values and iterations of a Gauge's `count` points; None where they are not all of our forms."""
    return None
