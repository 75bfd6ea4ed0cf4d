"""docs/guide/stack-without-docker.md, done as it says: start, send a run, see it, restart a piece, stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.docs.page import blocks_of, matches
from tests.stack.harness import REPOSITORY, environment, require, wait_until

PAGE = REPOSITORY / "docs" / "guide" / "stack-without-docker.md"


def test_a_reader_who_types_the_page_gets_what_it_promises(tmp_path: Path) -> None:
    require("collector", "prometheus")
    (tmp_path / "scripts").symlink_to(REPOSITORY / "scripts")
    blocks = [block for block in blocks_of(PAGE.read_text()) if block.not_run]
    up = next(block for block in blocks if "up --dir" in block.code)
    restart = next(block for block in blocks if "restart" in block.code)
    programs = [block for block in blocks if block.language == "python"]
    said = tmp_path / "up.log"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {**environment(), "PATH": path, "TRACELET_DIR": str(tmp_path / "spool")}
    with said.open("wb") as out:
        words = ["bash", "-c", f"exec {up.code.strip()}"]
        process = subprocess.Popen(words, cwd=tmp_path, env=variables, stdout=out, stderr=out)
    try:
        wait_until(lambda: "ready" in said.read_text().splitlines() or process.poll() is not None, 240, said.read_text)
        assert process.poll() is None, said.read_text()
        assert run(programs[0].code, tmp_path, variables) == ""
        # A reader needs seconds to get there; by then the collector has passed on what it acknowledged.
        looked: list[str] = []
        look = "import json\nstack = json.load(open('stack-data/stack.json'))\n" + programs[1].code

        def seen() -> bool:
            looked.append(run(look, tmp_path, variables))
            return matches(str(programs[1].output), looked[-1])

        wait_until(seen, 60, lambda: f"printed {looked[-1]!r}")
        subprocess.run(["bash", "-euc", restart.code], cwd=tmp_path, env=variables, check=True, timeout=120)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def run(code: str, folder: Path, variables: dict[str, str]) -> str:
    """What a program prints; an error of the first looks, while nothing is there yet, counts as nothing printed."""
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0 or "IndexError" in done.stderr, done.stderr
    return done.stdout
