"""Every alert firing, and not firing, in a real Prometheus: over what the library, the collector and the gateway say.

The rules are the shipped ones, looked at each second and without `for`. Where a test would have to wait for a window,
the file's windows are shorter by 60: seconds for minutes, minutes for hours. Nothing else in it is changed.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.request import Request, urlopen

from opentelemetry.proto.metrics.v1.metrics_pb2 import Gauge, Metric, NumberDataPoint

from tests.gateway_fakes import points_request
from tests.gateway_process import GatewayProcess
from tests.servers import MlflowServer
from tests.sinks import HttpSink, until
from tests.stack.collectors import MINUTE, Collector, Prometheus, Sender, made, now_ns, refuse, send
from tests.stack.prometheus_server import shipped
from tracelet.exporters.mlflow.mapping import RUN_TAG
from tracelet.otlp.encode import EventsLoad, MetricsLoad, resource_bytes
from tracelet.otlp.events import Position, events_of
from tracelet.otlp.run_metrics import heartbeat_metrics, nonfinite, status
from tracelet.records import Heartbeat, RunInfo, Scalar, TagsSet, WriterOpened

HOUR = 60 * MINUTE
LUCKY = (0.1, 0.5, 0.6, 0.4, 0.7, 0.5, 0.3)  # batches of a healthy run: the first is far below the usual


def quick(server: Prometheus, *, windows: bool = False) -> None:
    """The rules as shipped, but looked at each second and without `for`; `windows`: these shorter by 60 as well."""
    path = server.folder / "rules" / "tracelet.yaml"
    text = re.sub(r"\n\s+for: \w+", "", path.read_text())
    text = text.replace("interval: 30s", "interval: 1s")
    if windows:
        text = re.sub(r"(\[|offset )(\d+)([mh])\b", lambda it: it[1] + it[2] + {"m": "s", "h": "m"}[it[3]], text)
        text = text.replace("answered_age_seconds > 60", "answered_age_seconds > 1")
    path.write_text(text)
    config = server.folder / "prometheus.yaml"
    config.write_text(config.read_text().replace("scrape_interval: 15s", "scrape_interval: 1s\n  scrape_timeout: 1s"))


def watch(server: Prometheus, job: str, *addresses: str) -> None:
    """Let it scrape these, as `job`."""
    targets = {"targets": [each.removeprefix("http://").removesuffix("/metrics") for each in addresses]}
    (server.folder / "targets" / f"{job}.yaml").write_text(json.dumps([{**targets, "labels": {"job": job}}]))


Firing = Callable[[str], list[dict[str, str]]]


def firing(server: Prometheus) -> Firing:
    """By the name of an alert, the labels with which it fires now."""

    def labels(name: str) -> list[dict[str, str]]:
        found = server.ask("alerts")["alerts"]
        return [each["labels"] for each in found if each["state"] == "firing" and each["labels"]["alertname"] == name]

    return labels


def each_moment(act: Callable[[], object], holds: Callable[[], bool], limit_s: float = 60.0) -> None:
    """Act about five times a second until it holds."""
    last = 0.0

    def look() -> bool:
        nonlocal last
        if time.monotonic() - last >= 0.2:
            act()
            last = time.monotonic()
        return holds()

    until(look, limit_s)


def said_by(
    run_id: str, time_ns: int, iterated_ns: int | None, *, rank: int = 0, started_ns: int | None = None
) -> bytes:
    """What a run's shipper says of it, as it goes to Prometheus."""
    sender = Sender(run_id, rank=rank)
    run = RunInfo(run_id, "vision", "cnn", f"name of {run_id}")
    started_ns = time_ns - HOUR if started_ns is None else started_ns
    opened = WriterOpened(time_ns, "first", 1, rank, "a" * 16, started_ns, sender.resource)
    beat = heartbeat_metrics(run, opened, Heartbeat(time_ns, "RUNNING", iterated_ns, {}))
    return of_run(sender, [*beat])


def of_run(sender: Sender, metrics: Sequence[Metric]) -> bytes:
    """A request of what tracelet says about a run."""
    return MetricsLoad(resource_bytes(sender.resource), tuple(metrics)).encode()


def gauge(name: str, unit: str, time_ns: int, value: float) -> Metric:
    return Metric(
        name=name, unit=unit, gauge=Gauge(data_points=[NumberDataPoint(time_unix_nano=time_ns, as_double=value)])
    )


