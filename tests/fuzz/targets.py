"""What a fuzzer feeds: every decoder there is, each with valid inputs to begin with.

A target takes bytes and either returns or raises what its decoder documents. See `run` for atheris.
"""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.people_targets import PEOPLE_TARGETS
from tests.fuzz.spool_targets import SPOOL_TARGETS
from tests.fuzz.target import Target
from tests.fuzz.wire_targets import WIRE_TARGETS

__all__ = ["ALL", "TARGETS", "found_before"]

TARGETS: dict[str, Target] = {**SPOOL_TARGETS, **WIRE_TARGETS, **PEOPLE_TARGETS}
NAMES = tuple(TARGETS)
CORPUS = Path(__file__).parent / "corpus"


def found_before(name: str) -> list[bytes]:
    """What fuzzers came upon that is worth the while again: one file for each, in the tree."""
    folder = CORPUS / name.replace(" ", "-").lower()
    return [path.read_bytes() for path in sorted(folder.iterdir())] if folder.is_dir() else []


def _any(data: bytes) -> None:
    if data:
        TARGETS[NAMES[data[0] % len(NAMES)]].run(data[1:])


ALL = Target(
    _any,
    tuple(
        bytes((number,)) + seed
        for number, name in enumerate(NAMES)
        for seed in (*TARGETS[name].seeds, *found_before(name))
    ),
)
