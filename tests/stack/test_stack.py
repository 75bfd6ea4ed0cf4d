"""scripts/stack.py up: everything answers, each piece comes back on its old port, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from tests.stack.harness import (
    REPOSITORY,
    Stack,
    ask,
    environment,
    is_running,
    require,
    stack_command,
    text_of,
    wait_until,
)

SMALL = ("gateway", "mlflow")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Prometheus and the collector only: up in a second, for tests that are about the life of a stack."""
    planted = {"TRACELET_GATEWAY_TOKEN": "planted-7c1e", "TRACELET_METRIC_PREFIX": "own."}
    with Stack(tmp_path_factory.mktemp("small"), without=SMALL, environment=planted) as running:
        yield running


def run_stack(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """stack.py to its end."""
    return subprocess.run(
        stack_command(*words), capture_output=True, text=True, check=False, timeout=120, env=environment() | more
    )


def send(stack: Stack, name: str, value: float) -> None:
    """One point of one run through the collector."""
    point = {"timeUnixNano": str(time.time_ns()), "asDouble": value}
    scope = {"scope": {"name": "tracelet"}, "metrics": [{"name": name, "gauge": {"dataPoints": [point]}}]}
    resource = {"attributes": [{"key": "tracelet.run.id", "value": {"stringValue": "r1"}}]}
    body = {"resourceMetrics": [{"resource": resource, "scopeMetrics": [scope]}]}
    ask(f"{stack.otlp_http}/v1/metrics", json.dumps(body).encode(), "application/json")


# ---- a whole one -------------------------------------------------------------------------------------------------


def test_the_usual_stack_answers_at_every_address_of_stack_json(stack: Stack) -> None:
    state = stack.state
    assert {"prometheus", "collector", "mlflow", "gateway"} <= state["pids"].keys()
    assert all(is_running(pid) for pid in state["pids"].values())
    assert text_of(f"{state['prometheus']}/-/ready")
    assert text_of(f"{state['mlflow']}/health") == "OK"
    assert text_of(f"{state['gateway']}/readyz")
    assert "Server available" in text_of(state["collector_health"])
    assert "otelcol_process_uptime" in text_of(state["collector_metrics"])
    for address in (state["otlp_http"], state["otlp_grpc"]):
        parts = urlsplit(address)
        socket.create_connection((parts.hostname, parts.port), timeout=5).close()
    for command in state["commands"].values():
        assert command.keys() == {"argv", "folder", "environment", "log"}
        assert Path(command["argv"][0]).exists()
        assert Path(command["folder"]).is_dir()
        assert Path(command["log"]).is_file()


def test_the_collector_runs_with_the_file_that_users_get(stack: Stack) -> None:
    words = stack.state["commands"]["collector"]["argv"]
    assert words[words.index("--config") + 1].endswith("/collector-config/collector.yaml")


def test_prometheus_scrapes_what_runs_here(stack: Stack) -> None:
    """Its own files, only the addresses differ."""
    wanted = {urlsplit(stack.collector_metrics).netloc, urlsplit(stack.gateway).netloc}
    up: set[str] = set()

    def scraped() -> bool:
        up.update(series["metric"]["instance"] for series in stack.query("up == 1"))
        return wanted <= up

    wait_until(scraped, 60, lambda: f"up: {up}, wanted: {wanted}")


# ---- its life ----------------------------------------------------------------------------------------------------


def test_a_killed_piece_brings_down_no_other_and_comes_back_with_port_and_data(small: Stack) -> None:
    send(small, "kept", 4.5)
    wait_until(lambda: bool(small.samples("own_kept")), 30, lambda: "the point did not arrive")
    address, before = small.prometheus, small.state["pids"]
    small.kill("prometheus")
    assert is_running(before["collector"])
    small.start("prometheus")
    assert small.prometheus == address
    assert small.pid("prometheus") != before["prometheus"]
    assert small.pid("collector") == before["collector"]
    assert [value for _, rows in small.samples("own_kept") for _, value in rows] == [4.5]


def test_what_the_collector_acknowledged_while_prometheus_was_down_arrives_after_its_return(small: Stack) -> None:
    small.stop("prometheus")
    send(small, "late", 1.25)
    small.start("prometheus")
    wait_until(lambda: bool(small.samples("own_late")), 60, lambda: small.log("collector")[-2000:])


def test_restart_takes_a_piece_that_runs_as_well(small: Stack) -> None:
    before = small.pid("collector")
    small.start("collector")
    assert small.pid("collector") != before
    assert not is_running(before)


def test_restart_takes_a_piece_that_hangs(small: Stack) -> None:
    before = small.pid("collector")
    small.pause("collector")
    small.start("collector")
    assert not is_running(before)


def test_no_secret_stands_in_what_a_stack_writes_down(small: Stack) -> None:
    state = (small.folder / "stack.json").read_text()
    assert "planted" not in state
    assert "own." in state  # what is no secret is told
    assert "planted" not in (small.folder / "up.log").read_text()


def test_restart_names_the_pieces_if_there_is_none_of_that_name(small: Stack) -> None:
    done = run_stack("restart", "--dir", str(small.folder), "grafana")
    assert done.returncode == 1
    assert "no 'grafana'; it has collector, prometheus" in done.stderr


def test_a_second_stack_in_the_same_folder_is_refused_and_disturbs_nothing(small: Stack) -> None:
    before = small.state
    done = run_stack("up", "--dir", str(small.folder), "--without", ",".join(SMALL))
    assert done.returncode == 1
    assert "runs in" in done.stderr
    assert small.state == before
    assert small.query("vector(1)")


def test_restart_without_a_stack_says_how_to_start_one(tmp_path: Path) -> None:
    done = run_stack("restart", "--dir", str(tmp_path), "collector")
    assert done.returncode == 1
    assert "up --dir" in done.stderr


def test_sigterm_leaves_no_process_behind_not_even_a_hanging_one(tmp_path: Path) -> None:
    with Stack(tmp_path / "stack", without=SMALL) as stack:
        pids = stack.state["pids"].values()
        stack.pause("prometheus")
    assert stack.process is not None
    assert stack.process.returncode == 0
    assert not any(is_running(pid) for pid in pids)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="only Linux ends children with their parent")
