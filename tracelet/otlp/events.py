"""Log events: what a run did, as OTLP LogRecords that every log backend takes and a person can read.

Loki refuses a record with more than 128 entries or 64 kB, so one record of ours may become several events; a value
that is too long for an attribute stands there as its beginning, and whole in the bodies of chunk events.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from tracelet.otlp import semconv
from tracelet.otlp.encode import attributes
from tracelet.otlp.encode_points import wire_text
from tracelet.records import (
    FINISHED,
    ArtifactLogged,
    AttemptEnded,
    ParamsLogged,
    RankEnded,
    RunInfo,
    RunStarted,
    Scalar,
    TagsSet,
)

if TYPE_CHECKING:
    from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord

__all__ = ["Position", "digest_name", "digest_of", "events_of", "in_pieces", "is_long", "shortened"]

_BODY_CHARACTERS = 1_000


@dataclass(frozen=True, slots=True)
class Position:
    """Where in the run's trace an event or span stands."""

    trace_id: str
    span_id: str


def digest_of(value: str) -> str:
    """`sha256:` and the digest of a text, as it goes out in UTF-8."""
    return "sha256:" + hashlib.sha256(wire_text(value).encode()).hexdigest()


def digest_name(name: str) -> str:
    """The attribute that holds the digest of attribute `name`."""
    return semconv.DIGEST_PREFIX + name.removeprefix("tracelet.")


def is_long(value: Scalar, limit: int = semconv.VALUE_MAX_BYTES) -> bool:
    """Whether a value is too long for an attribute (`limit` bytes of UTF-8)."""
    return isinstance(value, str) and len(value) * 4 > limit and len(wire_text(value).encode()) > limit


def shortened(name: str, value: str) -> dict[str, Scalar]:
    """The two attributes that stand for a value too long for one: its beginning, and the digest of the whole."""
    return {
        name: value[: semconv.VALUE_KEPT_CHARACTERS],
        digest_name(name): digest_of(value),
    }


def events_of(
    record: RunStarted | ParamsLogged | TagsSet | ArtifactLogged | AttemptEnded, run: RunInfo, where: Position
) -> list[LogRecord]:
    """The log events of one record, in the order in which they are to be read."""
    if isinstance(record, RunStarted):
        body = f"run {record.run_name} of {run.project} / {run.experiment_name} started"
        # With the tags, whoever reads OTLP alone can make a run in MLflow that looks native.
        own_tags = {semconv.MLFLOW_TAG_PREFIX + key: value for key, value in record.mlflow_tags.items()}
        values: Mapping[str, Scalar] = {**record.environment, **own_tags}
        return _events(semconv.EVENT_STARTED, record.time_unix_nano, values, body, where)
    if isinstance(record, ParamsLogged):
        values = {semconv.PARAM_PREFIX + key: value for key, value in record.params.items()}
        return _events(semconv.EVENT_PARAMS, record.time_unix_nano, values, "params:", where, list_values=True)
    if isinstance(record, TagsSet):
        values = {semconv.TAG_PREFIX + key: value for key, value in record.tags.items()}
        return _events(semconv.EVENT_TAGS, record.time_unix_nano, values, "tags:", where, list_values=True)
    if isinstance(record, ArtifactLogged):
        body = f"artifact {record.path} ({record.size:,} bytes, {record.media_type})"
        return _events(semconv.EVENT_ARTIFACT, record.time_unix_nano, _artifact(record), body, where)
    return _ended(record, run, where) if record.speaks else []


def _artifact(record: ArtifactLogged) -> dict[str, Scalar]:
    values: dict[str, Scalar] = {
        semconv.ARTIFACT_NAME: record.path,
        semconv.ARTIFACT_URI: PurePath(record.source).as_uri() if record.uri is None else record.uri,
        semconv.ARTIFACT_SIZE: record.size,
        semconv.ARTIFACT_MEDIA_TYPE: record.media_type,
    }
    if record.sha256 is not None:
        values[semconv.ARTIFACT_DIGEST] = f"sha256:{record.sha256}"
    return values


def _ended(record: AttemptEnded, run: RunInfo, where: Position) -> list[LogRecord]:
    seconds = (record.end_unix_nano - record.start_unix_nano) / 1e9
    body = f"run {run.run_name} {record.status} after {seconds:.1f} s"
    values: dict[str, Scalar] = {semconv.STATE: record.status}
    if record.error is not None:
        body += f": {record.error.type}: {record.error.message}"
        values[semconv.EXCEPTION_TYPE] = record.error.type
        values[semconv.EXCEPTION_MESSAGE] = record.error.message
        values[semconv.EXCEPTION_STACKTRACE] = record.error.stacktrace
    if record.status != FINISHED:
        values[semconv.ERROR_TYPE] = error_type(record)
    return _events(semconv.EVENT_ENDED, record.end_unix_nano, values, body, where, failed=record.status != FINISHED)


