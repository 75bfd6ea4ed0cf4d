"""Training programs for tests: real interpreters over a script, started, waited for with a limit, and never left."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIMIT_S = 60.0
"""How long a program of a test may take; none comes near it unless it hangs."""


def written(folder: Path, code: str, name: str = "train.py") -> Path:
    """The script that holds `code`."""
    script = folder / name
    script.write_text(textwrap.dedent(code))
    return script


def finished(
    folder: Path, code: str, *arguments: object, limit_s: float = LIMIT_S, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run `code` in `folder` to its end; its exit code is for the caller to look at."""
    script = written(folder, code)
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )


@contextmanager
def started(
    folder: Path, code: str, *arguments: object, before: tuple[str, ...] = (), group: bool = False, **environ: str
) -> Iterator[subprocess.Popen[str]]:
    """`code` as a process with pipes for input and output, killed at the end of the block if it is still there.

    `before`: words in front of the interpreter (`unshare ...`). `group`: in a process group of its own.
    """
    script = written(folder, code)
    process = subprocess.Popen(
        [*before, sys.executable, str(script), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, **environ},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=group,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(LIMIT_S)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def said_until(process: subprocess.Popen[str], words: str) -> str:
    """All that a program has printed until these words stood in it."""
    assert process.stdout is not None
    text = ""
    while words not in text:
        line = process.stdout.readline()
        assert line, text
        text += line
    return text


def said(process: subprocess.Popen[str]) -> str:
    """The next line a program printed; empty at its end."""
    assert process.stdout is not None
    return process.stdout.readline().strip()
