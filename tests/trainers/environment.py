"""The interpreter that has PyTorch and Ray, and programs of it: started in a folder, waited for, never left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from tests.conftest import processes_of, stop
from tests.stack.harness import REPOSITORY, environment, lacking

LIMIT_S = 420.0
"""How long a program of a test may take; none comes near it unless it hangs."""

TELL = """
import json, os, time
def tell(**facts):  # in one write each: all processes of a launch share the file
    with open(os.environ["TOLD"], "ab", buffering=0) as told:
        told.write(json.dumps(facts).encode() + b"\\n")
def all_told(number):  # wait until so many words were told
    until = time.monotonic() + 60
    while len(open(os.environ["TOLD"]).readlines()) < number:
        assert time.monotonic() < until, "the others never came"
        time.sleep(0.01)
"""
"""What a program of a test begins with: a word to the test, and a way to wait for other processes' words."""


@cache
def _asked() -> tuple[str, str]:
    """The interpreter's path, or why there is none."""
    asked = subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / "trainers.py"), "where"],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
        timeout=120,
    )
    return asked.stdout.strip(), asked.stderr.strip()


def interpreter() -> str:
    """The Python that has PyTorch and Ray; skips the test if there is none (fails it where the stack is required)."""
    path, reason = _asked()
    if not path:
        lacking(reason)
    return path


@contextmanager
def started(
    folder: Path, *words: str, before: Sequence[str] = (), by: str | None = None, **environ: str
) -> Iterator[subprocess.Popen[str]]:
    """`words` given to that interpreter, in `folder`; at the end of the block nothing of it is left.

    What is said goes into a file: a pipe would stay open as long as any process of the launch has it. `before`: words
    in front of the interpreter (`unshare ...`); `by`: another interpreter.
    """
    said = {
        "PYTHONPATH": str(REPOSITORY),
        "TOLD": str(folder / "told"),
        "TMPDIR": str(folder),  # torchrun's own files; a launcher of many processes is found by it, too
        "HOME": str(folder),
    }
    with (folder / "said").open("ab") as output:
        process = subprocess.Popen(
            [*before, interpreter() if by is None else by, *words],
            cwd=folder,
            env={**os.environ, **said, **environ},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(LIMIT_S)
        stop([pid for pid in processes_of(str(folder)) if not _is_shipper(pid)])


def _is_shipper(pid: int) -> bool:
    """It outlives what it ships for, and leaves by itself."""
    try:
        return b"tracelet.shipper" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def ended(process: subprocess.Popen[str], folder: Path, code: int | None = 0) -> None:
    """Wait for the end of a program; `code` is how it must have ended, None any way."""
    found = process.wait(LIMIT_S)
    assert code is None or found == code, (found, said(folder))


def run(folder: Path, *words: str, code: int | None = 0, by: str | None = None, **environ: str) -> None:
    """Run `words` by that interpreter, to the end."""
    with started(folder, *words, by=by, **environ) as process:
        ended(process, folder, code)


def said(folder: Path) -> str:
    """The last of all that programs in `folder` printed."""
    return (folder / "said").read_text(errors="replace")[-6000:]


def told(folder: Path) -> list[dict[str, Any]]:
    """What the processes of a launch told, in their order."""
    try:
        return [json.loads(line) for line in (folder / "told").read_text().splitlines()]
    except FileNotFoundError:
        return []
