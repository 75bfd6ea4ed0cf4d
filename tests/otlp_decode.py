"""A run read back from its OTLP requests alone, by the tables of the wire contract and nothing else.

For tests: it imports none of our encoder, so what it finds is what a reader of the page would find.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.sinks import attributes

__all__ = ["Artifact", "Attempt", "Phase", "Sample", "decode"]

Sample = tuple[int, float, int, bool]
"""Time in nanoseconds, value, iteration, dense."""


@dataclass(frozen=True)
class Artifact:
    """One logged file."""

    name: str
    source: str
    sha256: str | None
    size: int
    media_type: str


@dataclass(frozen=True)
class Phase:
    """A span of the attempt, the root span included."""

    span_id: str
    parent: str
    name: str
    start: int
    end: int
    attributes: tuple[tuple[str, Any], ...]
    error_type: str | None
    exception: tuple[str, str, str] | None


@dataclass
class Attempt:
    """Everything one attempt (a trace) said."""

    resources: dict[str, dict[str, Any]] = field(default_factory=dict)  # by service.instance.id
    samples: dict[str, dict[str, list[Sample]]] = field(default_factory=dict)  # instance id -> name -> in order
    markers: dict[str, dict[str, int]] = field(default_factory=dict)  # instance id -> name -> time of the end marker
    nonfinite: dict[str, int] = field(default_factory=dict)  # metric -> count
    status: str | None = None  # by the gauge
    started: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    artifacts: list[Artifact] = field(default_factory=list)
    ended: dict[str, Any] = field(default_factory=dict)
    end: int | None = None
    phases: dict[str, Phase] = field(default_factory=dict)
    long: dict[tuple[str, str], str] = field(
        default_factory=dict
    )  # span id, attribute -> what the span has no room for
    root_params: dict[str, Any] = field(default_factory=dict)
    root_tags: dict[str, Any] = field(default_factory=dict)
    links: list[tuple[str, str]] = field(default_factory=list)


def decode(requests: Iterable[tuple[str, Any]]) -> dict[str, Attempt]:
    """Attempts by trace id or, for metrics, by the trace id that instance's other signals name."""
    requests = list(requests)
    by_key: dict[str, Attempt] = {}
    traces: dict[str, Attempt] = {}

    def attempt_of(resource: dict[str, Any]) -> Attempt:
        attempt = by_key.setdefault(resource["tracelet.run.attempt"], Attempt())
        instance = resource["service.instance.id"]
        assert attempt.resources.setdefault(instance, resource) == resource, "one Resource an instance"
        return attempt

    for signal, message in requests:
        if signal == "metrics":
            for resource, scope, metric in _items(message.resource_metrics, "scope_metrics", "metrics"):
                _metric(attempt_of(resource), resource["service.instance.id"], scope, metric)
        elif signal == "logs":
            for resource, scope, record in _items(message.resource_logs, "scope_logs", "log_records"):
                assert scope == "tracelet"
                attempt = attempt_of(resource)
                assert traces.setdefault(record.trace_id.hex(), attempt) is attempt, "one trace an attempt"
        else:
            for resource, scope, span in _items(message.resource_spans, "scope_spans", "spans"):
                assert scope == "tracelet"
                attempt = attempt_of(resource)
                assert traces.setdefault(span.trace_id.hex(), attempt) is attempt, "one trace an attempt"
                _span(attempt, span)
    for attempt in by_key.values():
        _events(attempt, [r for r in _records(requests) if traces.get(r.trace_id.hex()) is attempt])
        attempt.phases = {span_id: _whole(attempt, phase) for span_id, phase in attempt.phases.items()}
    return traces


def _items(resources: Any, scopes: str, items: str) -> Iterable[tuple[dict[str, Any], str, Any]]:
    assert len(resources) == 1, "one Resource a request"
    for resource in resources:
        assert resource.schema_url == "https://opentelemetry.io/schemas/1.44.0"
        for scope in getattr(resource, scopes):
            for item in getattr(scope, items):
                yield attributes(resource.resource), scope.scope.name, item


def _records(requests: Iterable[tuple[str, Any]]) -> Iterable[Any]:
    for signal, message in requests:
        if signal == "logs":
            yield from (record for _, _, record in _items(message.resource_logs, "scope_logs", "log_records"))


