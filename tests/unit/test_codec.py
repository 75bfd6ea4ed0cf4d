"""Frames: every record comes back as it was, what is newer is read or passed over, what is damaged is named."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracelet import codec, records
from tracelet.errors import SpoolFormatError
from tracelet.records import ErrorInfo, MetricNamed, ParamsLogged, WriterEnded

TEXT = st.text(st.characters(exclude_categories=()))  # lone surrogates too
SCALARS = TEXT | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)
FIELDS: dict[Any, st.SearchStrategy[Any]] = {
    "str": TEXT,
    "int": st.integers(-(2**63), 2**64),
    "str | None": st.none() | TEXT,
    "int | None": st.none() | st.integers(0, 2**64 - 1),
    "ErrorInfo | None": st.none() | st.builds(ErrorInfo, TEXT, TEXT, TEXT),
    "Mapping[str, Scalar]": st.dictionaries(TEXT, SCALARS),
    "Mapping[str, str]": st.dictionaries(TEXT, TEXT),
}


TIMES = st.integers(0, 2**64 - 1)


def any_of(kind: type[Any]) -> st.SearchStrategy[Any]:
    fields = {
        field.name: TIMES if field.name.endswith("_unix_nano") and field.type == "int" else FIELDS[field.type]
        for field in dataclasses.fields(kind)
    }
    return st.builds(kind, **fields)


@given(st.one_of(*(any_of(kind) for kind in codec.KINDS.values())))
def test_every_record_comes_back_as_it_was(record: Any) -> None:
    kind, payload = codec.encode(record)
    assert codec.decode(kind, payload) == record


@given(st.one_of(*(any_of(kind) for kind in codec.KINDS.values())))
def test_a_payload_is_ascii_json_that_anything_can_read(record: Any) -> None:
    _, payload = codec.encode(record)
    assert isinstance(json.loads(payload.decode("ascii")), dict)


def test_the_numbers_of_the_kinds_are_those_of_the_first_release() -> None:
    assert {number: kind.__name__ for number, kind in codec.KINDS.items()} == {
        1: "WriterOpened",
        2: "RunStarted",
        3: "MetricNamed",
        4: "ParamsLogged",
        5: "TagsSet",
        6: "SpanStarted",
        7: "SpanEnded",
        8: "ArtifactLogged",
        9: "FlushAsked",
        10: "WriterEnded",
        11: "SpansReceived",
        12: "StateNoted",
    }
    assert all(codec.kind_of(kind) == number for number, kind in codec.KINDS.items())


def test_a_frame_is_what_it_was_in_the_first_release() -> None:
    record = WriterEnded(5, "FAILED", "with", ErrorInfo("ValueError", "nö", "..."), 1)
    assert codec.encode(record) == (
        10,
        b'{"error":{"message":"n\\u00f6","stacktrace":"...","type":"ValueError"},"exit_code":1,"seen_by":"with",'
        b'"status":"FAILED","time_unix_nano":5}',
    )


def test_nan_and_infinities_are_pythons_own_tokens() -> None:
    kind, payload = codec.encode(ParamsLogged(1, {"a": float("nan"), "b": float("inf"), "c": float("-inf")}))
    assert payload == b'{"params":{"a":NaN,"b":Infinity,"c":-Infinity},"time_unix_nano":1}'
    assert repr(codec.decode(kind, payload)) == repr(
        ParamsLogged(1, {"a": float("nan"), "b": float("inf"), "c": float("-inf")})
    )


def test_a_field_that_a_newer_minor_version_added_is_passed_over() -> None:
    assert codec.decode(3, b'{"metric_id":1,"name":"loss","unit":"s"}') == MetricNamed(1, "loss")


def test_a_kind_that_a_newer_version_added_is_passed_over() -> None:
    assert codec.decode(200, b"anything") is None


@pytest.mark.parametrize(
    "payload", [b"", b"{", b"[]", b"5", b"null", b'{"metric_id":1}', b'"text"', b"\xff", b'{"error":5,"metric_id":1}']
)
def test_a_payload_that_is_not_its_kind_is_named(payload: bytes) -> None:
    with pytest.raises(SpoolFormatError, match=r"a frame of kind 3 \(MetricNamed\) can't be read"):
        codec.decode(3, payload)


@pytest.mark.parametrize("time", [-1, 2**64])
def test_a_time_that_no_destination_has_room_for_is_named(time: int) -> None:
    kind, payload = codec.encode(records.TagsSet(time, {"a": "b"}))
    with pytest.raises(SpoolFormatError, match=f"time_unix_nano is {time}, which is no time in nanoseconds"):
        codec.decode(kind, payload)


def test_every_record_that_is_written_has_a_kind() -> None:
    made_by_the_shipper = {records.AttemptEnded, records.RankEnded, records.Again}
    assert set(records.Record.__args__) - made_by_the_shipper == set(codec.KINDS.values())


def test_every_field_of_a_record_is_json_or_handled() -> None:
    for kind in codec.KINDS.values():
        assert set(get_type_hints(kind)) == {field.name for field in dataclasses.fields(kind)}
        assert {field.type for field in dataclasses.fields(kind)} <= set(FIELDS)
