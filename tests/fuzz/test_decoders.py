"""No bytes make a decoder of the spool's files crash, hang or raise anything but what it says.

The usual run: hypothesis, from valid inputs damaged and from noise. TRACELET_SOAK=1: more of that, and atheris for a
minute a decoder, where it is installed.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS

SOAK = bool(os.environ.get("TRACELET_SOAK"))
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["flip", "cut", "zero", "insert", "repeat", "digit"]),
        st.binary(min_size=1, max_size=12),
    ),
    max_size=5,
)


def edited(seed: bytes, edits: list[tuple[float, str, bytes]]) -> bytes:
    data = bytearray(seed)
    for where, how, noise in edits:
        at = int(where * len(data)) if data else 0
        if how == "flip" and data:
            data[at] ^= noise[0]
        elif how == "cut":
            del data[at:]
        elif how == "zero":
            data[at : at + 64] = bytes(len(data[at : at + 64]))
        elif how == "insert":
            data[at:at] = noise
        elif how == "repeat":
            data[at:at] = data[at : at + 200]
        elif how == "digit" and data:
            data[at : at + 1] = b"9" * len(noise)
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_a_decoder_takes_damaged_files(name: str) -> None:
    target = TARGETS[name]
    target.run(target.seed)

    @settings(max_examples=5000 if SOAK else 100, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(EDITS)
    def damaged(edits: list[tuple[float, str, bytes]]) -> None:
        target.run(edited(target.seed, edits))

    damaged()


@pytest.mark.parametrize("name", TARGETS)
def test_a_decoder_takes_noise(name: str) -> None:
    @settings(max_examples=5000 if SOAK else 50, deadline=None, database=None)
    @given(st.binary(max_size=300))
    def noise(data: bytes) -> None:
        TARGETS[name].run(data)

    noise()


@pytest.mark.skipif(not SOAK, reason="a minute each: TRACELET_SOAK=1")
@pytest.mark.parametrize("name", TARGETS)
def test_atheris_finds_nothing_in_a_minute(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: pip install atheris")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(TARGETS[name].seed)
    command = [sys.executable, "-m", "tests.fuzz.targets", name, "-max_total_time=60", "-max_len=20000", str(corpus)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
