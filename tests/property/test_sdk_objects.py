"""What a live exporter is handed is what goes over the wire: the SDK's own encoders make the same bytes of it."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from opentelemetry.exporter.otlp.proto.common._log_encoder import encode_logs
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.metrics.export import MetricsData

from tests.otlp_batches import START, batch, opened
from tests.property.test_otlp_rebuild import STORIES, Story, batches
from tests.sinks import REQUESTS
from tracelet.otlp.encode import EventsLoad, Load, MetricsLoad, PointsLoad, SpansLoad
from tracelet.otlp.plan import Ledger, heartbeat_load, plan
from tracelet.otlp.sdk_objects import log_records, metrics_data, readable_spans
from tracelet.records import Batch, Heartbeat, ParamsLogged


def by_the_sdk(load: Load) -> bytes:
    """The load's objects through the SDK's encoder."""
    if isinstance(load, (PointsLoad, MetricsLoad)):
        encoded: Any = encode_metrics(metrics_data(load) or MetricsData([]))
    elif isinstance(load, EventsLoad):
        encoded = encode_logs(log_records(load))
    else:
        assert isinstance(load, SpansLoad)
        encoded = encode_spans(readable_spans(load))
    return encoded.SerializeToString(deterministic=True)


def without_ends(load: Load) -> bytes:
    """The request that goes over OTLP, without the points that end a series: the SDK has no word for them."""
    request = REQUESTS[load.signal].FromString(load.encode())
    if load.signal == "metrics":
        (resource,) = request.resource_metrics
        (scope,) = resource.scope_metrics
        for metric in list(scope.metrics):
            points = getattr(metric, metric.WhichOneof("data")).data_points
            for point in [point for point in points if point.flags]:
                points.remove(point)
            if not points:
                scope.metrics.remove(metric)
        if not scope.metrics:
            request.ClearField("resource_metrics")
    return request.SerializeToString(deterministic=True)


def loads_of(made: list[Batch]) -> list[Load]:
    """Every load of these batches, each prepared with what the one before left behind."""
    ledger, loads = Ledger(), []
    for one in made:
        planned = plan(one, ledger)
        ledger = planned.after
        loads += planned.loads
    return loads


@given(story=STORIES)
@settings(max_examples=60, deadline=None)
def test_the_sdks_encoders_make_of_the_objects_what_goes_over_otlp(story: Story) -> None:
    for load in loads_of(batches(story)):
        assert by_the_sdk(load) == without_ends(load)


def test_a_value_that_is_not_finite_and_its_counter_are_there() -> None:
    rows = [("loss", float("nan"), 0), ("loss", float("inf"), 1), ("loss", 0.5, -1)]
    loads = loads_of([batch(rows)])
    assert [type(load) for load in loads] == [PointsLoad, MetricsLoad]
    for load in loads:
        assert by_the_sdk(load) == without_ends(load)


def test_a_heartbeat_and_numbers_beyond_int64_are_the_same() -> None:
    (load,) = loads_of([batch(records=[ParamsLogged(START, {"big": 2**70, "yes": True})])])
    beat = heartbeat_load(batch(opening=opened(rank=2**70)), Heartbeat(START, "RUNNING", START, {}), Ledger())
    for each in (load, beat):
        assert by_the_sdk(each) == without_ends(each)


def test_each_value_is_a_data_point_of_its_own_with_its_time_and_iteration() -> None:
    (load,) = loads_of([batch([("loss", 1.0, 7), ("acc", 0.5, 7), ("loss", 0.5, 8)])])
    assert isinstance(load, PointsLoad)
    data = metrics_data(load)
    assert data is not None
    (resource,) = data.resource_metrics
    (scope,) = resource.scope_metrics
    found = {
        metric.name: [(p.time_unix_nano - START, p.value, p.attributes) for p in metric.data.data_points]  # type: ignore[union-attr]
        for metric in scope.metrics
    }
    assert found == {
        "loss": [(0, 1.0, {"tracelet.iteration": 7}), (2_000_000, 0.5, {"tracelet.iteration": 8})],
        "acc": [(1_000_000, 0.5, {"tracelet.iteration": 7})],
    }
