"""Log events read back: each to the record it was, and values that came in pieces put together again."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from tracelet.otlp import semconv
from tracelet.otlp.arrival import AttemptEnd, Piece
from tracelet.otlp.decode_resource import Owner, Tally, attribute_map
from tracelet.records import (
    FAILED,
    FINISHED,
    KILLED,
    ArtifactLogged,
    ErrorInfo,
    ParamsLogged,
    Record,
    RunStarted,
    Scalar,
    TagsSet,
)

__all__ = ["ENDS", "Events", "error_of", "text_of", "whole", "without_cut"]

ENDS = (FINISHED, FAILED, KILLED)
_OF_THE_EVENT = (semconv.EVENT, semconv.EVENT_PART, semconv.EVENT_PARTS)
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_CUT = "\0"  # before the name of a value of which only the beginning is there
_PREFIXES = {semconv.EVENT_PARAMS: semconv.PARAM_PREFIX, semconv.EVENT_TAGS: semconv.TAG_PREFIX}
_EVENTS = (semconv.EVENT_STARTED, semconv.EVENT_ARTIFACT, semconv.EVENT_ENDED, *_PREFIXES)
_MAX_PIECES = 1_000_000


def whole(event: str, key: str, text: str, time_unix_nano: int) -> Record | None:
    """The record that a value makes which came in pieces; `key` is the attribute it is the value of.

    None where it makes none of its own: what phases, artifacts and ends have too long for an attribute.
    """
    if event == semconv.EVENT_STARTED:
        tag = key.removeprefix(semconv.MLFLOW_TAG_PREFIX)
        return (
            RunStarted(time_unix_nano, "", {key: text}, {})
            if tag == key
            else RunStarted(time_unix_nano, "", {}, {tag: text})
        )
    prefix = _PREFIXES.get(event)
    if prefix is None or not key.startswith(prefix):
        return None
    name = key.removeprefix(prefix)
    return (
        ParamsLogged(time_unix_nano, {name: text})
        if prefix == semconv.PARAM_PREFIX
        else TagsSet(time_unix_nano, {name: text})
    )


def without_cut(values: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """`values` without those that are only the beginning of a longer one, and without the digests that say so."""
    cut = {key.removeprefix(semconv.DIGEST_PREFIX) for key in values if key.startswith(semconv.DIGEST_PREFIX)}
    if not cut:
        return dict(values)
    return {
        key: value
        for key, value in values.items()
        if not key.startswith(semconv.DIGEST_PREFIX) and key.removeprefix("tracelet.") not in cut
    }


def error_of(values: Mapping[str, Scalar]) -> ErrorInfo | None:
    """The exception that `exception.*` attributes tell of."""
    if semconv.EXCEPTION_TYPE not in values:
        return None
    kind, message, trace = (
        str(values.get(name, ""))
        for name in (semconv.EXCEPTION_TYPE, semconv.EXCEPTION_MESSAGE, semconv.EXCEPTION_STACKTRACE)
    )
    return ErrorInfo(kind, message, trace)


class Events:
    """The log records of one Resource; `records`, `pieces` and the rest hold what they said."""

    def __init__(self, owner: Owner, tally: Tally) -> None:
        self._owner = owner
        self._tally = tally
        self.records: list[Record] = []
        self.pieces: tuple[Piece, ...] = ()
        self.times: list[int] = []
        self.started: int | None = None
        self.ended: AttemptEnd | None = None

    def take(self, records: Iterable[Any]) -> None:
        """All records of scope `tracelet`, in their order."""
        in_order: list[Record | tuple[str, int, dict[str, Scalar]]] = []
        values_of = _Pieces(self._tally)
        for record in records:
            values = attribute_map(record.attributes)
            event = record.event_name or str(values.get(semconv.EVENT, ""))
            time = record.time_unix_nano or record.observed_time_unix_nano
            if semconv.CHUNK_KEY not in values:
                if event in _EVENTS:  # others are not even kept till the end: there may be a million of them
                    in_order.append((event, time, values))
                else:
                    self._tally.add_foreign("log record that is no event of ours")
                continue
            piece = _piece(event, time, record, values)
            if piece is None:
                self._tally.add_foreign("piece that is none")
                continue
            self.times.append(time)
            text = values_of.add(piece)
            made = None if text is None else whole(event, piece.key, text, time)
            if made is not None:
                in_order.append(made)
        self.pieces += values_of.left()
        for each in in_order:
            if isinstance(each, tuple):
                self._one(*each, values_of.texts)
            else:
                self.records.append(each)

    def _one(self, event: str, time: int, values: dict[str, Scalar], texts: Mapping[tuple[str, str], str]) -> None:
        """One of `_EVENTS`."""
        for name in _OF_THE_EVENT:
            values.pop(name, None)
        made: Record | None
        if event in _PREFIXES:
            prefix = _PREFIXES[event]
            own = {k.removeprefix(prefix): v for k, v in without_cut(values).items() if k.startswith(prefix)}
            made = (
                ParamsLogged(time, own)
                if event == semconv.EVENT_PARAMS
                else TagsSet(time, {key: text_of(value) for key, value in own.items()})
            )
            if not own:  # all its values come in pieces, or it is of a later minor version
                self.times.append(time)
                return
        elif event == semconv.EVENT_STARTED:
            self.started = time
            made = self._run_started(time, without_cut(values))
        elif event == semconv.EVENT_ARTIFACT:
            made = _artifact(time, _completed(values, texts))
            if made is None:
                self._tally.add_foreign("artifact without a usable name")
                return
        else:
            state = values.get(semconv.STATE)
            if state not in ENDS:
                self._tally.add_foreign("end without a state")
                return
            self.times.append(time)
            self.ended = AttemptEnd(str(state), time, error_of(_completed(values, texts)), "event")
            return
        self.times.append(time)
        self.records.append(made)

    def _run_started(self, time: int, values: Mapping[str, Scalar]) -> RunStarted:
        prefix = semconv.MLFLOW_TAG_PREFIX
        return RunStarted(
            time,
            self._owner.run.run_name,
            {key: value for key, value in values.items() if not key.startswith(prefix)},
            {key.removeprefix(prefix): text_of(value) for key, value in values.items() if key.startswith(prefix)},
        )


class _Pieces:
    """The values of one request that came in pieces."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._begun: dict[tuple[str, str, str, str, int], dict[int, Piece]] = {}
        self.texts: dict[tuple[str, str], str] = {}  # key and digest -> a value that is whole

    def add(self, piece: Piece) -> str | None:
        """The value, once this piece makes it whole."""
        where = (piece.event, piece.span_id, piece.key, piece.digest, piece.count)
        pieces = self._begun.setdefault(where, {})
        pieces.setdefault(piece.index, piece)
        if len(pieces) < piece.count:
            return None
        del self._begun[where]
        text = "".join(pieces[index].text for index in range(1, piece.count + 1))
        if hashlib.sha256(text.encode()).hexdigest() != piece.digest:
            self._tally.add_foreign("pieces of another digest", piece.count)
            return None
        self.texts[piece.key, piece.digest] = text
        return text

    def left(self) -> tuple[Piece, ...]:
        """The pieces whose others are in other requests, of values that make a record."""
        pieces = (piece for begun in self._begun.values() for piece in begun.values())
        return tuple(piece for piece in pieces if whole(piece.event, piece.key, "", 0) is not None)


