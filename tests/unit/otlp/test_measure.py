"""What a body would become is known before it is decoded, and nothing makes the count fail."""

from __future__ import annotations

import random

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError

from tests.gateway_fakes import points_request
from tests.unit.otlp.test_decode import golden_bodies
from tracelet.otlp.decode import parse
from tracelet.otlp.measure import holds_more

PROTOBUF, JSON = "application/x-protobuf", "application/json; charset=utf-8"


def messages_in(message: object) -> int:
    """How many messages are below this one."""
    count = 0
    for field, value in message.ListFields():  # type: ignore[attr-defined]
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            inner = value if field.is_repeated else [value]
            count += sum(1 + messages_in(one) for one in inner)
    return count


def counted(signal: str, body: bytes) -> int:
    """The number that it counts, found by its own answers. Padded with a field nobody knows: short bodies pass."""
    padded = body + b"\xfa\x01" + bytes([0xFF, 0x7F]) + bytes(0x3FFF)
    low, high = 0, len(padded) // 2 - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if holds_more(signal, padded, PROTOBUF, middle) else (low, middle)
    return low


@pytest.mark.parametrize("signal", ["metrics", "logs", "traces"])
def test_every_message_is_counted_and_nothing_else(signal: str) -> None:
    for body in golden_bodies(signal):
        assert counted(signal, body) == messages_in(parse(signal, body, PROTOBUF))


def test_values_in_values_count_at_every_depth() -> None:
    value = b"\x08\x01"
    for _ in range(30):
        value = b"\x2a" + _length(b"\x0a" + _length(value))
    attribute = b"\x0a\x01a\x12" + _length(value)
    body = b"\x0a" + _length(b"\x0a" + _length(b"\x0a" + _length(attribute)))
    parsed = parse("metrics", body, PROTOBUF)
    assert messages_in(parsed) == 2 + 1 + 1 + 60
    assert counted("metrics", body) == 64


def _length(content: bytes) -> bytes:
    size, out = len(content), bytearray()
    while size > 127:
        out.append(size & 127 | 128)
        size >>= 7
    return bytes((*out, size)) + content


def test_lengths_and_tags_in_more_bytes_than_they_need_count_too() -> None:
    body = b"\x8a\x00\x80\x00" * 5000
    assert len(parse("metrics", body, PROTOBUF).resource_metrics) == 5000
    assert counted("metrics", body) == 5000


def test_the_densest_telemetry_we_know_is_far_below_one_message_in_eight_bytes() -> None:
    body = points_request(count=5000).SerializeToString()
    assert not holds_more("metrics", body, PROTOBUF, len(body) // 15)


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"\x0a\x00" * 1001, PROTOBUF),
        (b'{"resourceMetrics":[' + b"{}," * 1000 + b"{}]}", JSON),
        (b'{"x":[' + b"[]," * 1000 + b"[]]}", JSON),
        (("[" + "{}," * 1000 + "{}]").encode("utf-16"), JSON),
    ],
)
def test_one_more_than_the_limit_is_more(body: bytes, content_type: str) -> None:
    assert holds_more("metrics", body, content_type, 500)
    assert holds_more("metrics", body, content_type, 1000)
    assert not holds_more("metrics", body, content_type, 1010)


def test_a_body_too_short_to_hold_so_many_is_not_looked_at() -> None:
    assert not holds_more("metrics", b"\x0a\x00" * 1000, PROTOBUF, 1000)


@pytest.mark.parametrize("seed", range(3))
def test_damaged_bodies_are_counted_as_far_as_a_parser_gets(seed: int) -> None:
    chance = random.Random(seed)
    whole = [(signal, body) for signal in ("metrics", "logs", "traces") for body in golden_bodies(signal)]
    for _ in range(1000):
        signal, intact = chance.choice(whole)
        body = bytearray(intact)
        for _ in range(chance.randrange(1, 8)):
            body[chance.randrange(len(body))] = chance.randrange(256)
        if chance.random() < 0.3:
            del body[chance.randrange(len(body)) :]
        data = bytes(body)
        try:
            held = messages_in(parse(signal, data, PROTOBUF))
        except (DecodeError, ValueError):
            holds_more(signal, data, PROTOBUF, 0)  # it only must not fail
            continue
        # A message that stands there twice is joined to one, and a group may hide what a parser doesn't keep.
        assert held == 0 or holds_more(signal, data, PROTOBUF, min(held, len(data) // 2 - 1) - 1)
