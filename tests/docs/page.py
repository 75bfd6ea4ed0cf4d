"""Reads the fenced blocks of a Markdown page, and runs them in order as a reader would: `python page.py PAGE`.

Blocks of a page share one namespace and one folder. What the reader does not see stands in HTML comments:

    <!-- before: python code, run before the next block -->
    <!-- not run: why the next block can't be -->

A ```text block straight after a block that runs is what it has to print (`...` stands for anything).
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUN = ("python", "bash", "console")
FENCE = re.compile(
    r"^(?P<indent>[ ]*)```[ ]*(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^(?P=indent)```[ ]*$", re.MULTILINE | re.DOTALL
)
COMMENT = re.compile(r"<!--\s*(?P<kind>before|not run):(?P<text>.*?)-->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: where its code begins, what it is, and what the comments before it say."""

    line: int
    language: str
    code: str
    before: tuple[tuple[int, str], ...] = ()
    not_run: str | None = None
    output: str | None = None


def blocks_of(text: str) -> list[Block]:
    """The blocks of a page, in order; output blocks are folded into the block that prints them."""
    found: list[Block] = []
    previous_end = 0
    for match in FENCE.finditer(text):
        between = text[previous_end : match.start()]
        line = text.count("\n", 0, match.start("code")) + 1
        code = textwrap.dedent(match["code"])
        before, not_run = [], None
        for comment in COMMENT.finditer(between):
            if comment["kind"] == "not run":
                not_run = " ".join(comment["text"].split())
            else:
                at = text.count("\n", 0, previous_end + comment.start("text")) + 1
                before.append((at, textwrap.dedent(comment["text"])))
        previous_end = match.end()
        last = found[-1] if found else None
        if (
            match["language"] == "text"
            and last
            and last.language in RUN
            and last.output is None
            and not between.strip()
        ):
            found[-1] = Block(last.line, last.language, last.code, last.before, last.not_run, output=code)
        else:
            found.append(Block(line, match["language"], code, tuple(before), not_run))
    return found


def run_page(page: Path) -> None:
    """Run the blocks of `page` here and now; raises at the first that fails, or prints something else."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page.read_text()):
        for line, code in block.before:
            run_python(page, line, code, namespace)
        if block.language not in RUN or block.not_run is not None:
            continue
        if block.language == "python":
            printed = run_python(page, block.line, block.code, namespace)
        else:
            printed = "".join(run_shell(page, block.line, command) for command in commands_of(block))
        if block.output is not None and not matches(block.output, printed):
            raise AssertionError(f"{page}:{block.line} should print\n{block.output}\nbut printed\n{printed}")


def run_python(page: Path, line: int, code: str, namespace: dict[str, Any]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)
    return printed.getvalue()


def commands_of(block: Block) -> list[str]:
    """The commands of a shell block; of a `console` block, those after `$`. Installing and making is not run here."""
    if block.language == "console":
        lines = [line[2:] for line in block.code.splitlines() if line.startswith("$ ")]
        return [line for line in lines if not is_setup(line)]
    lines = [line for line in block.code.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [] if all(is_setup(line) for line in lines) else [block.code]


def is_setup(line: str) -> bool:
    """Whether a line installs, fetches or calls make: what it names is checked by a test of its own."""
    return re.match(r"\s*(make|pip install|uv (add|pip install)|git clone|cd) ?", line) is not None


def run_shell(page: Path, line: int, command: str) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run(["bash", "-euc", command], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{page}:{line}: exit {done.returncode} from\n{command}\n{done.stdout}{done.stderr}")
    return done.stdout


def matches(expected: str, printed: str) -> bool:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(expected.strip(), printed.strip(), flags)


if __name__ == "__main__":
    run_page(Path(sys.argv[1]))
