"""A live reader beside a flat-out writer: every field of every record is what was written.

Pattern: a process that writes 2 million records, a reader in another. Limit: two minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_a_live_reader_never_sees_a_torn_record(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/live_reader.py", "--points", "2000000", "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2,000,000 of 2,000,000" in done.stdout
    assert " 0 torn" in done.stdout
