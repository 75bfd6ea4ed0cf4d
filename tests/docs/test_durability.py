"""docs/explanation/durability.md: each promise names tests that are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "explanation" / "durability.md"
REFERENCE = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@cache
def functions_of(path: str) -> frozenset[str]:
    """The names of a file's test functions."""
    tree = ast.parse((ROOT / path).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def rows() -> list[list[str]]:
    """The cells of every row of the page's tables, heads left out."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line[1:-1])] for line in lines]
    return [row for row in cells if row[0] not in ("hop", "what happens", "---") and set(row[0]) != {"-"}]


def test_every_promise_names_a_test_that_is_there() -> None:
    found = rows()
    assert len(found) > 80
    for what, promise, held_by in found:
        named = REFERENCE.findall(held_by)
        assert named or promise.endswith("Not promised"), what
        assert not REFERENCE.sub("", held_by).strip(", "), f"{what}: {held_by}"
        for path, name in named:
            assert name in functions_of(path), f"{what}: {path} has no {name}"
