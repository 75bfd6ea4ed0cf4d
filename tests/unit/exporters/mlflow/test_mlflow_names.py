"""Names and values for MLflow, held against mlflow's own validators."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from tracelet.exporters.mlflow.limits import KEY_CHARS, PARAM_VALUE_CHARS
from tracelet.exporters.mlflow.names import capped, encodable, file_name, legal_name, legal_path, shorten, text_of
from tracelet.exporters.mlflow.native import quiet_mlflow

with quiet_mlflow():
    from mlflow.exceptions import MlflowException
    from mlflow.utils.uri import validate_path_is_safe
    from mlflow.utils.validation import _validate_length_limit, _validate_metric_name

# Surrogates too: a name may come from a file name or argv.
TEXT = st.text(st.characters(codec=None), max_size=300)


def mlflow_takes(name: str) -> bool:
    try:
        _validate_metric_name(name)
        _validate_length_limit("key", KEY_CHARS, name)
    except MlflowException:
        return False
    return not name.endswith("\n")  # MLflow's pattern lets it pass, by an oversight


@given(TEXT)
@example("")
@example(".")
@example("..")
@example("../../x")
@example("/")
@example("a\n")
@example("a" * 251)
@example(("a" * 62 + "/") * 4)
def test_a_name_is_kept_if_mlflow_takes_it_and_made_so_that_it_does(name: str) -> None:
    legal = legal_name(name)
    assert mlflow_takes(legal)
    assert (legal == name) == mlflow_takes(name)
    assert legal_name(legal) == legal
    legal.encode()


def test_names_that_would_become_the_same_stay_apart() -> None:
    names = ["a@b", "a#b", "a_b", "/a_b", "a_b/", "a//b", "./a_b", "x" * 300, "x" * 301]
    assert len({legal_name(name) for name in names}) == len(names)


@given(st.lists(st.text(st.characters(codec=None, exclude_characters="/"), min_size=1, max_size=40), min_size=1))
@example([" "])
@example([" a", " b"])
@example(["?"])
@example(["a;"])
@example(["HTTP:x"])
@example(["file:x"])
def test_an_artifacts_path_is_kept_if_the_server_does_and_made_so_that_it_does(parts: list[str]) -> None:
    path = "/".join(part for part in parts if part not in (".", "..")) or "x"
    legal = legal_path(path)
    if not (len(legal) > 1 and legal[1] == ":") and "\\" not in legal:  # a drive letter; refused by name
        assert validate_path_is_safe(legal) == legal
    assert legal_path(legal) == legal
    legal.encode()


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "True"), (0.001, "0.001"), (1e22, "1e+22"), (3, "3"), ("x", "x"), (float("-inf"), "-inf"), ("", "")],
)
def test_a_params_value_is_written_as_mlflows_client_does(value: object, text: str) -> None:
    assert text_of(value) == text == str(value)


def test_what_no_database_takes_is_written_out() -> None:
    assert encodable("a\x00b\udc80c é") == "a\\x00b\\udc80c é"


def test_a_cut_text_says_how_long_it_was_where_the_whole_is_and_differs_with_it() -> None:
    long = "x" * 10_000
    cut, other = shorten(long, PARAM_VALUE_CHARS, "a/b.txt"), shorten(long[:-1] + "y", PARAM_VALUE_CHARS, "a/b.txt")
    assert len(cut) == len(other) == PARAM_VALUE_CHARS
    assert cut != other
    assert "10000 characters" in cut
    assert cut.endswith("whole in artifact a/b.txt]")
    assert capped("ab", 2) == "ab"
    assert len(capped("x" * 300, 250)) == 250


@given(TEXT)
def test_a_file_name_for_a_key_is_short_and_plain(key: str) -> None:
    name = file_name(key)
    assert len(name) <= 113
    assert name.isascii()
    assert "/" not in name
