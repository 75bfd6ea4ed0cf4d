"""What every crash test gets: an end, also where it waits for what never comes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.crash.limit import limited

LIMIT_S = 2 * 3600.0 if os.environ.get("TRACELET_SOAK") else 600.0
"""Many times what the longest of them takes, on a busy machine too; what each may take for itself its file says."""


@pytest.fixture(autouse=True)
def limit_in_time() -> Iterator[None]:
    """Ends the test that exceeds it, and not the session."""
    with limited(LIMIT_S):
        yield
