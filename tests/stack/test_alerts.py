"""The alerts: promtool's tests of each rule, and some of them firing in a real Prometheus over real data."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.sinks import HttpSink, until
from tests.stack.collectors import CONFIG, MINUTE, Collector, Prometheus, Sender, made, now_ns, refuse, send
from tests.stack.prometheus_server import promtool, shipped
from tracelet.otlp.encode import MetricsLoad, resource_bytes
from tracelet.otlp.run_metrics import heartbeat_metrics, nonfinite
from tracelet.records import Heartbeat, RunInfo, WriterOpened

FOLDER = CONFIG / "prometheus"
RULES = yaml.safe_load((FOLDER / "rules" / "tracelet.yaml").read_text())
ALERTS = {rule["alert"] for group in RULES["groups"] for rule in group["rules"] if "alert" in rule}


def test_the_files_are_right_and_every_rule_does_what_its_test_says() -> None:
    assert "SUCCESS" in promtool("check", "config", FOLDER / "prometheus.yaml")
    assert "SUCCESS" in promtool("check", "rules", *sorted((FOLDER / "rules").glob("*.yaml")))
    assert "SUCCESS" in promtool("test", "rules", *sorted((FOLDER / "tests").glob("*.yaml")))


def test_every_alert_has_a_case_in_which_it_fires() -> None:
    fires = set()
    for file in (FOLDER / "tests").glob("*.yaml"):
        for case in yaml.safe_load(file.read_text())["tests"]:
            for each in case.get("alert_rule_test", ()):
                if each["exp_alerts"]:
                    fires.add(each["alertname"])
    assert fires == ALERTS


def quick(server: Prometheus) -> None:
    """The rules as shipped, but looked at each second and without `for`."""
    path = server.folder / "rules" / "tracelet.yaml"
    text = re.sub(r"\n\s+for: \w+", "", path.read_text())
    path.write_text(text.replace("interval: 30s", "interval: 1s"))
    config = server.folder / "prometheus.yaml"
    config.write_text(config.read_text().replace("scrape_interval: 15s", "scrape_interval: 1s\n  scrape_timeout: 1s"))


def firing(server: Prometheus) -> Callable[[str], list[dict[str, str]]]:
    def labels(name: str) -> list[dict[str, str]]:
        found = server.ask("alerts")["alerts"]
        return [each["labels"] for each in found if each["state"] == "firing" and each["labels"]["alertname"] == name]

    return labels


def said_by(run_id: str, time_ns: int, iterated_ns: int) -> bytes:
    """What a run's shipper says of it, as it goes to Prometheus."""
    sender = Sender(run_id)
    run = RunInfo(run_id, "vision", "cnn", f"name of {run_id}")
    opened = WriterOpened(time_ns, "first", 1, 0, "a" * 16, time_ns, sender.resource)
    beat = heartbeat_metrics(run, opened, Heartbeat(time_ns, "RUNNING", iterated_ns, {}))
    return MetricsLoad(resource_bytes(sender.resource), tuple(beat)).encode()


def test_runs_that_are_lost_stalled_or_no_longer_finite_fire_over_what_the_library_sends(tmp_path: Path) -> None:
    server = shipped(tmp_path / "prometheus")
    quick(server)
    with server, Collector(tmp_path / "collector", prometheus=server.otlp) as collector:
        now = now_ns()
        bodies = [
            said_by("lost", now - 4 * MINUTE, now - 4 * MINUTE),
            said_by("stalled", now, now - 20 * MINUTE),
            said_by("well", now, now),
        ]
        counter = nonfinite("train/loss", now, now, 3)
        bodies.append(MetricsLoad(resource_bytes(Sender("well").resource), (counter,)).encode())
        assert set(send(collector.http, bodies)) == {200}
        alerts = firing(server)
        until(lambda: len(alerts("TraceletRunLost")) == len(alerts("TraceletRunStalled")) == 1, 30)
        until(lambda: len(alerts("TraceletLossNotFinite")) == 1, 30)
        assert [each["tracelet_run_id"] for each in alerts("TraceletRunLost")] == ["lost"]
        assert [each["tracelet_run_name"] for each in alerts("TraceletRunStalled")] == ["name of stalled"]
        assert [each["tracelet_run_id"] for each in alerts("TraceletLossNotFinite")] == ["well"]


def test_a_queue_at_80_percent_fires_and_stops_when_it_has_drained(tmp_path: Path) -> None:
    with HttpSink() as gateway:
        gateway.rule = lambda _: refuse()
        collector = Collector(tmp_path / "collector", gateway=gateway.url, TRACELET_QUEUE_BYTES="400000")
        address = collector.own_metrics.removeprefix("http://").removesuffix("/metrics")
        server = shipped(tmp_path / "prometheus", targets=address)
        quick(server)
        with collector, server:
            alerts = firing(server)
            run, start = Sender("queued"), now_ns(MINUTE)
            until(lambda: bool(server.now("otelcol_exporter_queue_capacity")), 30)
            assert alerts("TraceletCollectorQueueFilling") == []
            size, limit = 0, time.monotonic() + 60
            while collector.waiting() < 0.85 * 400_000:
                assert time.monotonic() < limit
                (body,) = run.bodies(made(500, "loss", start=start + size * 1000 * 1_000_000))
                size += 1
                if send(collector.http, [body]) != [200]:
                    break
            until(lambda: len(alerts("TraceletCollectorQueueFilling")) == 1, 30)
            (alert,) = alerts("TraceletCollectorQueueFilling")
            assert (alert["exporter"], alert["data_type"]) == ("otlp_http/gateway", "metrics")
            gateway.rule = None
            until(lambda: alerts("TraceletCollectorQueueFilling") == [], 60)