def gpu(host: str, time_ns: int, busy: float) -> bytes:
    """What the collector on a host says of its GPU: not a run's, so it goes to Prometheus by another way."""
    resource: dict[str, Scalar] = {"service.name": "hosts", "service.instance.id": host, "host.name": host}
    return MetricsLoad(resource_bytes(resource), (gauge("hw.gpu.utilization", "1", time_ns, busy),)).encode()


def test_runs_that_are_lost_stalled_or_no_longer_finite_fire_over_what_the_library_sends(tmp_path: Path) -> None:
    server = shipped(tmp_path / "prometheus")
    quick(server)
    with server, Collector(tmp_path / "collector", prometheus=server.otlp) as collector:
        now, ago = now_ns(), now_ns(4 * MINUTE)
        hung = gauge("tracelet.run.attempt.start.time", "s", now, (now - 20 * MINUTE) / 1e9)
        bodies = [
            said_by("lost", ago, ago),
            said_by("stalled", now, now - 20 * MINUTE),
            said_by("hung", now, None, started_ns=now - 20 * MINUTE),
            of_run(Sender("hung"), [hung]),
            said_by("well", now, now),
            # Rank 8's host died without a word; rank 0 then ended the run.
            said_by("failed", ago, ago, rank=8),
            said_by("failed", ago, ago),
            of_run(Sender("failed"), status(ago + MINUTE, "FAILED")),
            of_run(Sender("well"), [nonfinite("train/loss", now, now, 3), nonfinite("grad", now, now, 3)]),
        ]
        assert set(send(collector.http, bodies)) == {200}
        alerts = firing(server)
        until(lambda: bool(alerts("TraceletRunLost")) and len(alerts("TraceletRunStalled")) == 2, 30)
        until(lambda: bool(alerts("TraceletLossNotFinite")), 30)
        assert [each["tracelet_run_id"] for each in alerts("TraceletRunLost")] == ["lost"]
        assert {each["tracelet_run_name"] for each in alerts("TraceletRunStalled")} == {
            "name of stalled",
            "name of hung",
        }
        (alert,) = alerts("TraceletLossNotFinite")
        assert (alert["tracelet_run_id"], alert["tracelet_metric_key"]) == ("well", "train/loss")


def test_idle_gpus_fire_while_a_run_is_running_on_their_host(tmp_path: Path) -> None:
    server = shipped(tmp_path / "prometheus")
    quick(server)
    with server, Collector(tmp_path / "collector", prometheus=server.otlp) as collector:
        now, alerts = now_ns(), firing(server)
        assert send(collector.http, [said_by("training", now, now)]) == [200]
        hosts = [gpu("node-1", now, 0.5), gpu("node-2", now, 0.01)]  # the run is on node-1
        assert send(server.otlp, hosts, prefix="/api/v1/otlp") == [200, 200]
        until(lambda: bool(server.now("tracelet:run_running")) and len(server.now("hw_gpu_utilization_ratio")) == 2, 30)
        assert alerts("TraceletGpuIdle") == []
        idle = [gpu("node-1", now + number, 0.0) for number in range(1_000_000, 50_000_000, 1_000_000)]
        assert set(send(server.otlp, idle, prefix="/api/v1/otlp")) == {200}
        until(lambda: bool(alerts("TraceletGpuIdle")), 30)
        (alert,) = alerts("TraceletGpuIdle")
        assert (alert["host_name"], alert["tracelet_run_id"]) == ("node-1", "training")


def test_a_loss_that_leaves_its_best_behind_fires_under_each_of_its_names_and_noise_does_not(tmp_path: Path) -> None:
    server = shipped(tmp_path / "prometheus")
    quick(server, windows=True)
    ways = [
        Collector(tmp_path / prefix, prometheus=server.otlp, TRACELET_METRIC_PREFIX=prefix) for prefix in ("ml.", "xp.")
    ]
    with server, ways[0], ways[1]:
        run, alerts, count = Sender("diverges"), firing(server), 0
        value = 1.0

        def train() -> None:
            nonlocal count
            now = now_ns()
            bodies = [said_by("diverges", now, now)]
            for name, one in (("train/loss", value), ("batch_loss", LUCKY[count % len(LUCKY)])):
                batch = made(1, name, start=now)
                batch.values[0] = one
                bodies += run.bodies(batch)
            for way in ways:
                assert set(send(way.http, bodies)) == {200}
            count += 1

        each_moment(train, lambda: len(server.now("tracelet:loss:avg10m")) == 4)
        assert alerts("TraceletLossDiverging") == []
        value = 100.0
        each_moment(train, lambda: len(alerts("TraceletLossDiverging")) == 2)
        fired = alerts("TraceletLossDiverging")
        assert {each["metric_name"] for each in fired} == {"ml_train_loss", "xp_train_loss"}
        assert {each["tracelet_metric_key"] for each in fired} == {"train/loss"}


