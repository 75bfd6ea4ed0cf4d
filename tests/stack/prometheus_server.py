"""A Prometheus with the shipped file, on a folder that a test may put blocks into, and promtool."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.stack.collectors import CONFIG, Prometheus
from tests.stack.harness import program

__all__ = ["promtool", "shipped"]


def shipped(folder: Path, *more: str, targets: str | None = None) -> Prometheus:
    """Not started yet. `targets`: addresses to scrape (`127.0.0.1:1234`) in place of the shipped ones."""
    made = Prometheus(folder, "7d", *more)
    shutil.copytree(CONFIG / "prometheus", folder, dirs_exist_ok=True)
    for file in (folder / "targets").iterdir():
        file.unlink()
    if targets is not None:
        (folder / "targets" / "test.yaml").write_text(f"- targets: [{targets!r}]\n  labels: {{job: otelcol}}\n")
    return made


def promtool(*words: str | Path, cwd: Path | None = None) -> str:
    """What it says; its complaints are in the error if it fails."""
    done = subprocess.run(
        [program("promtool"), *words], capture_output=True, text=True, check=False, cwd=cwd, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
