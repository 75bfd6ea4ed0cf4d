"""Spans of a run as the SDK's ReadableSpans, encoded by the SDK's own encoder: there are few of them.

A `ReadableSpan` knows no limit of 128 attributes, where the SDK's own spans evict the first for the 129th.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tracelet import ids
from tracelet.otlp import semconv
from tracelet.otlp.encode_points import wire_text
from tracelet.otlp.events import digest_name, digest_of, error_type, is_long, shortened
from tracelet.records import FINISHED, AttemptEnded, ErrorInfo, RankEnded, RunInfo, Scalar, SpanStarted, WriterOpened

if TYPE_CHECKING:
    from opentelemetry.proto.trace.v1.trace_pb2 import Span
    from opentelemetry.trace import Link, SpanContext

__all__ = ["ended_span", "final_spans", "too_long"]

_INT64_TEXT_LIMIT = 2**63
_ERROR_TYPE_CHARACTERS = 1_000  # a class's name; the exception beside it has the whole


def ended_span(run: RunInfo, opened: WriterOpened, start: SpanStarted, end: int, error: ErrorInfo | None) -> Span:
    """A phase that has ended, well or by an exception."""
    return _span(
        run,
        opened,
        start.name,
        span_id=start.span_id,
        parent=start.parent_span_id,
        times=(start.start_unix_nano, max(end, start.start_unix_nano)),  # over a clock that was set back meanwhile
        values=_params(start.attributes),
        error=error,
        error_type=None if error is None else error.type,
    )


def final_spans(
    run: RunInfo, opened: WriterOpened, ended: AttemptEnded | RankEnded, traceparent: str | None
) -> list[Span]:
    """The spans that an end lets out: phases still open, and the root span (`rank N` for other ranks)."""
    kind = error_type(ended) if ended.status != FINISHED else None
    root = ids.root_span_id(run.run_id, opened.attempt_key)
    spans = [
        _span(
            run,
            opened,
            phase.name,
            span_id=phase.span_id,
            parent=phase.parent_span_id,
            times=(phase.start_unix_nano, max(ended.end_unix_nano, phase.start_unix_nano)),
            values=_params(phase.attributes),
            # Even in a run that finished, a phase without an end went wrong somewhere.
            error_type=kind or "unfinished",
        )
        for phase in ended.open_spans
    ]
    values: dict[str, Scalar] = {semconv.STATE: ended.status}
    if opened.rank == 0 and isinstance(ended, AttemptEnded):
        values |= _params({semconv.TAG_PREFIX + key: value for key, value in ended.tags.items()})
        values |= _params({semconv.PARAM_PREFIX + key: value for key, value in ended.params.items()})
    spans.append(
        _span(
            run,
            opened,
            f"run {run.run_name}" if opened.rank == 0 else f"rank {opened.rank}",
            span_id=ids.rank_span_id(run.run_id, opened.attempt_key, opened.rank),
            parent=None if opened.rank == 0 else root,
            times=(ended.start_unix_nano, ended.end_unix_nano),
            values=values,
            error=ended.error,
            error_type=kind,
            links=_links(traceparent) if opened.rank == 0 else (),
        )
    )
    return spans


def too_long(start: SpanStarted, error: ErrorInfo | None) -> dict[str, str]:
    """What of a phase does not stand on its span whole, by attribute; log events have it."""
    on_span = _params(start.attributes)
    texts = {key: value if isinstance(value, str) else str(value) for key, value in start.attributes.items()}
    lost = {k: text for k, text in texts.items() if k not in on_span or digest_name(k) in on_span}
    if error is not None:
        lost |= {key: text for key, text in _exception_texts(error).items() if _is_cut(text)}
    return lost


def _params(params: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Params, tags or a phase's attributes: whole up to 256 kB in all, then beginnings and digests, then counted.

    The log events have each of them whole, whatever happens here.
    """
    values: dict[str, Scalar] = {}
    size = omitted = 0
    for name, value in params.items():
        limit = semconv.VALUE_MAX_BYTES if size < semconv.SPAN_PARAMS_MAX_BYTES else semconv.VALUE_KEPT_CHARACTERS
        entry = shortened(name, value) if isinstance(value, str) and is_long(value, limit) else {name: value}
        cost = sum(len(wire_text(k)) + len(wire_text(str(v)).encode()) for k, v in entry.items())
        if size + cost > semconv.SPAN_PARAMS_CUT_MAX_BYTES:
            omitted += 1
            continue
        values |= entry
        size += cost
    if omitted:
        values[semconv.PARAMS_OMITTED] = omitted
    return values


