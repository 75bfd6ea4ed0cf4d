"""What may be logged: each kind of number, name, iteration, param and tag, and what the others get for an answer."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import enum
import gc
import json
import math
import weakref
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracelet.core.values import MAX_NAME, check_name, check_tags, flatten_params, to_float, to_iteration
from tracelet.errors import InvalidValue


class Tensor:
    """What a tensor of one number is to us: a shape, a conversion, and a graph behind it."""

    shape: tuple[int, ...] = ()

    def __init__(self, value: float, raises: BaseException | None = None) -> None:
        self.value, self.raises, self.conversions = value, raises, 0

    def __float__(self) -> float:
        self.conversions += 1
        if self.raises is not None:
            raise self.raises
        return self.value


# ---- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, 0.5),
        (3, 3.0),
        (True, 1.0),
        (Decimal("0.1"), 0.1),
        (Fraction(1, 4), 0.25),
        (np.float16(0.5), 0.5),
        (np.float32(0.5), 0.5),
        (np.float64(0.1), 0.1),
        (np.int8(-3), -3.0),
        (np.bool_(True), 1.0),
        (np.array(2.5), 2.5),
        (np.array(7, dtype=object), 7.0),
        (Tensor(1.5), 1.5),
        (float("inf"), math.inf),
        (Decimal("-Infinity"), -math.inf),
    ],
)
def test_every_kind_of_number_becomes_a_plain_float(value: object, expected: float) -> None:
    converted = to_float("loss", value)
    assert type(converted) is float
    assert converted == expected


def test_nan_stays_nan() -> None:
    for value in (float("nan"), np.float32("nan"), Decimal("NaN"), Tensor(math.nan)):
        assert math.isnan(to_float("loss", value))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("0.1", "str"),
        (np.str_("0.1"), "numpy.str_"),
        (b"0.1", "bytes"),
        (bytearray(b"1"), "bytearray"),
        (None, "NoneType"),
        (1j, "complex"),
        (np.complex64(1), "numpy.complex64"),
        (np.array(1j), "numpy.ndarray"),
        (np.array("1"), "numpy.ndarray"),
        (np.array([1.0]), "numpy.ndarray"),
        (np.array([[1.0, 2.0]]), "numpy.ndarray"),
        (np.datetime64("2020-01-01"), "numpy.datetime64"),
        ([1.0], "list"),
        ({"a": 1}, "dict"),
        (object(), "object"),
        (datetime.timedelta(1), "datetime.timedelta"),
        (10**400, "int"),
        (Decimal("1e400"), "decimal.Decimal"),
        (Fraction(10**400), "fractions.Fraction"),
    ],
)
def test_what_is_no_number_is_refused_with_name_and_type(value: object, kind: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        to_float("loss", value)
    assert caught.value.facts == {"name": "loss", "type": kind}
    assert "'loss'" in str(caught.value)


def test_an_object_array_that_holds_a_text_is_refused() -> None:
    with pytest.raises(InvalidValue):
        to_float("loss", np.array("0.1", dtype=object))


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: out of memory"), KeyboardInterrupt(), SystemExit(3)])
def test_what_a_tensors_conversion_raises_passes_unchanged(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        to_float("loss", Tensor(0, raises=error))
    assert caught.value is error


def test_a_tensor_is_converted_once_and_not_held_on_to() -> None:
    tensor = Tensor(0.5)
    there = weakref.ref(tensor)
    to_float("loss", tensor)
    assert tensor.conversions == 1
    del tensor
    gc.collect()
    assert there() is None


@given(st.integers())
def test_an_integer_becomes_the_nearest_float_or_is_refused(value: int) -> None:
    try:
        expected = float(value)
    except OverflowError:
        with pytest.raises(InvalidValue):
            to_float("loss", value)
    else:
        assert to_float("loss", value) == expected


# ---- iterations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 5, -5, True, np.int64(5), np.uint8(5), np.array(5), 2**63 - 1, -(2**63)])
def test_an_iteration_is_any_exact_integer_of_64_bits(value: object) -> None:
    number = to_iteration(value)
    assert type(number) is int
    assert number == value


@pytest.mark.parametrize(
    "value",
    [1.0, 0.5, np.float64(2), np.array(2.0), np.array([1, 2]), "1", None, 2**63, -(2**63) - 1, np.uint64(2**63)],
)
def test_what_is_no_integer_of_64_bits_is_refused(value: object) -> None:
    with pytest.raises(InvalidValue):
        to_iteration(value)


def test_a_whole_float_is_answered_with_what_to_write() -> None:
    with pytest.raises(InvalidValue, match=r"write int\(3\.0\)"):
        to_iteration(3.0)


# ---- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["loss", "train/loss", "损失", "a b", "🙂", "x" * MAX_NAME, "Tracelet.x", "tracelets"])
def test_any_name_a_person_would_use_is_kept(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", " ", "\n", "tracelet.x", "a\0b", "x" * (MAX_NAME + 1), "\ud800", None, 5, b"loss", ("a",)]
)
def test_a_name_that_could_not_be_given_back_is_refused(name: object) -> None:
    with pytest.raises(InvalidValue) as caught:
        check_name(name)
    assert caught.value.facts["name"] == name


def test_a_name_of_another_kind_of_str_becomes_a_plain_one() -> None:
    assert type(check_name(np.str_("loss"))) is str


# ---- params ------------------------------------------------------------------------------------------------------


class Color(enum.Enum):
    RED = "red"
    PAIR = (1, 2)


@dataclasses.dataclass
class Model:
    layers: int
    sizes: list[int]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.1, 0.1),
        (True, True),
        (3, 3),
        ("adam", "adam"),
        (None, "None"),
        (np.float64(0.5), 0.5),
        (np.int32(3), 3),
        (np.bool_(True), True),
        (np.array(3), 3),
        ([1, "a", None], '[1, "a", null]'),
        ((1, 2), "[1, 2]"),
        ({}, "{}"),
        ({3, 1, 2}, "[1, 2, 3]"),
        (np.arange(3), "[0, 1, 2]"),
        (Color.RED, "red"),
        (Color.PAIR, "PAIR"),
        (Path("/data"), "/data"),
        ([Path("/data")], '["/data"]'),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (int, "builtins.int"),
        (len, "builtins.len"),
        (2**70, str(2**70)),
        (-(2**63), -(2**63)),
        ([{1: {2}}], '[{"1": [2]}]'),
        ([{(1, 2): 3}], '[{"(1, 2)": 3}]'),
        ("", ""),
        ("a\udcff", "a\\udcff"),
        ([float("nan")], "[NaN]"),
        ([Model(2, [3])], '[{"layers": 2, "sizes": [3]}]'),
    ],
)
def test_a_param_is_a_scalar_or_readable(value: object, expected: object) -> None:
    (kept,) = flatten_params({"x": value}).values()
    assert kept == expected
    assert type(kept) is type(expected)


def test_nan_and_infinite_params_stay() -> None:
    kept = flatten_params({"a": float("nan"), "b": math.inf})
    assert math.isnan(float(kept["a"]))
    assert kept["b"] == math.inf


def test_nested_dicts_and_dotted_keys_are_the_same_keys() -> None:
    nested = {"model": {"num_layers": 2, "head": {"dim": 64}}, 7: {True: "x"}}
    dotted = {"model.num_layers": 2, "model.head.dim": 64, "7.True": "x"}
    assert flatten_params(nested) == flatten_params(dotted) == dotted


def test_an_argparse_namespace_and_a_dataclass_are_params() -> None:
    assert flatten_params(argparse.Namespace(lr=0.1, resume=None)) == {"lr": 0.1, "resume": "None"}
    assert flatten_params(Model(2, [3])) == flatten_params({"layers": 2, "sizes": [3]})
    assert flatten_params({"model": Model(2, [3])}) == {"model.layers": 2, "model.sizes": "[3]"}


def test_a_key_given_nested_and_dotted_is_refused_instead_of_losing_one() -> None:
    with pytest.raises(InvalidValue, match=r"param 'a\.b' is given twice"):
        flatten_params({"a.b": 1, "a": {"b": 2}})


def test_what_holds_itself_is_refused() -> None:
    mapping: dict[str, object] = {}
    mapping["a"] = {"b": mapping}
    listed: list[object] = []
    listed.append({"x": listed})
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for params in (mapping, {"x": listed}, {"x": deep}):
        with pytest.raises(InvalidValue):
            flatten_params(params)
    # Not with pytest's own traceback machinery, which would walk down all of it.
    while deep:
        deep = deep.pop()  # type: ignore[assignment]


def test_the_same_list_twice_does_not_hold_itself() -> None:
    shared = [1]
    assert flatten_params({"x": [shared, shared, {(1,): shared}]}) == {"x": '[[1], [1], {"(1,)": [1]}]'}


@pytest.mark.parametrize("params", [5, None, "a=1", [("a", 1)], {"": 1}, {"tracelet.x": 1}, {(1, 2): 3}, dict])
def test_what_is_no_params_is_refused(params: object) -> None:
    with pytest.raises(InvalidValue):
        flatten_params(params)


def test_a_param_of_10_mb_is_whole() -> None:
    text = "ä" * 5_000_000
    assert flatten_params({"x": text})["x"] == text
    assert json.loads(str(flatten_params({"x": list(range(100_000))})["x"])) == list(range(100_000))


def test_an_integer_of_5000_digits_is_written_somehow() -> None:
    assert int(str(flatten_params({"x": 10**5000})["x"]), 16) == 10**5000
    assert str(flatten_params({"x": [10**5000]})["x"]).startswith('["0x')


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=20,
)


@given(st.lists(JSON, min_size=1))
def test_a_list_can_be_read_back_from_its_json(value: list[object]) -> None:
    (text,) = flatten_params({"x": value}).values()
    assert isinstance(text, str)
    text.encode()
    assert json.loads(text) == value


# ---- tags --------------------------------------------------------------------------------------------------------


def test_tags_are_text() -> None:
    assert check_tags({"team": "ml", "n": 3, "ok": True, "where": Path("/x")}) == {
        "team": "ml",
        "n": "3",
        "ok": "True",
        "where": "/x",
    }


@pytest.mark.parametrize("tags", [None, ["a"], {"": "x"}, {"a": None}, {5: "x"}, {"tracelet.x": "y"}])
def test_what_is_no_tags_is_refused(tags: object) -> None:
    with pytest.raises(InvalidValue):
        check_tags(tags)