def _piece(event: str, time: int, record: Any, values: Mapping[str, Scalar]) -> Piece | None:
    key, digest = values[semconv.CHUNK_KEY], values.get(semconv.CHUNK_DIGEST)
    index, count = values.get(semconv.CHUNK_INDEX), values.get(semconv.CHUNK_COUNT)
    if not isinstance(key, str) or not isinstance(digest, str) or record.body.WhichOneof("value") != "string_value":
        return None
    if type(index) is not int or type(count) is not int or not 1 <= index <= count <= _MAX_PIECES:
        return None
    hexadecimal = _digest(digest)
    if hexadecimal is None:
        return None
    return Piece(event, key, index, count, hexadecimal, record.body.string_value, time, record.span_id.hex())


def _digest(text: Scalar | None) -> str | None:
    found = _DIGEST.fullmatch(text) if isinstance(text, str) else None
    return None if found is None else found[1]


def _completed(values: Mapping[str, Scalar], texts: Mapping[tuple[str, str], str]) -> dict[str, Scalar]:
    """`values` with those whole whose pieces are in this request; of others their beginning stays."""
    out: dict[str, Scalar] = {}
    for key, value in values.items():
        if not key.startswith(semconv.DIGEST_PREFIX):
            digest = _digest(values.get(semconv.DIGEST_PREFIX + key.removeprefix("tracelet.")))
            out[key] = value if digest is None else texts.get((key, digest), value)
            if digest is not None and (key, digest) not in texts:
                out[_CUT + key] = True
    return out


def _artifact(time: int, values: Mapping[str, Scalar]) -> ArtifactLogged | None:
    path, size = values.get(semconv.ARTIFACT_NAME), values.get(semconv.ARTIFACT_SIZE)
    if not isinstance(path, str) or _CUT + semconv.ARTIFACT_NAME in values or not _inside(path):
        return None
    uri = values.get(semconv.ARTIFACT_URI)
    usable = isinstance(uri, str) and _CUT + semconv.ARTIFACT_URI not in values
    return ArtifactLogged(
        time_unix_nano=time,
        path=path,
        source="",
        stored=None,
        size=size if type(size) is int and size >= 0 else 0,
        sha256=_digest(values.get(semconv.ARTIFACT_DIGEST)),
        media_type=text_of(values.get(semconv.ARTIFACT_MEDIA_TYPE, "")),
        uri=str(uri) if usable else None,
    )


def _inside(path: str) -> bool:
    """Whether a name stays inside the run's artifacts, whoever joins it to a folder."""
    return bool(path) and "\0" not in path and path[0] != "/" and ".." not in path.split("/")


def text_of(value: Scalar) -> str:
    """A tag's value as text, whatever came."""
    return value if isinstance(value, str) else str(value)
