"""What Prometheus would refuse of one run costs no other anything: filtered, counted, and whole at the gateway."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.gateway_process import GatewayProcess
from tests.otlp_batches import points
from tests.servers import MlflowServer, Row, rows_of
from tests.sinks import HttpSink, until
from tests.stack.arrived import all_in_both
from tests.stack.collectors import (
    HOUR,
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
from tests.stack.harness import Backends
from tests.stack.training import finished, trainings
from tracelet.otlp import semconv
from tracelet.otlp.encode import MetricsLoad, PointsLoad, resource_bytes
from tracelet.otlp.run_metrics import end_marker, status
from tracelet.records import PointBatch

FILTERED = "otelcol_processor_filter_datapoints_filtered"
GOOD = 5_000


class Side:
    """A collector with both backends, and a good run that is sent while the test does its worst."""

    def __init__(self, collector: Collector, prometheus: Prometheus, gateway: HttpSink) -> None:
        self.collector, self.prometheus, self.gateway = collector, prometheus, gateway
        self.good = Sender("good")
        self.batch = made(GOOD, "loss", "acc", start=now_ns(MINUTE))

    def send_beside(self, other: list[bytes]) -> None:
        """The good run's requests in small pieces from one thread, `other` from this one."""
        pieces = [body for at in range(0, GOOD, 100) for body in self.good.bodies(self.batch.slice(at, at + 100))]
        statuses: list[int] = []
        good = threading.Thread(target=lambda: statuses.extend(send(self.collector.http, pieces)))
        good.start()
        assert set(send(self.collector.http, other)) == {200}
        good.join()
        assert set(statuses) == {200}

    def good_is_whole(self) -> None:
        selector = '{tracelet_run_id="good",__name__=~"ml_.*|tracelet_iteration"}'
        until(lambda: self.prometheus.count(selector) == 2 * GOOD, 30)
        until(lambda: stored_points(self.gateway, "good") == as_sent(self.batch), 30)
        # Nothing was refused by Prometheus: what it would refuse never came to it.
        assert not self.collector.numbers("otelcol_exporter_send_failed_metric_points")

    def filtered(self, name: str) -> float:
        return self.collector.number(FILTERED, f'filter="{name}"')

    def whole_at_the_gateway(self, run: Sender, batch: PointBatch) -> None:
        until(lambda: stored_points(self.gateway, run.run_id) == as_sent(batch), 30)


@contextmanager
def a_side(tmp_path: Path) -> Iterator[Side]:
    with (
        HttpSink() as gateway,
        Prometheus(tmp_path / "prometheus") as prometheus,
        Collector(tmp_path / "collector", prometheus=prometheus.otlp, gateway=gateway.url) as collector,
    ):
        yield Side(collector, prometheus, gateway)


@pytest.fixture
def side(tmp_path: Path) -> Iterator[Side]:
    with a_side(tmp_path) as made_:
        yield made_


def test_points_older_than_the_window_are_left_out_alone(side: Side) -> None:
    run = Sender("old")
    old = made(1_000, "loss", start=now_ns(8 * 24 * HOUR))
    young = made(1_000, "loss", start=now_ns(MINUTE))
    side.send_beside(run.bodies(old) + run.bodies(young))
    side.good_is_whole()
    until(lambda: side.prometheus.count('ml_loss{tracelet_run_id="old"}') == 1_000)
    assert side.filtered("filter/too_old") == 1_000
    both = as_sent(old) | as_sent(young)
    until(lambda: stored_points(side.gateway, "old") == both)


def test_a_run_with_its_clock_an_hour_ahead_costs_no_other(side: Side) -> None:
    run = Sender("ahead")
    batch = made(1_000, "loss", start=now_ns(-HOUR))
    side.send_beside([*run.bodies(batch), run.ends([("loss", now_ns(-HOUR) + 1_000 * MS)])])
    side.good_is_whole()
    side.whole_at_the_gateway(run, batch)
    assert side.prometheus.count('{tracelet_run_id="ahead"}') == 0
    assert side.filtered("filter/ahead") == 1_001


ODD = ["up", "ALERTS", "target_info", "损失", "🔥", "%", "///", "a b", "x" * 3_000, "0", "_", "é", "ml.up", "__name__"]


def test_no_name_of_a_metric_costs_a_request_or_becomes_the_platforms(side: Side) -> None:
    run = Sender("odd")
    batch = points([(name, float(i), i) for i in range(20) for name in ODD], start=now_ns(MINUTE))
    side.send_beside(run.bodies(batch))
    side.good_is_whole()
    side.whole_at_the_gateway(run, batch)
    until(lambda: side.prometheus.count('{tracelet_run_id="odd",tracelet_metric_key!=""}') == 2 * 20 * len(ODD))
    series = side.prometheus.samples('{tracelet_metric_key!="",tracelet_run_id="odd",__name__!="tracelet_iteration"}')
    assert sorted(each.labels["tracelet_metric_key"] for each in series) == sorted(ODD)
    # A name without a Latin letter or digit is `ml` alone; the label tells such metrics apart.
    assert {each.labels["__name__"].partition("_")[0] for each in series} == {"ml"}
    assert not side.prometheus.samples('{__name__=~"up|ALERTS"}')
    # What Prometheus itself makes of a Resource is the only target_info.
    assert not side.prometheus.samples('{__name__="target_info",tracelet_metric_key!=""}')