def _span(
    run: RunInfo,
    opened: WriterOpened,
    name: str,
    *,
    span_id: str,
    parent: str | None,
    times: tuple[int, int],
    values: Mapping[str, Scalar],
    error: ErrorInfo | None = None,
    error_type: str | None = None,
    links: Sequence[Link] = (),
) -> Span:
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import Status, StatusCode

    trace = ids.trace_id(run.run_id, opened.attempt_key)
    attributes = {wire_text(key): _wire(value) for key, value in values.items()}
    if error_type is not None:
        attributes[semconv.ERROR_TYPE] = wire_text(error_type)[:_ERROR_TYPE_CHARACTERS]
        description = error_type if error is None else f"{error.type}: {error.message}"
        status = Status(StatusCode.ERROR, wire_text(description)[:1_000])
    else:
        status = Status(StatusCode.UNSET)
    readable = ReadableSpan(
        name=wire_text(name),
        context=_context(trace, span_id),
        parent=_context(trace, parent) if parent else None,
        resource=Resource.get_empty(),  # the load has the real one
        attributes=attributes,
        events=() if error is None else (_exception(error, times[1]),),
        links=links,
        status=status,
        start_time=times[0],
        end_time=times[1],
    )
    span: Span = encode_spans([readable]).resource_spans[0].scope_spans[0].spans[0]
    return span


def _wire(value: Scalar) -> Scalar:
    if isinstance(value, str):
        return wire_text(value)
    if isinstance(value, int) and not -_INT64_TEXT_LIMIT <= value < _INT64_TEXT_LIMIT:
        return str(value)
    return value


def _context(trace_id: str, span_id: str, *, remote: bool = False) -> SpanContext:
    from opentelemetry.trace import SpanContext, TraceFlags

    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=remote, trace_flags=TraceFlags(1))


def _exception(error: ErrorInfo, time: int) -> Any:
    from opentelemetry.sdk.trace import Event

    values: dict[str, str] = {}
    for key, text in _exception_texts(error).items():
        values[key] = wire_text(text)
        if _is_cut(text):
            # A stack trace says most at its end, a message at its beginning.
            kept = semconv.EXCEPTION_KEPT_CHARACTERS
            values[key] = wire_text(text[-kept:] if key == semconv.EXCEPTION_STACKTRACE else text[:kept])
            values[digest_name(key)] = digest_of(text)
    return Event(semconv.EXCEPTION_EVENT, values, time)


def _exception_texts(error: ErrorInfo) -> dict[str, str]:
    return {
        semconv.EXCEPTION_TYPE: error.type,
        semconv.EXCEPTION_MESSAGE: error.message,
        semconv.EXCEPTION_STACKTRACE: error.stacktrace,
    }


def _is_cut(text: str) -> bool:
    return is_long(text, semconv.EXCEPTION_MAX_BYTES)


def _links(traceparent: str | None) -> tuple[Link, ...]:
    """The link to the caller that a W3C `traceparent` names; none if it is missing or malformed."""
    if not traceparent:
        return ()
    from opentelemetry.trace import Link

    parts = traceparent.strip().split("-")
    try:
        if len(parts) < 4 or (len(parts[1]), len(parts[2])) != (32, 16):
            return ()
        context = _context(parts[1], parts[2], remote=True)
    except ValueError:
        return ()
    return (Link(context),) if context.is_valid else ()
