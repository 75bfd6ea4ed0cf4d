"""How many messages a request's body would become: counted before it is decoded, as far as a limit and no farther.

A message of two bytes takes sixty and more once it is decoded, an empty object of JSON three hundred: sixteen kilobytes
of gzip become a gigabyte. So the bytes of a body say little of what it costs.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tracelet.otlp.decode_body import is_json, message_of

__all__ = ["holds_more"]

# A tag with its wire type -> the same for the message that stands there.
_Table = dict[int, Any]

_LEN = 2  # the wire type of what has a length: texts, bytes, messages
# Bytes behind a tag of other wire types. Of a group they are its two ends: what lies between is no message to a parser,
# and counts here all the same.
_FIXED = {1: 8, 5: 4, 3: 0, 4: 0}


def holds_more(signal: str, body: bytes, content_type: str, limit: int) -> bool:
    """Whether `body` holds more than `limit` messages (of JSON: objects and lists, those in texts too).

    A short body isn't looked at, since each of them takes two bytes. A malformed one is counted up to where it is
    malformed: no parser gets beyond that either.

    Cost: 0.4 us a field, as far as the limit; nothing for a body below 2 * `limit` bytes.

    Examples:
        >>> from tracelet.otlp.measure import holds_more
        >>> holds_more("logs", b"\\n\\0" * 11, "application/x-protobuf", 10)
        True
        >>> holds_more("logs", b'{"resourceLogs": [{}, {}]}', "application/json", 10)
        False
    """
    if len(body) <= 2 * limit:
        return False
    if is_json(content_type):
        return body.count(b"{") + body.count(b"[") > limit
    return _holds_more(body, _table(signal), limit)


@cache
def _table(signal: str) -> _Table:
    return _messages_in(message_of(signal).DESCRIPTOR, {})


def _messages_in(descriptor: Any, known: dict[str, _Table]) -> _Table:
    table = known.get(descriptor.full_name)
    if table is None:
        table = known[descriptor.full_name] = {}  # before its fields: a value may hold values
        for field in descriptor.fields:
            if field.message_type is not None:
                table[field.number << 3 | _LEN] = _messages_in(field.message_type, known)
    return table


def _holds_more(body: bytes, table: _Table, limit: int) -> bool:
    at, end, count = 0, len(body), 0
    outer: list[tuple[_Table, int]] = []
    try:
        while True:
            while at >= end:
                if at > end or not outer:
                    return False
                table, end = outer.pop()
            tag = body[at]
            at += 1
            if tag > 127:
                tag, at = _varint(body, at - 1)
            kind = tag & 7
            if kind == _LEN:
                length = body[at]
                at += 1
                if length > 127:
                    length, at = _varint(body, at - 1)
                inner = table.get(tag)
                if inner is None:
                    at += length
                    continue
                count += 1
                if count > limit:
                    return True
                outer.append((table, end))
                table, end = inner, at + length
                if end > outer[-1][1]:
                    return False
            elif kind == 0:
                _, at = _varint(body, at)
            else:
                at += _FIXED[kind]
    except (IndexError, KeyError):  # it is cut off, or of no wire type
        return False


def _varint(body: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = body[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
