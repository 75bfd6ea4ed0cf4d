"""No bytes make a decoder crash, hang, take memory without bound, or raise anything but what it says.

The usual run: hypothesis, from valid inputs damaged and from noise; what fuzzers found before; and atheris for half a
minute over all decoders, where it is installed (the group `fuzz`; it has wheels for Linux on x86-64). TRACELET_SOAK=1:
more of that, and atheris for a minute a decoder.
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

from tests.fuzz.targets import ALL, CORPUS, TARGETS, Target, found_before
from tracelet.guard import logger

SOAK = bool(os.environ.get("TRACELET_SOAK"))
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["flip", "cut", "zero", "insert", "repeat", "digit"]),
        st.binary(min_size=1, max_size=12),
    ),
    max_size=5,
)

by_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed: pip install --group fuzz"
)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What damage is told of would be most of what these tests do."""
    monkeypatch.setattr(logger.logger, "disabled", True)


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
    for seed in target.seeds:
        target.run(seed)

    @settings(max_examples=3000 if SOAK else 60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.sampled_from(target.seeds), EDITS)
    def damaged(seed: bytes, edits: list[tuple[float, str, bytes]]) -> None:
        target.run(edited(seed, edits))

    damaged()


@pytest.mark.parametrize("name", TARGETS)
def test_a_decoder_takes_noise(name: str) -> None:
    @settings(max_examples=3000 if SOAK else 40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.binary(max_size=300))
    def noise(data: bytes) -> None:
        TARGETS[name].run(data)

    noise()


@pytest.mark.parametrize("name", TARGETS)
def test_what_a_fuzzer_found_before_is_taken(name: str) -> None:
    for data in found_before(name):
        TARGETS[name].run(data)


def test_every_folder_of_the_corpus_is_a_decoders() -> None:
    assert {path.name for path in CORPUS.iterdir()} <= {name.replace(" ", "-").lower() for name in TARGETS}


def fuzz(name: str, target: Target, known: list[bytes], folder: Path, seconds: int) -> None:
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, data in enumerate((*target.seeds, *known)):
        (corpus / f"{number}").write_bytes(data)
    command = [sys.executable, "-m", "tests.fuzz.run", name, f"-max_total_time={seconds}", "-max_len=20000"]
    limits = ["-timeout=60", "-rss_limit_mb=2048", f"-artifact_prefix={folder}/found-", str(corpus)]
    done = subprocess.run(
        [*command, *limits], capture_output=True, text=True, errors="replace", timeout=seconds + 180, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]


@by_atheris
def test_atheris_finds_nothing_in_half_a_minute_over_all_decoders(tmp_path: Path) -> None:
    fuzz("all", ALL, [], tmp_path, 30)


@by_atheris
@pytest.mark.skipif(not SOAK, reason="a minute each: TRACELET_SOAK=1")
@pytest.mark.parametrize("name", TARGETS)
def test_atheris_finds_nothing_in_a_minute(name: str, tmp_path: Path) -> None:
    fuzz(name, TARGETS[name], found_before(name), tmp_path, 60)