def error_type(ended: AttemptEnded | RankEnded) -> str:
    """`error.type` of an attempt or a rank that did not finish: the exception's class, else the status."""
    return ended.status if ended.error is None else ended.error.type


def _events(
    name: str,
    time_unix_nano: int,
    values: Mapping[str, Scalar],
    body: str,
    where: Position,
    *,
    failed: bool = False,
    list_values: bool = False,
) -> list[LogRecord]:
    short: dict[str, Scalar] = {}
    long: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, str) and is_long(value):
            short.update(shortened(key, value))
            long[key] = value
        else:
            short[key] = value
    groups = list(_groups(short)) or [{}]
    out = []
    for part, group in enumerate(groups, 1):
        numbered: dict[str, Scalar] = (
            {semconv.EVENT_PART: part, semconv.EVENT_PARTS: len(groups)} if len(groups) > 1 else {}
        )
        text = f"{body} {_listed(group)}" if list_values else body
        out.append(_event(name, time_unix_nano, numbered | group, _cut(text), where, failed=failed))
    return out + in_pieces(name, time_unix_nano, long, where, failed=failed)


def in_pieces(
    name: str, time_unix_nano: int, values: Mapping[str, str], where: Position, *, failed: bool = False
) -> list[LogRecord]:
    """Events that hold texts too long for an attribute, each whole, in the order of its pieces."""
    out = []
    for key, value in values.items():
        pieces = list(_chunks(value))
        for index, piece in enumerate(pieces, 1):
            chunk: dict[str, Scalar] = {
                semconv.CHUNK_KEY: key,
                semconv.CHUNK_INDEX: index,
                semconv.CHUNK_COUNT: len(pieces),
                semconv.CHUNK_DIGEST: digest_of(value),
            }
            out.append(_event(name, time_unix_nano, chunk, piece, where, failed=failed))
    return out


def _event(
    name: str, time_unix_nano: int, values: Mapping[str, Scalar], body: str, where: Position, *, failed: bool
) -> LogRecord:
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue
    from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, SeverityNumber

    return LogRecord(
        time_unix_nano=time_unix_nano,
        # When we observed it is when it was logged; the time of sending would differ between a batch and its repeat.
        observed_time_unix_nano=time_unix_nano,
        severity_number=SeverityNumber.SEVERITY_NUMBER_ERROR if failed else SeverityNumber.SEVERITY_NUMBER_INFO,
        severity_text="ERROR" if failed else "INFO",
        body=AnyValue(string_value=wire_text(body)),
        attributes=attributes({semconv.EVENT: name, **values}),
        flags=1,  # sampled: the trace it names is kept
        trace_id=bytes.fromhex(where.trace_id),
        span_id=bytes.fromhex(where.span_id),
        event_name=name,
    )


def _groups(values: Mapping[str, Scalar]) -> Iterator[dict[str, Scalar]]:
    """`values` in groups of at most 50 keys and 16 kB."""
    group: dict[str, Scalar] = {}
    size = 0
    for key, value in values.items():
        cost = len(wire_text(key).encode()) + (len(wire_text(value).encode()) if isinstance(value, str) else 8)
        if group and (len(group) == semconv.EVENT_MAX_ATTRIBUTES or size + cost > semconv.EVENT_MAX_BYTES):
            yield group
            group, size = {}, 0
        group[key] = value
        size += cost
    if group:
        yield group


def _chunks(value: str) -> Iterator[str]:
    """`value` in pieces of at most 32 kB of UTF-8, cut between characters."""
    data = wire_text(value).encode()
    start = 0
    while start < len(data):
        end = min(start + semconv.CHUNK_MAX_BYTES, len(data))
        while end < len(data) and data[end] & 0xC0 == 0x80:  # inside a character
            end -= 1
        yield data[start:end].decode()
        start = end


def _listed(values: Mapping[str, Scalar]) -> str:
    names = (
        (key.removeprefix(semconv.PARAM_PREFIX).removeprefix(semconv.TAG_PREFIX), value)
        for key, value in values.items()
        if not key.startswith(semconv.DIGEST_PREFIX)
    )
    return ", ".join(f"{key}={value}" for key, value in names)


def _cut(text: str) -> str:
    # For reading only: every value is in the attributes, whole or as a digest with its chunks.
    return text if len(text) <= _BODY_CHARACTERS else text[: _BODY_CHARACTERS - 2] + " …"
