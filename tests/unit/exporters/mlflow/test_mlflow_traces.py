"""Spans on their way to MLflow: requests of bounded size, and each span in one of them."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans

from tracelet.exporters.mlflow.traces import SpanWork


class Taking:
    """A transport that takes every span."""

    def __init__(self) -> None:
        self.requests: list[list[ResourceSpans]] = []
        self.sizes: list[int] = []

    def log_spans(self, experiment_id: str, run_id: str, resource_spans: Sequence[bytes]) -> None:
        self.sizes.append(sum(map(len, resource_spans)))
        self.requests.append([ResourceSpans.FromString(one) for one in resource_spans])


def sent(*resources: ResourceSpans | bytes) -> Taking:
    texts = [base64.b64encode(one if isinstance(one, bytes) else one.SerializeToString()).decode() for one in resources]
    taking, work = Taking(), SpanWork(texts)
    work.send(taking, "1", "r", lambda no: None)  # type: ignore[arg-type]
    assert work.refusals == []
    return taking


def resource(scopes: int, spans: int, size: int, *, of_resource: int = 0) -> ResourceSpans:
    """So many scopes of so many spans, each of about `size` bytes, named by their numbers."""
    made = ResourceSpans(schema_url="of the resource")
    made.resource.attributes.add(key="service.name").value.string_value = "x" * of_resource
    for scope in range(scopes):
        inner = made.scope_spans.add(schema_url=f"schema {scope}")
        inner.scope.name = f"scope {scope}"
        for number in range(spans):
            span = inner.spans.add(name=f"{scope}/{number}", trace_id=bytes(16), span_id=bytes(8))
            span.attributes.add(key="text").value.string_value = "x" * size
    return made


def names(taking: Taking) -> list[tuple[str, str, str]]:
    return [
        (one.schema_url, scope.scope.name, span.name)
        for request in taking.requests
        for one in request
        for scope in one.scope_spans
        for span in scope.spans
    ]


def test_one_resource_of_many_spans_goes_in_requests_of_at_most_a_megabyte() -> None:
    whole = resource(7, 300, 4000)
    taking = sent(resource(1, 1, 10), whole, resource(1, 1, 10))
    assert max(taking.sizes) <= 1_000_000
    assert len(taking.sizes) < 2 * (8.4e6 / 1e6) + 2
    assert names(taking)[1:-1] == [
        ("of the resource", f"scope {scope}", f"{scope}/{number}") for scope in range(7) for number in range(300)
    ]
    assert all(len(one.scope_spans) <= 7 for request in taking.requests for one in request)


def test_a_span_beyond_the_size_goes_alone() -> None:
    taking = sent(resource(1, 3, 1_500_000))
    assert [name for _, _, name in names(taking)] == ["0/0", "0/1", "0/2"]
    assert len(taking.requests) == 3


def test_a_large_resource_is_not_repeated_for_each_span() -> None:
    taking = sent(resource(1, 200, 100, of_resource=2_000_000))
    assert len(names(taking)) == 200
    assert sum(taking.sizes) < 3_000_000


def test_many_scopes_are_not_repeated_empty() -> None:
    taking = sent(resource(20_000, 1, 100))
    assert len(names(taking)) == 20_000
    assert max(taking.sizes) <= 1_000_000
    assert sum(taking.sizes) < 4_000_000


def test_what_cant_be_read_goes_as_it_is_and_is_refused_by_who_reads_it() -> None:
    taking, work = Taking(), SpanWork([base64.b64encode(b"\xff" * 1_500_000).decode()])
    taking.log_spans = lambda *_: None  # type: ignore[method-assign]
    work.send(taking, "1", "r", lambda no: None)  # type: ignore[arg-type]
    assert work.refusals == []
