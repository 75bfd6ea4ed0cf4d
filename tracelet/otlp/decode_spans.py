"""Spans read back: they go on as they are, and the root span's params, tags and end are told from it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from tracelet import ids
from tracelet.otlp import semconv
from tracelet.otlp.arrival import AttemptEnd
from tracelet.otlp.decode_events import ENDS, error_of, text_of, without_cut
from tracelet.otlp.decode_resource import Owner, attribute_map
from tracelet.records import ErrorInfo, ParamsLogged, Record, RunStarted, Scalar, SpansReceived, TagsSet

__all__ = ["Spans"]


class Spans:
    """The spans of one Resource; `records`, `started` and `ended` hold what they said."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._root = bytes.fromhex(ids.root_span_id(owner.run.run_id, owner.attempt_key))
        self._trace = bytes.fromhex(ids.trace_id(owner.run.run_id, owner.attempt_key))
        self.records: list[Record] = []
        self.times: list[int] = []
        self.started: int | None = None
        self.ended: AttemptEnd | None = None

    def take(self, resource_spans: Any) -> None:
        """Everything below a run's Resource is the run's, whatever its scope: instrumented libraries' spans too."""
        self.times += (
            span.start_time_unix_nano or span.end_time_unix_nano
            for scope in resource_spans.scope_spans
            for span in scope.spans
        )
        self.records.append(
            SpansReceived(
                min(filter(None, self.times), default=0), base64.b64encode(resource_spans.SerializeToString()).decode()
            )
        )
        for scope in resource_spans.scope_spans:
            for span in scope.spans:
                if self._owner.rank == 0 and span.span_id == self._root and span.trace_id == self._trace:
                    self._attempt(span)

    def _attempt(self, span: Any) -> None:
        """The span of the attempt itself. One rank's end is not the attempt's."""
        values = attribute_map(span.attributes)
        end = span.end_time_unix_nano
        self.started = span.start_time_unix_nano or None
        state = values.get(semconv.STATE)
        if state in ENDS and end:
            self.ended = AttemptEnd(str(state), end, _exception(span), "span")
        for link in span.links:
            caller = f"00-{link.trace_id.hex()}-{link.span_id.hex()}-{link.flags & 0xFF:02x}"
            self.records.append(
                RunStarted(span.start_time_unix_nano, self._owner.run.run_name, {}, {}, traceparent=caller)
            )
        whole = without_cut(values)
        params, tags = _below(whole, semconv.PARAM_PREFIX), _below(whole, semconv.TAG_PREFIX)
        if params:
            self.records.append(ParamsLogged(end, params))
        if tags:
            self.records.append(TagsSet(end, {key: text_of(value) for key, value in tags.items()}))


def _below(values: Mapping[str, Scalar], prefix: str) -> dict[str, Scalar]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def _exception(span: Any) -> ErrorInfo | None:
    for event in span.events:
        if event.name == semconv.EXCEPTION_EVENT:
            return error_of(attribute_map(event.attributes))
    return None