def test_a_sender_that_is_not_tracelet_gets_no_name_of_the_platform_by_this_way(side: Side) -> None:
    run = Sender("foreign")
    resource = resource_bytes(run.resource)
    at = now_ns()
    claims = PointsLoad.of(
        resource, points([("tracelet.run.status", 1.0, 1), ("tracelet.iteration", 1.0, 1)], start=at)
    )
    up = MetricsLoad(resource, (*status(at, "RUNNING"), end_marker("up", at)))
    library = MetricsLoad(resource, tuple(status(at, "FAILED")), scope="some.library")
    nobody = PointsLoad.of(resource_bytes({"service.name": "shop"}), points([("up", 0.0, 1)], start=at))
    side.send_beside([load.encode() for load in (claims, up, library, nobody)])
    side.good_is_whole()
    until(lambda: bool(side.prometheus.samples('tracelet_run_status{tracelet_run_id="foreign"}')))
    assert side.filtered("filter/names") == 2 + 1 + len(semconv.STATES)
    # (target_info is what Prometheus itself makes of a Resource.)
    foreign = side.prometheus.samples('{tracelet_run_id="foreign",__name__!="target_info"}')
    assert {each.labels["__name__"] for each in foreign} == {"tracelet_run_status"}
    assert not side.prometheus.samples('{job="shop"}')


def test_10_000_points_a_second_in_one_series_cost_no_other(side: Side) -> None:
    # As the shipper stamps them: a millisecond each for as long as that leads at most 60 s ahead, dense from then on.
    run, start = Sender("fast"), now_ns(2 * MINUTE)
    stamped = made(60_000, "loss", start=start)
    dense = made(20_000, "loss", start=start + 6_000 * MS, step=MS // 10, dense=range(20_000))
    side.send_beside([*run.bodies(stamped), *run.bodies(dense)])
    side.good_is_whole()
    until(lambda: side.prometheus.count('ml_loss{tracelet_run_id="fast"}') == 60_000, 30)
    until(lambda: stored_points(side.gateway, "fast") == as_sent(stamped) | as_sent(dense), 30)
    assert side.filtered("filter/dense") == 20_000


def test_beside_all_of_these_a_good_run_is_whole_in_mlflow_too(tmp_path: Path, mlflow_server: MlflowServer) -> None:
    """A real program, the real gateway; the bad runs are in MLflow as well, since only Prometheus minds."""
    old = made(1_000, "loss", start=now_ns(8 * 24 * HOUR))
    ahead = made(1_000, "loss", start=now_ns(-HOUR))
    odd = points([(name, float(i), i) for i in range(20) for name in ODD], start=now_ns(MINUTE))
    fast = made(10_000, "loss", start=now_ns(MINUTE), step=MS // 10, dense=range(10_000))
    bad = {"bad-old": old, "bad-ahead": ahead, "bad-odd": odd, "bad-fast": fast}
    with (
        Prometheus(tmp_path / "prometheus") as prometheus,
        GatewayProcess(tmp_path / "gateway", mlflow_server.uri) as gateway,
        Collector(tmp_path / "collector", prometheus=prometheus.otlp, gateway=gateway.http) as collector,
    ):
        with trainings(tmp_path / "spools", ["beside-bad"], 10_000, collector.http) as running:
            for run_id, batch in bad.items():
                pieces = [batch.slice(at, at + 200) for at in range(0, len(batch), 200)]
                bodies = [body for piece in pieces for body in Sender(run_id).bodies(piece)]
                assert set(send(collector.http, bodies)) == {200}
            finished(running)
        backends = Backends(prometheus.at, mlflow_server.uri)
        all_in_both(backends, "beside-bad", 10_000)
        assert not collector.numbers("otelcol_exporter_send_failed_metric_points")
        for run_id, batch in bad.items():
            run = backends.mlflow_run(run_id)["info"]["run_id"]
            until(lambda run=run, batch=batch: len(logged_rows(mlflow_server, run)) >= len(batch), 60)  # type: ignore[misc]
            rows = logged_rows(mlflow_server, run)
            assert len({row.key for row in rows}) == len(set(batch.names.values()))
            assert sorted((row.step, row.value) for row in rows) == sorted(
                zip(batch.iterations, batch.values, strict=True)
            )


def logged_rows(server: MlflowServer, run: str) -> list[Row]:
    """What the run logged: without the marks of batches that overtook others on their way (several consumers)."""
    return [row for row in rows_of(server, run) if not row.key.startswith("system/")]
