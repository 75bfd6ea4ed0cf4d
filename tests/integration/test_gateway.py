"""Requests of real runs through the gateway's inside into a real MLflow: in any order, again, over restarts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.arrivals import arrival, take
from tests.recorded import LONG, decoded, record
from tests.servers import MlflowServer, Spoil, get_run, recording_proxy, rows_of
from tests.shipping import START_NS, until
from tests.sinks import Received
from tracelet import destinations, ids
from tracelet.backends import MLflow
from tracelet.cli.main import main
from tracelet.gateway.intake import Caller, Intake


def intake_on(root: Path, server: MlflowServer, **options: Any) -> Intake:
    destination, secrets = destinations.to_destination(MLflow(tracking_uri=server.uri), {}, root)
    intake = Intake(root, [destination], {destination["id"]: secrets}, {}, **options)
    intake.start()
    return intake


def mlflow_id(server: MlflowServer, run_id: str, status: str | None = "FINISHED") -> str:
    def found() -> str | None:
        experiments = server.ask("experiments/search", {"max_results": 1000}).get("experiments", [])
        query = {
            "experiment_ids": [one["experiment_id"] for one in experiments],
            "filter": f"tags.`tracelet.run.id` = '{run_id}'",
        }
        runs = server.ask("runs/search", query).get("runs", [])
        assert len(runs) < 2, "two runs were made of one"
        fitting = [run["info"]["run_id"] for run in runs if status in (None, run["info"]["status"])]
        return fitting[0] if fitting else None

    return str(until(found, within_s=60))


def check(server: MlflowServer, run_id: str, points: int) -> None:
    """All of the run stands in MLflow, once."""
    found = mlflow_id(server, run_id)
    until(lambda: len(rows_of(server, found, "loss")) >= points, within_s=60)
    rows = rows_of(server, found, "loss")
    assert sorted((row.step, row.value) for row in rows) == [(i, 1.0 / (i + 1)) for i in range(points)]
    until(lambda: get_run(server, found).data.params.keys() >= {"lr", "long"}, within_s=30)
    run = get_run(server, found)
    assert run.data.params["lr"] == "0.1"
    assert run.data.params["long"].startswith(LONG[:1000])
    assert run.data.tags["mood"] == "late"
    assert run.info.run_name == f"name of {run_id}"
    assert run.info.end_time is not None


ORDERS: dict[str, Callable[[Received], int]] = {
    "metrics first": lambda one: ("metrics", "logs", "traces").index(one.signal),
    "logs first": lambda one: ("logs", "traces", "metrics").index(one.signal),
    "spans first": lambda one: ("traces", "metrics", "logs").index(one.signal),
}


@pytest.mark.parametrize("order", [*ORDERS, "backwards"])
def test_a_run_is_whole_in_mlflow_in_whatever_order_it_arrives(
    tmp_path: Path, mlflow_server: MlflowServer, order: str
) -> None:
    run_id = ids.new_run_id()
    requests = record(tmp_path / "client", run_id)
    requests = requests[::-1] if order == "backwards" else sorted(requests, key=ORDERS[order])
    intake = intake_on(tmp_path / "root", mlflow_server)
    try:
        for request in requests:
            intake.take(decoded(request), Caller())
            threading.Event().wait(0.05)
        check(mlflow_server, run_id, 300)
    finally:
        intake.close()


def hand_in(intake: Intake, requests: Sequence[Received]) -> None:
    for request in requests:
        intake.take(decoded(request), Caller())


def test_three_runs_at_once_with_repeats_and_a_restart_between(tmp_path: Path, mlflow_server: MlflowServer) -> None:
    runs = {ids.new_run_id(): points for points in (300, 1500, 2500)}
    recorded = {run_id: record(tmp_path / run_id, run_id, points=points) for run_id, points in runs.items()}
    halves = [{run: part(requests) for run, requests in recorded.items()} for part in (_first_half, _second_half)]
    for half in halves:
        intake = intake_on(tmp_path / "root", mlflow_server)
        threads = [threading.Thread(target=hand_in, args=(intake, requests)) for requests in half.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        before = intake.run_info()
        for requests in half.values():
            hand_in(intake, requests)
        assert intake.run_info().points == before.points
        intake.close()
    intake = intake_on(tmp_path / "root", mlflow_server)
    try:
        for requests in recorded.values():
            hand_in(intake, requests)
        assert intake.run_info().points == 0  # all of it was there
        for run_id, points in runs.items():
            check(mlflow_server, run_id, points)
    finally:
        intake.close(20.0)


def _first_half(requests: list[Received]) -> list[Received]:
    return requests[: len(requests) // 2]


def _second_half(requests: list[Received]) -> list[Received]:
    return requests[len(requests) // 2 :]


def test_a_second_attempt_makes_the_run_go_on_and_ends_it(tmp_path: Path, mlflow_server: MlflowServer) -> None:
    run_id = ids.new_run_id()
    first = record(tmp_path / "one", run_id, points=200, fails=True)
    second = record(tmp_path / "two", run_id, points=100, first=200)
    intake = intake_on(tmp_path / "root", mlflow_server)
    try:
        hand_in(intake, first)
        failed = mlflow_id(mlflow_server, run_id, "FAILED")
        hand_in(intake, _first_half(second))
        assert mlflow_id(mlflow_server, run_id, "RUNNING") == failed
        hand_in(intake, first)  # again: an older attempt's end is not the run's
        hand_in(intake, _second_half(second))
        check(mlflow_server, run_id, 300)
    finally:
        intake.close()


def test_a_lost_run_has_the_tag_until_it_speaks_again(tmp_path: Path, mlflow_server: MlflowServer) -> None:
    run_id = ids.new_run_id()
    requests = record(tmp_path / "client", run_id)
    intake = intake_on(tmp_path / "root", mlflow_server, lost_after_s=0.5)
    try:
        hand_in(intake, requests[:1])
        found = mlflow_id(mlflow_server, run_id, "RUNNING")
        until(lambda: get_run(mlflow_server, found).data.tags.get("tracelet.state") == "LOST", within_s=30)
        assert get_run(mlflow_server, found).info.status == "RUNNING"
        hand_in(intake, requests[1:])
        check(mlflow_server, run_id, 300)
        until(lambda: "tracelet.state" not in get_run(mlflow_server, found).data.tags, within_s=30)
    finally:
        intake.close()


class Ahead:
    """The time of day, some seconds ahead."""

    ahead_s = 0.0
    monotonic = staticmethod(time.monotonic)

    def time_ns(self) -> int:
        return time.time_ns() + round(self.ahead_s * 1e9)


def test_a_run_of_two_writers_that_was_lost_while_mlflow_was_away_is_not_lost_in_it(
    tmp_path: Path, mlflow_server: MlflowServer
) -> None:
    run_id, is_away = ids.new_run_id(), threading.Event()
    away = Spoil(forward=False, answer=(503, b"", {"Retry-After": "1"}))
    is_away.set()
    with recording_proxy(mlflow_server.uri) as proxy:
        proxy.rule = lambda seen: away if is_away.is_set() else Spoil()
        destination, _ = destinations.to_destination(MLflow(tracking_uri=proxy.uri), {}, tmp_path)
        clock = Ahead()
        intake = Intake(tmp_path / "root", [destination], {}, {}, clock=clock)
        intake.start()
        try:
            take(intake, arrival(run_id, attempt="a1", points=[("loss", 1.0, 0)]))
            take(intake, arrival(run_id, attempt="a2", points=[("loss", 1.0, 1)], first=START_NS + 10**9))
            clock.ahead_s = 4000.0
            until(lambda: intake.run_info().lost == 1, within_s=30)  # said by the second one's writer
            take(intake, arrival(run_id, attempt="a1", points=[("loss", 1.0, 2)], first=START_NS + 2 * 10**9))
            assert intake.run_info().lost == 0  # and this by the first one's
            is_away.clear()
            found = mlflow_id(mlflow_server, run_id, "RUNNING")
            until(lambda: len(rows_of(mlflow_server, found, "loss")) == 3, within_s=60)
            until(lambda: intake.run_info().undelivered == 0, within_s=30)
            assert "tracelet.state" not in get_run(mlflow_server, found).data.tags
        finally:
            intake.close()


def test_the_commands_for_people_work_on_a_gateways_folder(
    tmp_path: Path, mlflow_server: MlflowServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id, going_on = ids.new_run_id(), ids.new_run_id()
    requests = record(tmp_path / "client", run_id)
    root = tmp_path / "root"
    intake = intake_on(root, mlflow_server)
    monkeypatch.setenv("TRACELET_DIR", str(root))
    try:
        hand_in(intake, requests)
        hand_in(intake, [one for one in record(tmp_path / "other", going_on) if one.signal == "metrics"][:1])
        check(mlflow_server, run_id, 300)
    finally:
        intake.close(10.0)
    assert main(["runs"]) == 0
    listed = capsys.readouterr().out
    assert run_id[:8] in listed
    (line,) = [line for line in listed.splitlines() if line.startswith(going_on[:8])]
    assert " RUNNING " in line  # its files are closed, and it has not ended
    assert main(["show", run_id]) == 0
    shown = capsys.readouterr().out
    assert "FINISHED" in shown
    assert "loss" in shown
    assert main(["ship", run_id]) == 0
    assert main(["prune", "--keep", "0d"]) == 0
    assert (root / going_on).exists()
    assert not (root / run_id).exists()