def _metric(attempt: Attempt, instance: str, scope: str, metric: Any) -> None:
    if scope == "tracelet":
        for point in metric.gauge.data_points:
            if point.flags & 1:
                attempt.markers.setdefault(instance, {})[metric.name] = point.time_unix_nano
                continue
            own = attributes(point)
            sample = (
                point.time_unix_nano,
                point.as_double,
                own["tracelet.iteration"],
                own.get("tracelet.dense", False),
            )
            attempt.samples.setdefault(instance, {}).setdefault(metric.name, []).append(sample)
    elif metric.name == "tracelet.run.status":
        states = {attributes(point)["tracelet.run.state"]: point.as_double for point in metric.gauge.data_points}
        (attempt.status,) = (state for state, value in states.items() if value == 1.0)
    elif metric.name == "tracelet.metric.nonfinite":
        for point in metric.sum.data_points:
            if not point.flags & 1:
                attempt.nonfinite[attributes(point)["tracelet.metric.key"]] = point.as_int


def _span(attempt: Attempt, span: Any) -> None:
    own = attributes(span)
    error = own.pop("error.type", None)
    assert (span.status.code == 2) == (error is not None)
    exceptions = [attributes(event) for event in span.events if event.name == "exception"]
    exception = None
    if exceptions:
        (one,) = exceptions
        exception = (one["exception.type"], one["exception.message"], one["exception.stacktrace"])
    phase = Phase(
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.name,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        tuple(sorted((k, v) for k, v in own.items() if not k.startswith(("tracelet.param.", "tracelet.tag.")))),
        error,
        exception,
    )
    assert attempt.phases.setdefault(phase.span_id, phase) == phase, "one span has one content"
    if not span.parent_span_id:
        attempt.root_params = {k.removeprefix("tracelet.param."): v for k, v in own.items() if "tracelet.param." in k}
        attempt.root_tags = {k.removeprefix("tracelet.tag."): v for k, v in own.items() if "tracelet.tag." in k}
        attempt.links = [(link.trace_id.hex(), link.span_id.hex()) for link in span.links]


def _whole(attempt: Attempt, phase: Phase) -> Phase:
    """The span with the long texts that came in log events."""
    long = {key: text for (span_id, key), text in attempt.long.items() if span_id == phase.span_id}
    own = {k: v for k, v in phase.attributes if not k.startswith("tracelet.digest.")}
    exception = phase.exception
    if exception is not None:
        names = ("exception.type", "exception.message", "exception.stacktrace")
        first, second, third = (long.pop(name, text) for name, text in zip(names, exception, strict=True))
        exception = (first, second, third)
    return replace(phase, attributes=tuple(sorted({**own, **long}.items())), exception=exception)


def _events(attempt: Attempt, records: list[Any]) -> None:
    """Events in order; a value in chunks follows the event that has its beginning."""
    pieces: dict[tuple[str, str], list[str]] = {}
    for record in records:
        own = attributes(record)
        assert own.pop("tracelet.event") == record.event_name
        if "tracelet.chunk.key" in own:
            key, digest = own["tracelet.chunk.key"], own["tracelet.chunk.digest"]
            assert own["tracelet.chunk.index"] == len(pieces.setdefault((key, digest), [])) + 1
            pieces[key, digest].append(record.body.string_value)
            if len(pieces[key, digest]) == own["tracelet.chunk.count"]:
                whole = "".join(pieces.pop((key, digest)))
                assert digest == "sha256:" + hashlib.sha256(whole.encode()).hexdigest()
                _take(attempt, record, {key: whole})
            continue
        assert record.body.string_value
        values = {k: v for k, v in own.items() if not k.startswith(("tracelet.event.", "tracelet.digest."))}
        _take(attempt, record, values)
    assert not pieces, "a value misses pieces"


def _take(attempt: Attempt, record: Any, values: dict[str, Any]) -> None:
    if record.event_name == "tracelet.params":
        attempt.params |= {key.removeprefix("tracelet.param."): value for key, value in values.items()}
    elif record.event_name == "tracelet.tags":
        attempt.tags |= {key.removeprefix("tracelet.tag."): value for key, value in values.items()}
    elif record.event_name == "tracelet.run.started":
        attempt.started |= values
    elif record.event_name == "tracelet.run.ended":
        attempt.ended |= values
        attempt.end = record.time_unix_nano
    elif record.event_name == "tracelet.span":
        attempt.long |= {(record.span_id.hex(), key): value for key, value in values.items()}
    elif record.event_name == "tracelet.artifact":
        digest = values.get("tracelet.artifact.digest")
        attempt.artifacts.append(
            Artifact(
                values["tracelet.artifact.name"],
                unquote(urlsplit(values["tracelet.artifact.uri"]).path),
                None if digest is None else digest.removeprefix("sha256:"),
                values["tracelet.artifact.size"],
                values["tracelet.artifact.media_type"],
            )
        )
    else:
        raise AssertionError(f"the page knows no event {record.event_name}")
