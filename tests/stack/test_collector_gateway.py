"""Real collector, gateway and MLflow while training goes on: the gateway away until its queue is full, tokens rotated.

Pattern: programs log until they are told that it is enough; what they send to is taken away, or changes its mind; at
the end every point is asked for, in both backends. Limit: 4 minutes.
"""

from __future__ import annotations

import re
import ssl
import urllib.error
import urllib.request
from pathlib import Path

from tests.gateway_process import GatewayProcess
from tests.servers import MlflowServer
from tests.sinks import certificate
from tests.stack.arrived import all_in_both, all_in_mlflow, count_in_prometheus
from tests.stack.collectors import MINUTE, MS, Collector, Prometheus, Sender, made, now_ns, send
from tests.stack.endless import Training
from tests.stack.harness import Backends, wait_until
from tests.stack.prometheus_server import shipped
from tests.stack.training import KEYS, finished, trainings

# Of the gateway's branch alone: more than a request of any run (0.9 MB), and soon full.
QUEUE = 1_500_000
SMALL_QUEUE = f"yaml:exporters::otlp_http/gateway::sending_queue::queue_size: {QUEUE}"
UNFIT = "otelcol_exporter_enqueue_failed_metric_points"


def full(collector: Collector) -> float:
    """How full the gateway's queue of metrics is."""
    return collector.number("otelcol_exporter_queue_size", 'data_type="metrics",exporter="otlp_http/gateway"') / QUEUE


def refused(collector: Collector) -> float:
    """How many points the gateway's queue had no room for."""
    return collector.number(UNFIT, "otlp_http/gateway")


def fill(url: str, collector: Collector, share: float, run_id: str) -> int:
    """Send another run's points until so much of the gateway's queue is taken; how many they were."""
    sent, filler = 0, Sender(run_id)
    while full(collector) < share:
        assert send(url, filler.bodies(made(1_000, "loss", start=now_ns(MINUTE) + sent * MS))) == [200]
        sent += 1_000
    return sent


def watch(server: Prometheus, collector: Collector) -> None:
    """Let a server that is not started yet look at the collector each second, with alerts that are not held back."""
    address = re.sub(r"^http://|/metrics$", "", collector.own_metrics)
    (server.folder / "targets" / "test.yaml").write_text(f"- targets: [{address!r}]\n  labels: {{job: otelcol}}\n")
    rules, config = server.folder / "rules" / "tracelet.yaml", server.folder / "prometheus.yaml"
    rules.write_text(re.sub(r"\n\s+for: \w+", "", rules.read_text()).replace("interval: 30s", "interval: 1s"))
    config.write_text(config.read_text().replace("scrape_interval: 15s", "scrape_interval: 1s\n  scrape_timeout: 1s"))


def is_firing(server: Prometheus, name: str) -> bool:
    return any(a["labels"]["alertname"] == name and a["state"] == "firing" for a in server.ask("alerts")["alerts"])


def begun(training: Training) -> None:
    wait_until(lambda: min(training.iterations()) > 500, 60, lambda: f"{training.iterations()} iterations")


def test_a_gateway_away_until_its_queue_is_full_costs_no_point_and_the_alert_comes_before_the_first_503(
    tmp_path: Path, mlflow_server: MlflowServer
) -> None:
    server = shipped(tmp_path / "prometheus")
    training = Training(tmp_path, ("full-a", "full-b"))
    with GatewayProcess(tmp_path / "gateway", mlflow_server.uri) as gateway:
        collector = Collector(
            tmp_path / "collector", "collector.yaml", SMALL_QUEUE, prometheus=server.otlp, gateway=gateway.http
        )
        watch(server, collector)
        with server, collector:
            gateway.stop()
            filled = fill(collector.http, collector, 0.85, "full-filler")
            wait_until(
                lambda: is_firing(server, "TraceletCollectorQueueFilling"), 60, lambda: str(server.ask("alerts"))
            )
            assert refused(collector) == 0
            with trainings(tmp_path / "spools", training.run_ids, tmp_path, collector.http) as programs:
                begun(training)
                wait_until(lambda: refused(collector) > 0, 60, lambda: f"{full(collector):.0%} full")
                training.goes_on(0)
                # The same request again and again: Prometheus gets no further either, and the spool has the rest.
                backends = Backends(server.at, mlflow_server.uri)
                before = [count_in_prometheus(backends, run_id) for run_id in training.run_ids]
                training.goes_on(0)
                assert [count_in_prometheus(backends, run_id) for run_id in training.run_ids] == before
                assert max(before) < min(training.iterations()) * len(KEYS)
                with gateway.again():
                    training.enough()
                    finished(programs)
                    for run_id, iterations in zip(training.run_ids, training.iterations(), strict=True):
                        all_in_both(backends, run_id, iterations * len(KEYS))
                    mine = backends.mlflow_run("full-filler")["info"]["run_id"]
                    wait_until(
                        lambda: len(backends.mlflow_history(mine, "loss")) == filled,
                        60,
                        lambda: f"{len(backends.mlflow_history(mine, 'loss'))} of {filled}",
                    )
            assert not collector.numbers("otelcol_exporter_send_failed_metric_points")


