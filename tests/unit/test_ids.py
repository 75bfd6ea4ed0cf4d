"""Ids: valid in every format that carries them, and the same for whoever derives them."""

from __future__ import annotations

import re
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracelet import ids
from tracelet.errors import ConfigError

KEY = "0123456789abcdef"


def test_new_ids_differ_and_have_their_form() -> None:
    assert len({ids.new_run_id() for _ in range(1000)}) == 1000
    for make, pattern in (
        (ids.new_run_id, "[0-9a-f]{32}"),
        (ids.new_attempt_key, "[0-9a-f]{16}"),
        (ids.new_span_id, "[0-9a-f]{16}"),
    ):
        assert re.fullmatch(pattern, make())


def test_a_new_run_id_is_a_valid_one() -> None:
    run_id = ids.new_run_id()
    assert ids.valid_run_id(run_id) == run_id


@pytest.mark.parametrize("text", ["a", "nightly-42", "A.b_c-1", "9" * 128])
def test_a_run_id_may_be_a_name_a_person_chose(text: str) -> None:
    assert ids.valid_run_id(text) == text


@pytest.mark.parametrize("text", ["", ".", "..", "-a", "a/b", "a b", "a\n", "ä", "9" * 129, "a\0", None, 5])
def test_what_could_not_name_a_folder_is_refused(text: object) -> None:
    with pytest.raises(ConfigError, match="can't name a run"):
        ids.valid_run_id(text)  # type: ignore[arg-type]


def test_derived_ids_are_what_they_were_in_the_first_release() -> None:
    """Another version has to find the spans of a run that an older one began."""
    assert ids.trace_id("r1", KEY) == "9fa8f482d82e63cb8efc290007504141"
    assert ids.root_span_id("r1", KEY) == "fc1eff47a7c8ad52"
    assert ids.rank_span_id("r1", KEY, 1) == "26e580827eae0d08"
    assert ids.instance_id("r1", KEY, 0) == "610fcec3-d7f1-5b45-bd50-ed211821f203"


@given(st.text(), st.text(), st.integers(0, 1000))
def test_derived_ids_are_valid_and_not_zero(run_id: str, key: str, rank: int) -> None:
    for text, size in (
        (ids.trace_id(run_id, key), 32),
        (ids.root_span_id(run_id, key), 16),
        (ids.rank_span_id(run_id, key, rank), 16),
    ):
        assert re.fullmatch(f"[0-9a-f]{{{size}}}", text)
        assert int(text, 16)
    assert uuid.UUID(ids.instance_id(run_id, key, rank)).version == 5


def test_runs_attempts_and_ranks_have_ids_of_their_own() -> None:
    ways = [("r1", KEY), ("r2", KEY), ("r1", "f" * 16)]
    assert len({ids.trace_id(*way) for way in ways}) == 3
    assert len({ids.rank_span_id(*way, rank) for way in ways for rank in range(3)}) == 9
    assert len({ids.instance_id(*way, rank) for way in ways for rank in range(3)}) == 9
    assert ids.rank_span_id("r1", KEY, 0) == ids.root_span_id("r1", KEY)
