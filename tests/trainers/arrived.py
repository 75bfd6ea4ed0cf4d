"""What has arrived of a run: its ends, as rank 0 told them, and its values, each once."""

from __future__ import annotations

from collections import Counter

from tests.sinks import HttpSink, attributes, until


def ends(sink: HttpSink, run_id: str) -> list[str]:
    """The states that rank 0 told, whose end is the run's; a node without it tells of its own ranks."""
    return [
        attributes(event)["tracelet.run.state"]
        for received in list(sink.stored)
        if received.signal == "logs"
        for resource in received.message.resource_logs
        if attributes(resource.resource)["tracelet.run.id"] == run_id
        and attributes(resource.resource)["tracelet.rank"] == 0
        for scope in resource.scope_logs
        for event in scope.log_records
        if event.event_name == "tracelet.run.ended" and "tracelet.run.state" in attributes(event)
    ]


def whole(sink: HttpSink, run_id: str, states: list[str], points: int, within_s: float = 60.0) -> None:
    """Wait until the run has ended so, in this order, and has all its `points`; there must be no more of them."""
    until(lambda: ends(sink, run_id) == states and len(sink.points(run_id)) >= points, within_s)
    assert len(sink.points(run_id)) == points


def by_attempt_and_rank(sink: HttpSink, run_id: str) -> Counter[tuple[str, int]]:
    """How many values came from which rank of which attempt."""
    return Counter(
        (resource["tracelet.run.attempt"], resource["tracelet.rank"])
        for resource, scope, metric in sink.metrics()
        if scope == "tracelet" and resource["tracelet.run.id"] == run_id
        for point in metric.gauge.data_points
        if not point.flags
    )
