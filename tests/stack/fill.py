"""Real runs into a running stack: by the example that the docs name, with their hosts' metrics and some late points."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.stack.harness import REPOSITORY, Stack, ask, wait_until

EXAMPLE = REPOSITORY / "examples" / "to_the_stack.py"
Said = tuple[str, float, dict[str, str]]
OLD_S = 200 * 3600  # beyond what the collector's filters let through


def fill(stack: Stack, spool: Path, seconds: float = 8.0, epochs: int = 4) -> dict[str, str]:
    """Log three runs through the collector, return run names with run ids when all has arrived."""
    send_late(stack)
    send_host(stack)
    words = [sys.executable, str(EXAMPLE), "--seconds", str(seconds), "--epochs", str(epochs)]
    environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": stack.otlp_http, "TRACELET_DIR": str(spool)}
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=240, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    send_host(stack)
    found = re.findall(r"^run (\w+) with a learning rate of ([\d.]+)$", done.stdout, re.MULTILINE)
    runs = {f"lr-{rate}": run_id for run_id, rate in found}
    assert len(runs) == 3, done.stdout
    ended = 'max by (tracelet_run_id) (tracelet_run_status{tracelet_run_state=~"FINISHED|FAILED"}) == 1'
    wait_until(lambda: len(stack.query(ended)) >= 3, 60, lambda: f"ends in Prometheus: {stack.query(ended)}")
    return runs


def send_host(stack: Stack, *, busy: float = 0.75) -> None:
    """What a node's own collector says of it, by the names of the semantic conventions, straight to Prometheus."""
    values: list[Said] = [
        ("system.cpu.utilization", 1 - busy, {"cpu.mode": "idle"}),
        ("system.cpu.utilization", busy, {"cpu.mode": "user"}),
        ("system.memory.utilization", 0.5 * busy, {"system.memory.state": "used"}),
        ("hw.gpu.utilization", busy, {"hw.id": "GPU 0"}),
        ("hw.gpu.memory.utilization", 0.8 * busy, {"hw.id": "GPU 0"}),
    ]
    say_of_host(stack, os.uname().nodename, values, unit="1")


def send_older_host(stack: Stack, name: str) -> None:
    """What a node says by the names that its receiver had before, and that NVIDIA's DCGM exporter has to this day."""
    cpu: list[Said] = [
        ("system.cpu.utilization", 0.25, {"state": "idle"}),
        ("system.memory.utilization", 0.5, {"state": "used"}),
    ]
    say_of_host(stack, name, cpu, unit="1")
    gpu = {"gpu": "0", "Hostname": name}
    dcgm: list[Said] = [
        ("DCGM_FI_DEV_GPU_UTIL", 90.0, gpu),
        ("DCGM_FI_DEV_FB_USED", 60_000.0, gpu),
        ("DCGM_FI_DEV_FB_FREE", 20_000.0, gpu),
    ]
    say_of_host(stack, name, dcgm, unit="")


def say_of_host(stack: Stack, name: str, values: Sequence[Said], unit: str) -> None:
    """Gauges of a node with their values and labels, as of now."""
    host = {"host.name": name, "service.name": "node"}
    metrics = [
        {"name": name, "unit": unit, "gauge": {"dataPoints": [point(value, labels)]}} for name, value, labels in values
    ]
    post(f"{stack.prometheus}/api/v1/otlp/v1/metrics", "Metrics", host, {"name": "node"}, {"metrics": metrics})


def send_late(stack: Stack) -> None:
    """A point and an event of a run that are too old for Prometheus and Loki: the filters take and count them."""
    resource = {"service.name": "late", "tracelet.run.id": "late", "tracelet.wire.version": "1.0"}
    scope = {"name": "tracelet"}
    old = [{"name": "loss", "gauge": {"dataPoints": [point(1.0, {}, OLD_S)]}}]
    post(f"{stack.otlp_http}/v1/metrics", "Metrics", resource, scope, {"metrics": old})
    record = {"timeUnixNano": str(time.time_ns() - OLD_S * 10**9), "body": {"stringValue": "late"}}
    post(f"{stack.otlp_http}/v1/logs", "Logs", resource, scope, {"logRecords": [record]})


def point(value: float, labels: dict[str, str], age_s: int = 0) -> dict[str, Any]:
    """A data point of a gauge."""
    at = str(time.time_ns() - age_s * 10**9)
    return {"timeUnixNano": at, "asDouble": value, "attributes": attributes(labels)}


def attributes(values: dict[str, str]) -> list[dict[str, Any]]:
    """OTLP's form of a dict of texts."""
    return [{"key": key, "value": {"stringValue": value}} for key, value in values.items()]


def post(address: str, kind: str, resource: dict[str, str], scope: dict[str, str], what: dict[str, Any]) -> None:
    """One OTLP request as JSON."""
    body = {
        f"resource{kind}": [
            {"resource": {"attributes": attributes(resource)}, f"scope{kind}": [{"scope": scope, **what}]}
        ]
    }
    try:
        ask(address, json.dumps(body).encode(), "application/json")
    except json.JSONDecodeError:  # Prometheus answers 200 without a body
        pass