def test_a_collectors_queues_its_refusals_and_what_it_drops_fire_while_they_last(tmp_path: Path) -> None:
    with HttpSink() as gateway, HttpSink() as backend:
        gateway.rule = lambda _: refuse()
        addresses = {"prometheus": backend.url, "gateway": gateway.url}
        collector = Collector(tmp_path / "collector", **addresses, TRACELET_QUEUE_BYTES="400000")
        server = shipped(tmp_path / "prometheus")
        watch(server, "otelcol", collector.own_metrics)
        quick(server, windows=True)
        with collector, server:
            alerts = firing(server)
            run, start, count = Sender("queued"), now_ns(MINUTE), 0

            def send_more() -> int:
                nonlocal count
                count += 1
                (body,) = run.bodies(made(100, "loss", start=start + count * 100 * 1_000_000))
                return send(collector.http, [body])[0]

            def of(name: str) -> set[str]:
                return {each.get("exporter", each.get("receiver", "")) for each in alerts(name)}

            until(lambda: bool(server.now("otelcol_exporter_queue_capacity and on () up offset 10s")), 60)
            assert send_more() == 200
            until(lambda: backend.requests != [])
            names = ["QueueFilling", "QueueFull", "Refuses", "DropsData", "Down"]
            assert {name: alerts(f"TraceletCollector{name}") for name in names} == {name: [] for name in names}
            # Dropped once, and never before.
            backend.rule = lambda _: refuse(400)
            assert send_more() == 200
            until(lambda: of("TraceletCollectorDropsData") == {"otlp_http/prometheus"}, 30)
            backend.rule = None

            def gateways_queue_is_filled() -> bool:
                assert send_more() == 200
                return collector.number("otelcol_exporter_queue_size", "otlp_http/gateway") > 0.85 * 400_000

            until(gateways_queue_is_filled, 60)
            until(lambda: of("TraceletCollectorQueueFilling") == {"otlp_http/gateway"}, 30)
            (alert,) = alerts("TraceletCollectorQueueFilling")
            assert alert["data_type"] == "metrics"
            each_moment(send_more, lambda: of("TraceletCollectorQueueFull") == {"otlp_http/gateway"})
            each_moment(send_more, lambda: of("TraceletCollectorRefuses") == {"otlp"})
            gateway.rule = None
            until(lambda: not any(alerts(f"TraceletCollector{name}") for name in names), 60)
            collector.stop()
            until(lambda: bool(alerts("TraceletCollectorDown")), 30)
            assert [each["job"] for each in alerts("TraceletCollectorDown")] == ["otelcol"]


def in_mlflow(server: MlflowServer, what: str, **facts: str) -> dict[str, str]:
    """MLflow's answer to one of its own requests about experiments."""
    address = f"{server.uri}/api/2.0/mlflow/experiments/{what}"
    request = Request(address, json.dumps(facts).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=30) as answer:
        said: dict[str, str] = json.load(answer)
        return said