def test_a_stack_killed_with_9_leaves_nothing_for_good_and_starts_again(tmp_path: Path) -> None:
    stack = Stack(tmp_path / "stack", without=SMALL)
    with stack:
        pids = stack.state["pids"].values()
        os.kill(stack.state["supervisor"], signal.SIGKILL)
        wait_until(lambda: not any(is_running(pid) for pid in pids), 30, lambda: f"left: {pids}")
    with stack:
        assert stack.query("vector(1)")


def test_the_next_up_in_a_folder_has_the_same_addresses_and_the_data(tmp_path: Path) -> None:
    """What waits in a spool knows where it has to go by the address."""
    stack = Stack(tmp_path / "stack", without=SMALL)
    with stack:
        before = stack.state
        send(stack, "loss", 2.5)
        wait_until(lambda: bool(stack.samples("ml_loss")), 30, lambda: "the point did not arrive")
    with stack:
        after = stack.state
        assert stack.samples("ml_loss")
    assert {k: v for k, v in before.items() if "http" in str(v)[:4]} == {
        k: v for k, v in after.items() if "http" in str(v)[:4]
    }


def test_a_piece_that_dies_at_its_start_ends_all_and_its_last_words_are_shown(tmp_path: Path) -> None:
    require("collector", "prometheus")
    (tmp_path / "wrong.yaml").write_text(
        "receivers: {nobody: {}}\nexporters: {nop: {}}\n"
        "service: {pipelines: {logs: {receivers: [nobody], exporters: [nop]}}}\n"
    )
    folder = tmp_path / "stack"
    done = run_stack("up", "--dir", str(folder), "--without", ",".join(SMALL), "--config", str(tmp_path / "wrong.yaml"))
    assert done.returncode == 1
    assert "collector ended with 1 at its start" in done.stderr
    assert "nobody" in done.stderr
    assert not any(is_running(pid) for pid in json.loads((folder / "stack.json").read_text())["pids"].values())


def test_more_gateways_than_the_file_has_are_refused_before_anything_starts(tmp_path: Path) -> None:
    require("collector", "prometheus")
    done = run_stack("up", "--dir", str(tmp_path / "stack"), "--gateways", "3")
    assert done.returncode == 1
    assert "gateways.yaml is for two" in done.stderr
    assert not (tmp_path / "stack" / "stack.json").exists()


def test_ports_are_outside_the_range_of_outgoing_connections(small: Stack) -> None:
    """A client that keeps trying a port of that range connects to itself in the end, and the port is taken."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = [urlsplit(value).port for value in small.state.values() if isinstance(value, str) and "://" in value]
    assert ports
    assert all(port is not None and port < first for port in ports)


def test_a_branch_without_a_backend_here_is_switched_off(small: Stack) -> None:
    """Its queue would fill for a day, and then stop the other branches."""
    words = small.state["commands"]["collector"]["argv"]
    assert "yaml:service::pipelines::traces/tempo::exporters: [nop]" in words
    assert "yaml:service::pipelines::logs/loki::exporters: [nop]" in words
    assert "yaml:service::pipelines::metrics/gateway::exporters: [nop]" in words
    assert not [word for word in words if "metrics/prometheus" in word]


def test_targets_get_the_addresses_of_this_machine_and_what_does_not_run_here_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    from stack_services import write_targets

    (tmp_path / "all.yaml").write_text(
        """# as docker-compose.yml names them
- targets: [collector:8888]
  labels: {job: collector}
- targets: ["gateway:4318", "gateway-2:4318"]
- targets: [tempo:3200]
"""
    )
    (tmp_path / "tempo.yaml").write_text('- targets: ["tempo:3200"]\n')
    write_targets(
        tmp_path,
        {
            "collector_metrics": "http://127.0.0.1:1/metrics",
            "core_collector_metrics": "http://127.0.0.1:2/metrics",
            "gateways": ["http://127.0.0.1:3"],
        },
    )
    assert yaml.safe_load((tmp_path / "all.yaml").read_text()) == [
        {"targets": ["127.0.0.1:1", "127.0.0.1:2"], "labels": {"job": "collector"}},
        {"targets": ["127.0.0.1:3"]},
    ]
    assert yaml.safe_load((tmp_path / "tempo.yaml").read_text()) == []
