"""Clocks of another world for real programs: faster ones, so that ten minutes pass in seconds, and others' dates."""

from __future__ import annotations

import os
from pathlib import Path

_FIRST = """
import time
_monotonic, _time, _time_ns = time.monotonic, time.time, time.time_ns
_began = _monotonic()
def monotonic():
    return _began + (_monotonic() - _began) * {faster}
time.monotonic = monotonic
time.time = lambda: _time() + {days} * 86400
time.time_ns = lambda: _time_ns() + {days} * 86400 * 10**9
"""


def other_clocks(folder: Path, *, faster: float = 1.0, days: int = 0) -> dict[str, str]:
    """Variables under which every Python program has such clocks from its first line on, its shipper too.

    What waits in the kernel (a lock, a poll) still takes its own time; the deadlines that are asked of
    `time.monotonic()` come `faster` times as soon. The date is `days` off.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_FIRST.format(faster=faster, days=days))
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}
