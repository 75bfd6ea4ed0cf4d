"""What becomes of a run's points on their way through the collector: every one, its companion, its labels, its end."""

from __future__ import annotations

import math
from pathlib import Path

from tests.otlp_batches import points
from tests.sinks import HttpSink, until
from tests.stack.collectors import (
    MINUTE,
    MS,
    Collector,
    Prometheus,
    Sender,
    as_sent,
    made,
    now_ns,
    send,
    stored_points,
)
from tracelet.otlp import semconv
from tracelet.otlp.encode import MetricsLoad, resource_bytes
from tracelet.otlp.run_metrics import status

COUNT = 20_000


def test_every_point_of_a_run_is_in_both_backends_at_its_own_millisecond(tmp_path: Path) -> None:
    start = now_ns(MINUTE)
    runs = [Sender("run-1"), Sender("run-2"), Sender("run-2", rank=1)]
    sent = [made(COUNT, "train/loss", "train.loss", start=start) for _ in runs]
    with (
        HttpSink() as gateway,
        Prometheus(tmp_path / "prometheus") as prometheus,
        Collector(tmp_path / "collector", prometheus=prometheus.otlp, gateway=gateway.url) as collector,
    ):
        for run, batch in zip(runs, sent, strict=True):
            assert set(send(collector.http, run.bodies(batch))) == {200}
        until(lambda: prometheus.count('{__name__=~"ml_.*|tracelet_iteration"}') == 2 * 3 * COUNT, 30)
        until(lambda: len(gateway.points()) == 3 * COUNT)

        series = prometheus.samples('{__name__=~".+"}')
        iterations = {s.same_labels(): s.values for s in series if s.labels["__name__"] == "tracelet_iteration"}
        values = [s for s in series if s.labels["__name__"].startswith("ml_")]
        # Two keys that Prometheus gives one name stay two series, for each of three processes.
        assert len(values) == len(iterations) == 2 * 3
        for each in values:
            # The companion has every label and every millisecond of its series: the join is exact.
            assert {at: value * 2 for at, value in each.values.items()} == iterations[each.same_labels()]
            assert set(each.labels) == LABELS
            assert each.labels["__name__"] == "ml_train_loss"
        for run, batch in zip(runs, sent, strict=True):
            mine = [s for s in values if s.labels["instance"] == run.resource["service.instance.id"]]
            stored = {(s.labels["tracelet_metric_key"], value, at * MS) for s in mine for at, value in s.values.items()}
            assert stored == {(name, value, at) for name, value, _, at in as_sent(batch)}
            assert mine[0].labels | {"__name__": "", "tracelet_metric_key": ""} == {
                "__name__": "",
                "instance": run.resource["service.instance.id"],
                "job": "tracelet/vision",
                "tracelet_metric_key": "",
                "tracelet_rank": str(run.resource[semconv.RANK]),
                "tracelet_run_attempt": "a" * 16,
                "tracelet_run_id": run.run_id,
                "tracelet_run_name": f"name of {run.run_id}",
            }
        # The gateway's branch is untouched: names, iterations, nothing added.
        assert stored_points(gateway, "run-1") == as_sent(sent[0])
        resource, scope, metric = next(gateway.metrics())
        assert (resource, scope) == (runs[0].resource, semconv.SCOPE)
        assert [each.key for each in metric.gauge.data_points[0].attributes] == [semconv.ITERATION]


LABELS = {
    "__name__",
    "instance",
    "job",
    "tracelet_metric_key",
    "tracelet_rank",
    "tracelet_run_attempt",
    "tracelet_run_id",
    "tracelet_run_name",
}


def test_the_end_marker_ends_a_series_and_its_companion_at_once(tmp_path: Path) -> None:
    start = now_ns(10_000 * MS)
    run = Sender("ending")
    with (
        Prometheus(tmp_path / "prometheus") as prometheus,
        Collector(tmp_path / "collector", prometheus=prometheus.otlp) as collector,
    ):
        batch = points([("loss", 1.0, i) for i in range(100)] + [("nan", math.nan, 100)], start=start)
        assert send(collector.http, run.bodies(batch)) == [200]
        selector = '{__name__=~"ml_loss|ml_nan|tracelet_iteration"}'
        until(lambda: len(prometheus.now(selector)) == 4)
        assert send(collector.http, [run.ends([("loss", start + 99 * MS), ("nan", start + 100 * MS)])]) == [200]
        until(lambda: not prometheus.now(selector))
        assert prometheus.count("ml_loss") == prometheus.count('tracelet_iteration{tracelet_metric_key="loss"}') == 100
        assert prometheus.count("ml_nan") == 1  # NaN itself is a value like another


def test_what_tracelet_says_about_a_run_has_its_labels_and_no_prefix_and_no_companion(tmp_path: Path) -> None:
    run = Sender("about")
    with (
        Prometheus(tmp_path / "prometheus") as prometheus,
        Collector(tmp_path / "collector", prometheus=prometheus.otlp) as collector,
    ):
        body = MetricsLoad(resource_bytes(run.resource), tuple(status(now_ns(), "RUNNING"))).encode()
        assert send(collector.http, [body]) == [200]
        until(lambda: len(prometheus.now("tracelet_run_status")) == len(semconv.STATES))
        for each in prometheus.now("tracelet_run_status"):
            labels = each["metric"]
            assert labels["tracelet_run_id"] == "about"
            assert labels["tracelet_rank"] == "0"
            assert labels["tracelet_run_attempt"] == "a" * 16
            assert labels["tracelet_run_name"] == "name of about"
        assert not prometheus.samples("tracelet_iteration")


def test_only_points_that_share_a_millisecond_are_left_out_of_prometheus_and_are_counted(tmp_path: Path) -> None:
    start = now_ns(MINUTE)
    run, dense = Sender("dense"), range(500, 1000)
    batch = made(1000, "loss", start=start, dense=dense)
    with (
        HttpSink() as gateway,
        Prometheus(tmp_path / "prometheus") as prometheus,
        Collector(tmp_path / "collector", prometheus=prometheus.otlp, gateway=gateway.url) as collector,
    ):
        assert send(collector.http, run.bodies(batch)) == [200]
        until(lambda: prometheus.count("ml_loss") == 500)
        until(lambda: len(gateway.points("dense")) == 1000)
        assert {at for s in prometheus.samples("ml_loss") for at in s.values} == {
            (start + i * MS) // MS for i in range(500)
        }
        until(lambda: collector.number(FILTERED, 'filter="filter/dense"') == 500)
        assert stored_points(gateway, "dense") == as_sent(batch)


FILTERED = "otelcol_processor_filter_datapoints_filtered"