def test_with_a_second_port_prometheus_goes_on_while_the_gateway_is_away_and_then_mlflow_has_all(
    tmp_path: Path, mlflow_server: MlflowServer
) -> None:
    training = Training(tmp_path, ("two-ports",))
    (run_id,) = training.run_ids
    with (
        GatewayProcess(tmp_path / "gateway", mlflow_server.uri) as gateway,
        Prometheus(tmp_path / "prometheus") as server,
        Collector(
            tmp_path / "collector",
            "collector.yaml",
            "second-port.yaml",
            SMALL_QUEUE,
            prometheus=server.otlp,
            gateway=gateway.http,
        ) as collector,
    ):
        gateway.stop()
        fill(collector.second, collector, 0.95, "ports-filler")
        backends = Backends(server.at, mlflow_server.uri)
        with trainings(tmp_path / "spools", training.run_ids, tmp_path, collector.http, collector.second) as programs:
            begun(training)
            wait_until(lambda: refused(collector) > 0, 60, lambda: f"{full(collector):.0%} full")
            training.goes_on(0)
            (logged,) = training.iterations()
            wait_until(
                lambda: count_in_prometheus(backends, run_id) >= logged * len(KEYS),
                60,
                lambda: f"{count_in_prometheus(backends, run_id)} of {logged * len(KEYS)}",
            )
            with gateway.again():
                training.enough()
                finished(programs)
                all_in_both(backends, run_id, training.iterations()[0] * len(KEYS))


TOKEN = '[[token]]\nname = "collector"\ntoken = "{}"\nprojects = ["*"]\n'


def test_tokens_are_rotated_on_both_sides_of_the_collector_while_training_goes_on(
    tmp_path: Path, mlflow_server: MlflowServer
) -> None:
    """With each a moment in which the two sides don't agree: senders keep their data, and so does the collector."""
    public, key = certificate(tmp_path)
    inbound, outbound, taken = tmp_path / "inbound", tmp_path / "outbound", tmp_path / "tokens.toml"
    inbound.write_text("run-old\n")
    outbound.write_text("gateway-old\n")
    taken.write_text(TOKEN.format("gateway-old"))
    tls = ("--tls-cert", str(public), "--tls-key", str(key))
    old, new = Training(tmp_path, ("token-old",)), Training(tmp_path, ("token-new",))
    with (
        GatewayProcess(
            tmp_path / "gateway", mlflow_server.uri, "--tokens", str(taken), "--grace", "0s", *tls
        ) as gateway,
        Collector(
            tmp_path / "collector",
            "collector.yaml",
            "auth-tls.yaml",
            gateway=by_name(gateway.http),
            TRACELET_TOKENS_FILE=str(inbound),
            TRACELET_GATEWAY_TOKEN_FILE=str(outbound),
            TRACELET_GATEWAY_CA=str(public),
            TRACELET_TLS_CERT=str(public),
            TRACELET_TLS_KEY=str(key),
        ) as collector,
    ):
        url = by_name(collector.http)

        def status(token: str) -> int:
            """Of an empty request."""
            headers = {"Content-Type": "application/x-protobuf", "Authorization": f"Bearer {token}"}
            asked = urllib.request.Request(f"{url}/v1/metrics", b"", headers)
            try:
                with urllib.request.urlopen(
                    asked, context=ssl.create_default_context(cafile=str(public)), timeout=10
                ) as answer:
                    return int(answer.status)
            except urllib.error.HTTPError as error:
                with error:
                    return error.code

        def variables(token: str) -> dict[str, str]:
            return {
                "OTEL_EXPORTER_OTLP_CERTIFICATE": str(public),
                "OTEL_EXPORTER_OTLP_HEADERS": f"Authorization=Bearer%20{token}",
            }

        def sees(text: str) -> None:
            wait_until(lambda: text in gateway.log, 60, lambda: gateway.log[-2000:])

        with trainings(tmp_path / "a", old.run_ids, tmp_path, url, environ=variables("run-old")) as first:
            begun(old)
            # Toward the gateway in the wrong order: it knows the new one alone, the collector has still the old one.
            taken.write_text(TOKEN.format("gateway-new"))
            sees("REFUSED (wrong token)")
            outbound.write_text("gateway-new\n")
            # At the door, as it should be: both for a while ...
            inbound.write_text("run-old\nrun-new\n")
            wait_until(lambda: status("run-new") == 200, 30, lambda: str(status("run-new")))
            with trainings(tmp_path / "b", new.run_ids, tmp_path, url, environ=variables("run-new")) as second:
                begun(new)
                # ... and too early without the old one, which a run still has.
                inbound.write_text("run-new\n")
                wait_until(lambda: status("run-old") == 401, 30, lambda: str(status("run-old")))
                old.goes_on(0)
                inbound.write_text("run-old\nrun-new\n")
                old.enough()  # for both: they look at one file
                finished([*first, *second])
        backends = Backends("", mlflow_server.uri)
        for training in (old, new):
            all_in_mlflow(backends, training.run_ids[0], training.iterations()[0] * len(KEYS))
        said = gateway.log + collector.log.read_text(errors="replace")
        assert "Dropping data" not in said
        assert not [token for token in ("run-old", "run-new", "gateway-old", "gateway-new") if token in said]


def by_name(url: str) -> str:
    """An address as the certificate has it."""
    return re.sub(r"^https?://127\.0\.0\.1", "https://localhost", url)
