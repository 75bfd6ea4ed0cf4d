"""Programs that train until they are told that it is enough, while a test takes away what they send to."""

from __future__ import annotations

import time
from pathlib import Path

from tests.stack.harness import wait_until

GOES_ON = 3_000  # iterations in an outage: at most 20,000 at the programs' pace


class Training:
    """Programs that go on until told; their iterations, one number a run, are read from files."""

    def __init__(self, folder: Path, run_ids: tuple[str, ...]) -> None:
        self.folder = folder
        self.run_ids = run_ids

    def iterations(self) -> list[int]:
        """How far each of them is, to within 50."""
        files = [self.folder / run_id for run_id in self.run_ids]
        return [int(file.read_text()) if file.exists() else 0 for file in files]

    def goes_on(self, seconds: float) -> None:
        """Return after so many seconds; every program has logged thousands of iterations in them."""
        before, until = self.iterations(), time.monotonic() + seconds
        wait_until(
            lambda: (
                time.monotonic() > until
                and all(now >= then + GOES_ON for now, then in zip(self.iterations(), before, strict=True))
            ),
            seconds + 120,
            lambda: f"training stands still: from {before} to {self.iterations()} iterations",
        )

    def enough(self) -> None:
        """Tell them to end."""
        (self.folder / "enough").touch()