def test_a_gateway_that_delivers_nothing_fires_otherwise_than_one_that_can_not_deliver_a_single_run(
    tmp_path: Path, mlflow_server: MlflowServer
) -> None:
    gone = f"gone-{tmp_path.name}"
    in_mlflow(mlflow_server, "delete", experiment_id=in_mlflow(mlflow_server, "create", name=gone)["experiment_id"])
    server = shipped(tmp_path / "prometheus")
    quick(server, windows=True)
    with (
        GatewayProcess(tmp_path / "alone", "http://127.0.0.1:9", "--grace", "0s") as alone,
        GatewayProcess(tmp_path / "well", mlflow_server.uri, "--grace", "0s") as well,
    ):
        watch(server, "tracelet-gateway", alone.http, well.http)
        with server:
            alerts, count = firing(server), 0
            of_well = f'{{instance="{well.http.removeprefix("http://")}"}}'

            def log(gateway: GatewayProcess, run_id: str, project: str = "alerts") -> None:
                nonlocal count
                count += 1
                sender = Sender(run_id, more={"tracelet.project": project})
                (body,) = sender.bodies(made(10, "loss", start=now_ns() + count * 10_000_000))
                assert gateway.post("metrics", body)[0] == 200

            def at(name: str) -> set[str]:
                return {f"http://{each['instance']}" for each in alerts(name)}

            taken = f"tracelet_gateway_undeliverable_total{of_well} == 0"
            each_moment(lambda: log(well, f"run-{tmp_path.name}"), lambda: bool(server.now(taken)))
            names = ["MlflowUnreachable", "RunsStuck", "Undeliverable", "Down"]
            assert {name: at(f"TraceletGateway{name}") for name in names} == {name: set() for name in names}

            # One run of `well` can't be delivered, the other one is; all of `alone` can't.
            log(well, f"stuck-{tmp_path.name}", gone)
            log(alone, "stuck")
            one_stuck = f"tracelet:gateway_mlflow_trouble_runs:while_taking{of_well} == 1"
            each_moment(lambda: log(well, f"run-{tmp_path.name}"), lambda: bool(server.now(one_stuck)))
            until(lambda: at("TraceletGatewayRunsStuck") == {alone.http, well.http}, 30)
            until(lambda: at("TraceletGatewayMlflowUnreachable") == {alone.http}, 30)
            # Now the good run rests, and what should arrive at `well` doesn't.
            until(lambda: bool(server.now(f"tracelet_gateway_mlflow_answered_age_seconds{of_well} > 5")), 60)
            assert at("TraceletGatewayMlflowUnreachable") == {alone.http}

            # What MLflow will never get: a tag by which tracelet finds the run again.
            sender = Sender(f"run-{tmp_path.name}", more={"tracelet.project": "alerts"})
            run = RunInfo(sender.run_id, "alerts", "cnn", f"name of {sender.run_id}")
            tagged = events_of(TagsSet(now_ns(), {RUN_TAG: "another"}), run, Position("1" * 32, "1" * 16))
            body = EventsLoad(resource_bytes(sender.resource), tuple(tagged)).encode()
            assert well.post("logs", body)[0] == 200
            until(lambda: at("TraceletGatewayUndeliverable") == {well.http}, 30)

            alone.stop()
            until(lambda: at("TraceletGatewayDown") == {alone.http}, 30)


def test_a_gateway_that_refuses_loses_or_piles_up_fires(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text('[[token]]\nname = "collector"\ntoken = "sesame"\nprojects = ["*"]\n')
    right, wrong = ({"Authorization": f"Bearer {token}"} for token in ("sesame", "sesame-old"))
    options = ("--tokens", str(path), "--unknown-bytes", "1kB", "--grace", "0s")
    server = shipped(tmp_path / "prometheus")
    quick(server, windows=True)
    with GatewayProcess(tmp_path / "gateway", "http://127.0.0.1:9", *options) as gateway:
        watch(server, "tracelet-gateway", gateway.http)
        with server:
            alerts, run, count = firing(server), Sender("piles-up"), 0

            def pile_up(size: int) -> None:
                nonlocal count
                for body in run.bodies(made(size, "loss", start=now_ns(10 * MINUTE) + count * 1_000_000)):
                    assert gateway.post("metrics", body, right)[0] == 200
                count += size

            pile_up(100)
            until(lambda: bool(server.now("tracelet_gateway_undelivered_records > 0")), 30)
            names = ["TraceletGatewayTokensRefused", "TraceletGatewayLosesData", "TraceletSpoolFilling"]
            assert {name: alerts(name) for name in names} == {name: [] for name in names}

            assert gateway.post("metrics", run.bodies(made(1, "loss", start=now_ns()))[0], wrong)[0] == 503
            until(lambda: bool(alerts("TraceletGatewayTokensRefused")), 30)

            unknown = points_request("of-tomorrow", wire="2.0", count=50).SerializeToString()
            assert gateway.post("metrics", unknown, right)[0] == 200
            until(lambda: bool(alerts("TraceletGatewayLosesData")), 30)

            assert alerts("TraceletSpoolFilling") == []
            pile_up(100_000)
            each_moment(lambda: pile_up(100), lambda: bool(alerts("TraceletSpoolFilling")))
            # What was refused once is over; a file of tokens that can't be read is a refusal to come.
            until(lambda: not alerts("TraceletGatewayTokensRefused"), 30)
            path.write_text("[[token\n")
            pile_up(1)  # with a request the file is looked at
            until(lambda: bool(server.now("tracelet_gateway_tokens_file_bad == 1")), 30)
            until(lambda: bool(alerts("TraceletGatewayTokensRefused")), 30)
