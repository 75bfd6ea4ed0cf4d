"""Params of every size through the whole path, on a Resource that the collector has added 25 attributes to."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from tests.gateway_process import GatewayProcess
from tests.servers import MlflowServer, run_of
from tests.sinks import HttpSink, attributes, until
from tests.stack.collectors import Collector, Prometheus
from tests.stack.loki_server import Loki
from tracelet import OTLP, Experiment, ExperimentConfig
from tracelet.otlp import semconv

KEYS, BIG = 5_000, 100_000
# What k8s_attributes adds at most, and resource detection beside it.
ADDED = [
    *(
        f"k8s.{kind}.name"
        for kind in ("cluster", "namespace", "node", "pod", "container", "job", "cronjob", "replicaset")
    ),
    *(f"k8s.{kind}.uid" for kind in ("cluster", "node", "pod", "job", "cronjob", "replicaset")),
    *(f"k8s.pod.{each}" for each in ("ip", "hostname", "start_time", "label.app", "label.team", "annotation.note")),
    *("container.id", "container.image.name", "container.image.tag", "cloud.provider", "cloud.region"),
]


def adding(attributes_: list[str]) -> str:
    """Configuration that sets these on every Resource, where k8s_attributes would: behind the memory limiter."""
    sets = [f'set(resource.attributes["{each}"], "value-of-{each}-0123456789")' for each in attributes_]
    statements = [{"context": "resource", "statements": sets}]
    config: dict[str, Any] = {
        "processors": {"transform/k8s": {f"{each}_statements": statements for each in ("metric", "trace", "log")}},
        "service": {
            "pipelines": {
                f"{each}/in": {"processors": ["memory_limiter", "transform/k8s"]}
                for each in ("metrics", "traces", "logs")
            }
        },
    }
    return f"yaml:{json.dumps(config)}"


def many() -> dict[str, Any]:
    """5,000 params, and one of 100 kB."""
    params: dict[str, Any] = {f"layer.{n}.width": n for n in range(KEYS)}
    return params | {"prompt": "".join(chr(97 + n % 26) for n in range(BIG))}


def test_5_000_params_and_one_of_100_kb_arrive_whole_and_loki_refuses_none(tmp_path: Path, loki: Loki) -> None:
    assert len(ADDED) == 25
    params = many()
    with (
        HttpSink() as gateway,
        Prometheus(tmp_path / "prometheus") as prometheus,
        Collector(
            tmp_path / "collector",
            "collector.yaml",
            adding(ADDED),
            prometheus=prometheus.otlp,
            gateway=gateway.url,
            loki=f"{loki.at}/otlp",
        ) as collector,
    ):
        with Experiment("many", ExperimentConfig(project="params"), backend=OTLP(collector.http)) as exp:
            exp.log_params(params)
            exp.log_metric("loss", 1.0, iteration=1)
            run_id = exp.id
        until(lambda: any(attributes(e).get(semconv.EVENT) == semconv.EVENT_ENDED for e in gateway.events()), 30)
        until(lambda: collector.waiting() == 0, 30)
        events = gateway.events()

        # The gateway's branch: every param whole, the long one put together from its pieces.
        found: dict[str, Any] = {}
        pieces: dict[int, str] = {}
        for event in events:
            given = attributes(event)
            if semconv.CHUNK_KEY in given:
                assert given[semconv.CHUNK_KEY] == semconv.PARAM_PREFIX + "prompt"
                pieces[given[semconv.CHUNK_INDEX]] = event.body.string_value
            found |= {
                key.removeprefix(semconv.PARAM_PREFIX): value
                for key, value in given.items()
                if key.startswith(semconv.PARAM_PREFIX)
            }
        whole = "".join(pieces[number] for number in sorted(pieces))
        assert hashlib.sha256(whole.encode()).digest() == hashlib.sha256(params["prompt"].encode()).digest()
        assert found | {"prompt": whole} == params
        for received in gateway.stored:
            if received.signal == "logs":
                assert set(ADDED) < attributes(received.message.resource_logs[0].resource).keys()

        # Loki: every event, none refused.
        assert collector.number("otelcol_exporter_sent_log_records", "otlp_http/loki") == len(events)
        assert not collector.numbers("otelcol_exporter_send_failed_log_records")
        until(lambda: loki.count(f'{{service_name="params"}} | tracelet_run_id="{run_id}"') == len(events), 30)
        # Prometheus: the labels of a series are what they are without the 25.
        until(lambda: prometheus.count("ml_loss") == 1)
        (series,) = prometheus.samples("ml_loss")
        assert not [label for label in series.labels if label.startswith(("k8s", "cloud", "container"))]


def test_5_000_params_and_one_of_100_kb_are_whole_in_mlflow_behind_the_real_gateway_and_all_in_loki(
    tmp_path: Path, loki: Loki, mlflow_server: MlflowServer
) -> None:
    params = many()
    with (
        GatewayProcess(tmp_path / "gateway", mlflow_server.uri) as gateway,
        Collector(
            tmp_path / "collector", "collector.yaml", adding(ADDED), gateway=gateway.http, loki=f"{loki.at}/otlp"
        ) as collector,
    ):
        with Experiment("whole", ExperimentConfig(project="params-whole"), backend=OTLP(collector.http)) as exp:
            exp.log_params(params)
            run_id = exp.id
        stored = run_of(mlflow_server, "whole", project="params-whole", status="FINISHED")
        assert len(stored.data.params) == KEYS + 1
        assert (
            stored.data.params.items()
            >= {name: str(value) for name, value in params.items() if name != "prompt"}.items()
        )
        cut = stored.data.params["prompt"]
        assert params["prompt"].startswith(cut[:1_000])
        (kept_at,) = re.findall(r"whole in artifact (\S+)\]$", cut)
        (file,) = (mlflow_server.folder / "artifacts").glob(f"*/{stored.info.run_id}/artifacts/{kept_at}")
        assert file.read_text() == params["prompt"]
        until(lambda: collector.waiting() == 0, 30)
        sent = collector.number("otelcol_exporter_sent_log_records", "otlp_http/loki")
        assert sent > KEYS / semconv.EVENT_MAX_ATTRIBUTES + BIG / semconv.CHUNK_MAX_BYTES
        assert not collector.numbers("otelcol_exporter_send_failed_log_records")
        until(lambda: loki.count(f'{{service_name="params-whole"}} | tracelet_run_id="{run_id}"') == sent, 30)
