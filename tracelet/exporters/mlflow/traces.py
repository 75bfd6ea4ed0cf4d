"""Spans that came over the wire into MLflow's own traces: requests of bounded size, the bad span found by halving.

MLflow takes a request of spans whole or not at all, and a repeat changes nothing (its rows are kept by trace and span).
"""

from __future__ import annotations

import base64
import binascii
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tracelet.exporters.base import Refusal
from tracelet.exporters.mlflow.transport import Refused, Transport

__all__ = ["NO_TRACES", "SpanWork"]

NO_TRACES = "NO_TRACES"
"""The code of a `Refused` that says: this MLflow takes no spans at all."""

_REQUEST_BYTES = 1_000_000


class SpanWork:
    """The spans of a batch that MLflow has not acknowledged yet.

    `resource_spans` are serialized OTLP `ResourceSpans` in base64, as `SpansReceived` has them.
    """

    def __init__(self, resource_spans: Sequence[str]) -> None:
        self._requests: deque[list[bytes]] = deque()
        self.refusals: list[Refusal] = []
        size = _REQUEST_BYTES
        for text in resource_spans:
            try:
                one = base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError) as error:
                self.refusals.append(Refusal("span", f"these spans are damaged: {error}", {"base64": text[:200]}))
                continue
            for piece in _pieces(one) if one else ():
                if size + len(piece) > _REQUEST_BYTES:
                    self._requests.append([])
                    size = 0
                self._requests[-1].append(piece)
                size += len(piece)

    def send(self, transport: Transport, experiment_id: str, run_id: str, check: Callable[[Refused], Any]) -> None:
        """Send all that is left; what MLflow refuses is in `refusals` afterwards.

        `check(no)` raises where the run or the experiment is the reason for a refusal, and not the spans.

        Raises:
            NotNow: what has been sent so far is not sent again.
            Refused: with code NO_TRACES; none of the rest will ever be taken.
        """
        while self._requests:
            try:
                transport.log_spans(experiment_id, run_id, self._requests[0])
            except Refused as no:
                if no.code == NO_TRACES:
                    raise
                check(no)
                self._settle(no)
                continue
            self._requests.popleft()

    def give_up(self, reason: str) -> Refusal:
        """One refusal for all that is left, which counts it."""
        left = [one for request in self._requests for one in request]
        self._requests.clear()
        items = [{"resource_spans": base64.b64encode(one).decode()} for one in left]
        return Refusal("span", reason, {"count": _spans_in(left), "items": items})

    def _settle(self, no: Refused) -> None:
        """Halve the refused request; one that holds a single span is given up by name."""
        request = self._requests.popleft()
        if len(request) > 1:
            middle = len(request) // 2
            self._requests.extendleft([request[middle:], request[:middle]])
            return
        from google.protobuf.message import DecodeError

        try:
            halves, facts = _halves(request[0])
        except DecodeError as error:
            self.refusals.append(Refusal("span", f"these spans can't be read: {error}", {"bytes": len(request[0])}))
            return
        if halves:
            self._requests.extendleft([[half] for half in reversed(halves)])
        else:
            facts["resource_spans"] = base64.b64encode(request[0]).decode()
            self.refusals.append(Refusal("span", str(no), facts))


def _pieces(resource_spans: bytes) -> Iterator[bytes]:
    """The same in pieces that fit into a request, as far as halving makes them smaller: a span is not cut."""
    left = [resource_spans]
    while left:
        piece = left.pop()
        halves = _halves_of_large(piece) if len(piece) > _REQUEST_BYTES else []
        # What each half repeats is the Resource; where that is the larger part, many halves would be more, not less.
        if halves and sum(map(len, halves)) < len(piece) + _REQUEST_BYTES // 2:
            left += reversed(halves)
        else:
            yield piece


def _halves_of_large(resource_spans: bytes) -> list[bytes]:
    from google.protobuf.message import DecodeError

    try:
        return _halves(resource_spans)[0]
    except DecodeError:  # said when it is refused
        return []


def _halves(resource_spans: bytes) -> tuple[list[bytes], dict[str, Any]]:
    """Two with half the spans each, or, for a single span, what names it."""
    from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans

    whole = ResourceSpans.FromString(resource_spans)
    spans = [(number, span) for number, scope in enumerate(whole.scope_spans) for span in scope.spans]
    if len(spans) <= 1:
        return [], {
            "name": spans[0][1].name if spans else "",
            "trace_id": spans[0][1].trace_id.hex() if spans else "",
            "span_id": spans[0][1].span_id.hex() if spans else "",
        }
    out = []
    for some in (spans[: len(spans) // 2], spans[len(spans) // 2 :]):
        half = ResourceSpans()
        half.CopyFrom(whole)
        for scope in half.scope_spans:
            del scope.spans[:]
        for number, span in some:
            half.scope_spans[number].spans.append(span)
        kept = [scope for scope in half.scope_spans if scope.spans]
        del half.scope_spans[:]
        half.scope_spans.extend(kept)
        out.append(half.SerializeToString())
    return out, {}


def _spans_in(request: Sequence[bytes]) -> int:
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans

    count = 0
    for one in request:
        try:
            count += sum(len(scope.spans) for scope in ResourceSpans.FromString(one).scope_spans)
        except DecodeError:
            count += 1
    return count
