"""The MLflow exporter against a real MLflow server, over its REST API."""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mlflow_batches import (
    START_NS,
    batch,
    deliver,
    ended,
    exporters_closed,
    opened,
    opened_exporter,
    persist,
    points,
    run_info,
    started,
)
from tests.servers import MlflowServer, Proxy, Seen, Spoil, get_run, recording_proxy, rows_of
from tracelet.exporters.base import Delivered, Rejected, RetryLater
from tracelet.exporters.mlflow.exporter import MLflowExporter
from tracelet.exporters.mlflow.limits import SQL_INFINITY
from tracelet.records import ArtifactLogged, Batch, ErrorInfo, ParamsLogged, Part, RunInfo, TagsSet

__all__ = ["exporters_closed"]

MS = START_NS // 1_000_000


@pytest.fixture
def run() -> RunInfo:
    return run_info(uuid.uuid4().hex)


@pytest.fixture
def proxy(mlflow_server: MlflowServer) -> Iterator[Proxy]:
    with recording_proxy(mlflow_server.uri) as spoiling:
        yield spoiling


def mlflow_id(exporter: MLflowExporter) -> str:
    return str(exporter.memory()["run_id"])


def artifact(folder: Path, path: str, content: bytes, **other: Any) -> ArtifactLogged:
    """A file of ours in the spool folder, as log_artifact would have put it there."""
    stored = folder / "artifacts" / hashlib.sha256(content + path.encode("utf-8", "surrogateescape")).hexdigest()
    stored.parent.mkdir(parents=True, exist_ok=True)
    stored.write_bytes(content)
    fields: dict[str, Any] = {
        "stored": str(stored.relative_to(folder)),
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        **other,
    }
    return ArtifactLogged(1, path, "/gone/since", media_type="text/plain", **fields)


# ---- what a run looks like ---------------------------------------------------------------------------------------


def test_a_batch_of_params_tags_and_points_becomes_a_run(mlflow_server: MlflowServer, run: RunInfo) -> None:
    exporter = opened_exporter(mlflow_server.uri, run)
    rows = [("loss", 1.0 / (i + 1), i, i) for i in range(100)]
    records = (started(), ParamsLogged(1, {"lr": 0.001, "on": True, "none": "None"}), TagsSet(1, {"team": "ml"}))
    deliver(exporter, batch(run, *records, rows=rows), batch(run, ended(), number=2))
    seen = get_run(mlflow_server, mlflow_id(exporter))
    assert (seen.info.status, seen.info.user_id, seen.info.run_name) == ("FINISHED", "somebody", "test run")
    assert (seen.info.start_time, seen.info.end_time) == (MS, MS + 5000)
    assert seen.data.params == {"lr": "0.001", "on": "True", "none": "None"}
    assert (seen.data.tags["team"], seen.data.tags["tracelet.run.id"]) == ("ml", run.run_id)
    assert [(r.value, r.step, r.timestamp) for r in rows_of(mlflow_server, mlflow_id(exporter))] == [
        (value, step, MS + ms) for _, value, step, ms in rows
    ]
    link = f"{mlflow_server.uri}/#/experiments/{seen.info.experiment_id}/runs/{seen.info.run_id}"
    assert exporter.memory()["link"] == link
    exporter.close()


def test_values_steps_and_infinity_are_kept_and_told(mlflow_server: MlflowServer, run: RunInfo) -> None:
    exporter = opened_exporter(mlflow_server.uri, run)
    values = [math.nan, math.inf, -math.inf, 5e-324, 1.7976931348623157e308, -0.0, 0.1]
    rows = [
        ("v", value, step, ms)
        for ms, (value, step) in enumerate(zip(values, [0, -1, 2**63 - 1, -(2**63), 7, 7, 7], strict=True))
    ]
    deliver(exporter, batch(run, started(), rows=rows))
    stored = rows_of(mlflow_server, mlflow_id(exporter))
    assert [r.step for r in stored] == [row[2] for row in rows]
    assert [r.value for r in stored] == [0.0, SQL_INFINITY, -SQL_INFINITY, 5e-324, SQL_INFINITY, 0.0, 0.1]
    assert [r.is_nan for r in stored] == [True, *[False] * 6]
    assert "1.7976931348623157e+308" in get_run(mlflow_server, mlflow_id(exporter)).data.tags["tracelet.infinite.v"]


def test_names_mlflow_refuses_are_made_legal_and_told_apart(mlflow_server: MlflowServer, run: RunInfo) -> None:
    exporter = opened_exporter(mlflow_server.uri, run)
    names = [
        "acc@1",
        "acc#1",
        "/rooted",
        "a//b",
        "../up",
        "x" * 251,
        "tab\tname",
        "ok/損失 é:b",
        ".",
        "naïve-\udc80",
        "a/",
    ]
    rows = [(name, float(i), i, i) for i, name in enumerate(names)]
    deliver(exporter, batch(run, started(), ParamsLogged(1, dict.fromkeys(names, 1)), rows=rows))
    data = get_run(mlflow_server, mlflow_id(exporter)).data
    assert len(data.metrics) == len(data.params) == len(names)
    assert "ok/損失 é:b" in data.metrics
    told = {value for key, value in data.tags.items() if key.startswith("tracelet.name.")}
    assert told == {n.encode("utf-8", "backslashreplace").decode() for n in names if n != "ok/損失 é:b"}


def test_a_param_keeps_its_first_value_and_its_changes_become_a_tag(mlflow_server: MlflowServer, run: RunInfo) -> None:
    exporter = opened_exporter(mlflow_server.uri, run)
    changes = [ParamsLogged(1, {"lr": value, "same": 1}) for value in (0.1, 0.2, 0.1)]
    deliver(exporter, batch(run, started(), *changes[:2]))
    data = get_run(mlflow_server, mlflow_id(exporter)).data
    assert (data.params, data.tags["tracelet.param.lr"]) == ({"lr": "0.1", "same": "1"}, "0.2")
    deliver(exporter, batch(run, changes[2], number=2))
    assert get_run(mlflow_server, mlflow_id(exporter)).data.tags["tracelet.param.lr"] == "0.1"
    again = opened_exporter(mlflow_server.uri, run)  # another process: knows what MLflow knows
    deliver(again, batch(run, ParamsLogged(1, {"lr": 0.3}), number=3))
    data = get_run(mlflow_server, mlflow_id(exporter)).data
    assert (data.params["lr"], data.tags["tracelet.param.lr"]) == ("0.1", "0.3")


def test_a_param_somebody_else_set_meanwhile_becomes_a_tag(mlflow_server: MlflowServer, run: RunInfo) -> None:
    exporter = opened_exporter(mlflow_server.uri, run)
    deliver(exporter, batch(run, started()))
    other = {"run_id": mlflow_id(exporter), "params": [{"key": "p7", "value": "theirs"}]}
    mlflow_server.ask("runs/log-batch", other)
    deliver(exporter, batch(run, ParamsLogged(1, {f"p{n}": n for n in range(20)}), number=2))
    data = get_run(mlflow_server, mlflow_id(exporter)).data
    assert data.params == {**{f"p{n}": str(n) for n in range(20)}, "p7": "theirs"}
    assert data.tags["tracelet.param.p7"] == "7"


def test_an_error_and_an_older_attempts_end_leave_what_they_should(mlflow_server: MlflowServer, run: RunInfo) -> None:
    exporter = opened_exporter(mlflow_server.uri, run)
    error = ErrorInfo("ValueError", "no such thing", "Traceback ...")
    deliver(exporter, batch(run, started()), batch(run, ended("FAILED", error), number=2))
    seen = get_run(mlflow_server, mlflow_id(exporter))
    assert seen.info.status == "FAILED"
    assert (seen.data.tags["tracelet.error.type"], seen.data.tags["tracelet.error.message"]) == (
        error.type,
        error.message,
    )
    second = opened("b" * 16, START_NS + 10**10)
    deliver(exporter, batch(run, started(), rows=[("m", 1.0, 1, 1)], number=3, by=second))
    assert get_run(mlflow_server, mlflow_id(exporter)).info.status == "RUNNING"
    deliver(exporter, batch(run, ended("KILLED", newest=False), number=4), batch(run, ended("KILLED"), number=5))
    assert get_run(mlflow_server, mlflow_id(exporter)).info.status == "RUNNING"  # both ends are the first attempt's
    deliver(
        exporter, batch(run, ended(), number=6, by=second), batch(run, rows=[("m", 2.0, 2, 2)], number=7, by=second)
    )
    assert get_run(mlflow_server, mlflow_id(exporter)).info.status == "FINISHED"  # a late point reopens nothing
    assert len(rows_of(mlflow_server, mlflow_id(exporter), "m")) == 2


def test_the_error_of_an_attempt_that_ends_after_a_newer_one_began_elsewhere_is_not_the_runs(
    mlflow_server: MlflowServer, run: RunInfo
) -> None:
    first = opened_exporter(mlflow_server.uri, run)
    deliver(first, batch(run, started()))
    there = opened_exporter(mlflow_server.uri, run)
    deliver(there, batch(run, started(), by=opened("b" * 16, START_NS + 10**10)))
    deliver(first, batch(run, ended("FAILED", ErrorInfo("ValueError", "no such thing", "")), number=2))
    seen = get_run(mlflow_server, mlflow_id(first))
    assert (seen.info.status, [tag for tag in seen.data.tags if "error" in tag]) == ("RUNNING", [])


def test_two_attempts_in_one_batch_are_one_run_begun_by_the_first_and_held_by_the_second(
    mlflow_server: MlflowServer, run: RunInfo
) -> None:
    exporter = opened_exporter(mlflow_server.uri, run)
    later = opened("b" * 16, START_NS + 10**10)
    parts = (
        Part("1" * 16, later, (started(),), points([("m", 2.0, 2, 10_002)])),
        Part("0" * 16, opened(), (started(),), points([("m", 1.0, 1, 1)])),
    )
    assert exporter.begin(Batch(1, run, "/spool/run/host", parts)).attempt() == Delivered()
    found = get_run(mlflow_server, mlflow_id(exporter))
    assert found.data.tags["tracelet.run.attempt"] == f"{START_NS + 10**10}-{'b' * 16}"
    assert (found.info.status, found.info.start_time) == ("RUNNING", MS)
    deliver(exporter, batch(run, ended("KILLED", newest=False), number=2))
    assert get_run(mlflow_server, mlflow_id(exporter)).info.status == "RUNNING"
    deliver(exporter, batch(run, ended(), number=3, by=later))
    assert get_run(mlflow_server, mlflow_id(exporter)).info.status == "FINISHED"


def test_thousands_of_params_and_tags_travel_in_requests_of_their_own(
    mlflow_server: MlflowServer, run: RunInfo, proxy: Proxy
) -> None:
    exporter = opened_exporter(proxy.uri, run)
    params = {f"batch_{n}_loss": n / 7 for n in range(1050)}
    deliver(
        exporter,
        batch(
            run,
            started(),
            ParamsLogged(1, params),
            TagsSet(1, {f"t{n}": "x" for n in range(150)}),
            rows=[("m", 1.0, 1, 1)],
        ),
    )
    data = get_run(mlflow_server, mlflow_id(exporter)).data
    assert data.params == {key: str(value) for key, value in params.items()}
    kinds = [set(json.loads(seen.body)) - {"run_id"} for seen in proxy.calls("runs/log-batch")]
    assert kinds == [{"params"}] * 11 + [{"tags"}] * 2 + [{"metrics"}]


# ---- once and only once ------------------------------------------------------------------------------------------


def spoil_first(proxy: Proxy, end: str, spoil: Spoil, *, holding: bytes = b"") -> None:
    """Spoil the first request whose path ends in `end` and whose body holds `holding`; let all others pass."""
    left = [spoil]

    def rule(seen: Seen) -> Spoil:
        fits = seen.path.partition("?")[0].endswith(end) and holding in seen.body
        return left.pop() if fits and left else Spoil()

    proxy.rule = rule


def metric_requests(proxy: Proxy) -> list[Seen]:
    return [seen for seen in proxy.calls("runs/log-batch") if b'"metrics"' in seen.body]


@pytest.mark.parametrize(
    "spoil",
    [
        Spoil(hang_up=True),
        Spoil(answer=(503, b'{"error_code":"TEMPORARILY_UNAVAILABLE","message":"x"}', {})),
        Spoil(answer=(500, b"", {})),
        Spoil(answer=(504, b"gateway timeout", {})),
    ],
    ids=["hang up", "503", "500", "504"],
)
def test_a_stored_batch_whose_answer_was_lost_is_never_sent_again(
    mlflow_server: MlflowServer, run: RunInfo, proxy: Proxy, spoil: Spoil
) -> None:
    exporter = opened_exporter(proxy.uri, run)
    spoil_first(proxy, "runs/log-batch", spoil, holding=b'"metrics"')
    delivery = exporter.begin(batch(run, started(), rows=[("m", float(i), i, i) for i in range(100)]))
    assert isinstance(delivery.attempt(), RetryLater)
    assert delivery.attempt() == Delivered()
    assert len(metric_requests(proxy)) == 1
    assert len(rows_of(mlflow_server, mlflow_id(exporter))) == 100


def test_a_batch_that_did_not_arrive_is_sent_again(mlflow_server: MlflowServer, run: RunInfo, proxy: Proxy) -> None:
    exporter = opened_exporter(proxy.uri, run)
    spoil_first(proxy, "runs/log-batch", Spoil(forward=False, hang_up=True), holding=b'"metrics"')
    delivery = exporter.begin(batch(run, started(), rows=[("m", float(i), i, i) for i in range(100)]))
    assert isinstance(delivery.attempt(), RetryLater)
    assert delivery.attempt() == Delivered()
    assert len(rows_of(mlflow_server, mlflow_id(exporter))) == 100


def test_a_batch_that_raises_no_latest_value_carries_a_marker(
    mlflow_server: MlflowServer, run: RunInfo, proxy: Proxy
) -> None:
    exporter = opened_exporter(proxy.uri, run)
    deliver(exporter, batch(run, started(), rows=[("m", 1.0, 700, 0)]))
    late = batch(run, rows=[("m", float(i), i, 1 + i) for i in range(500, 600)], number=2)
    spoil_first(proxy, "runs/log-batch", Spoil(hang_up=True), holding=b'"metrics"')
    delivery = exporter.begin(late)
    assert delivery.note["marker"] is True
    assert isinstance(delivery.attempt(), RetryLater)
    assert delivery.attempt() == Delivered()
    assert len(metric_requests(proxy)) == 2
    assert len(rows_of(mlflow_server, mlflow_id(exporter), "m")) == 101
    again = opened_exporter(proxy.uri, run, exporter.memory())  # a shipper that died here asks with the note
    assert again.begin(late, json.loads(json.dumps(dict(delivery.note)))).attempt() == Delivered()
    assert len(metric_requests(proxy)) == 2


@pytest.mark.parametrize("arrived", [True, False])
def test_a_shipper_started_anew_resolves_the_batch_under_way(
    mlflow_server: MlflowServer, run: RunInfo, proxy: Proxy, arrived: bool
) -> None:
    first = opened_exporter(proxy.uri, run)
    deliver(first, batch(run, started(), rows=[("m", 1.0, 1, 1)]))
    spoil_first(proxy, "runs/log-batch", Spoil(forward=arrived, hang_up=True), holding=b'"metrics"')
    under_way = batch(
        run,
        rows=[("m", float("nan") if i == 49 else float(i), 0, 100 + i) for i in range(2, 50)] + [("n", 1.0, 0, 5)],
        number=2,
    )
    delivery = first.begin(under_way)
    note = json.loads(json.dumps(dict(delivery.note)))
    delivery.attempt()
    sent = len(metric_requests(proxy))
    second = opened_exporter(proxy.uri, run, first.memory())
    assert second.begin(under_way, note).attempt() == Delivered()
    assert len(metric_requests(proxy)) == sent + (0 if arrived else 1)
    assert len(rows_of(mlflow_server, mlflow_id(first))) == 1 + 49


def test_a_witness_that_somebody_else_passed_is_looked_up_in_the_history(
    mlflow_server: MlflowServer, run: RunInfo, proxy: Proxy
) -> None:
    exporter = opened_exporter(proxy.uri, run)
    deliver(exporter, batch(run, started()))
    theirs = {"key": "m", "value": 9, "timestamp": MS + 10**6, "step": 10**6}
    for arrived, number, step in ((True, 2, 5), (False, 3, 6)):
        spoil_first(proxy, "runs/log-batch", Spoil(forward=arrived, hang_up=True), holding=b'"metrics"')
        exporter._run.latest.clear()  # type: ignore[union-attr]  # as if the other had not written yet
        delivery = exporter.begin(batch(run, rows=[("m", 1.0, step, step)], number=number))
        assert isinstance(delivery.attempt(), RetryLater)
        mlflow_server.ask("runs/log-batch", {"run_id": mlflow_id(exporter), "metrics": [theirs]})
        theirs["step"] += 1  # type: ignore[operator]
        sent = len(metric_requests(proxy))
        assert delivery.attempt() == Delivered()
        assert len(metric_requests(proxy)) == sent + (0 if arrived else 1)
    assert [r.step for r in rows_of(mlflow_server, mlflow_id(exporter)) if r.step < 10] == [5, 6]


def test_an_unclear_create_makes_no_second_run(mlflow_server: MlflowServer, run: RunInfo, proxy: Proxy) -> None:
    exporter = opened_exporter(proxy.uri, run)
    spoil_first(proxy, "runs/create", Spoil(hang_up=True))
    delivery = exporter.begin(batch(run, started(), rows=[("m", 1.0, 1, 1)]))
    assert isinstance(delivery.attempt(), RetryLater)
    assert delivery.attempt() == Delivered()
    assert len(proxy.calls("runs/create")) == 1
    again = opened_exporter(proxy.uri, run)  # no memory: found by its tag
    deliver(again, batch(run, rows=[("m", 2.0, 2, 2)], number=2))
    assert mlflow_id(again) == mlflow_id(exporter)
    assert len(proxy.calls("runs/create")) == 1


def test_two_shippers_that_make_the_same_run_at_once_write_to_one(
    mlflow_server: MlflowServer, run: RunInfo, proxy: Proxy
) -> None:
    one, two = opened_exporter(proxy.uri, run), opened_exporter(mlflow_server.uri, run)  # neither finds a run
    earlier = opened("b" * 16, START_NS - 1_000_000)

    def rule(seen: Seen) -> Spoil:
        if seen.path.endswith("runs/create"):  # the other's is made while ours is on its way
            deliver(two, batch(run, started(), rows=[("theirs", 2.0, 1, 1)], by=earlier, folder="/spool/run/other"))
            proxy.rule = lambda seen: Spoil()
        return Spoil()

    proxy.rule = rule
    deliver(one, batch(run, started(), rows=[("ours", 1.0, 1, 1)]))
    assert mlflow_id(one) == mlflow_id(two)
    assert {row.key for row in rows_of(mlflow_server, mlflow_id(one))} == {"ours", "theirs"}
    query = {"experiment_ids": [one.memory()["experiment_id"]], "filter": f"tags.`tracelet.run.id` = '{run.run_id}'"}
    assert len(mlflow_server.ask("runs/search", query)["runs"]) == 1  # the empty twin is deleted
    third = opened_exporter(mlflow_server.uri, run)
    assert third.memory()["run_id"] == mlflow_id(one)


def test_a_create_that_comes_late_makes_no_second_run(mlflow_server: MlflowServer, run: RunInfo, proxy: Proxy) -> None:
    exporter = opened_exporter(proxy.uri, run)
    held: list[Seen] = []

    def rule(seen: Seen) -> Spoil:
        if seen.path.endswith("runs/create") and not held:
            held.append(seen)  # it never reached the server, as far as anybody can tell
            return Spoil(forward=False, hang_up=True)
        if seen.path.endswith("runs/create"):
            mlflow_server.ask("runs/create", json.loads(held[0].body))  # and now it has
        return Spoil()

    proxy.rule = rule
    first = batch(run, started(), rows=[("m", 1.0, 1, 1)])
    delivery = exporter.begin(first)
    assert isinstance(delivery.attempt(), RetryLater)
    assert delivery.attempt() == Delivered()
    again = opened_exporter(mlflow_server.uri, run)  # no memory: found by its tag
    assert again.memory()["run_id"] == mlflow_id(exporter)
    assert [row.key for row in rows_of(mlflow_server, mlflow_id(exporter))] == ["m"]


def refusing(word: bytes) -> Any:
    """A rule: what holds `word` is refused as MLflow refuses a whole request for one thing in it."""
    no = b'{"error_code":"INVALID_PARAMETER_VALUE","message":"not this one"}'
    return lambda seen: Spoil(forward=False, answer=(400, no, {})) if word in seen.body else Spoil()


def test_one_refused_thing_does_not_keep_the_rest_of_its_request_out(
    mlflow_server: MlflowServer, run: RunInfo, proxy: Proxy
) -> None:
    exporter = opened_exporter(proxy.uri, run)
    proxy.rule = refusing(b"wrong")
    params = {("wrong param" if n == 33 else f"p{n}"): n for n in range(100)}
    tags = {("wrong tag" if n == 0 else f"t{n}"): "x" for n in range(100)}
    rows = [("wrong" if n in (0, 700) else "m", float(n), n, n) for n in range(999)]
    one = batch(run, started(), ParamsLogged(1, params), TagsSet(1, {**tags, "tracelet.run.id": "x"}), rows=rows)
    answer = exporter.begin(one).attempt()
    assert isinstance(answer, Rejected)
    told = [
        (item.what, item.facts.get("key", item.facts.get("name")), item.facts.get("iteration")) for item in answer.items
    ]
    assert told == [
        ("tag", "tracelet.run.id", None),
        ("param", "wrong param", None),
        ("tag", "wrong tag", None),
        ("point", "wrong", 0),
        ("point", "wrong", 700),
    ]
    assert "not this one" in answer.items[-1].reason
    data = get_run(mlflow_server, mlflow_id(exporter)).data
    assert len(data.params) == 99
    assert {key for key in data.tags if key.startswith("t") and "." not in key} == tags.keys() - {"wrong tag"}
    stored = rows_of(mlflow_server, mlflow_id(exporter))
    assert sorted(r.step for r in stored) == [n for n in range(999) if n not in (0, 700)]


def test_a_split_batch_goes_on_where_it_was_cut_off(mlflow_server: MlflowServer, run: RunInfo, proxy: Proxy) -> None:
    exporter = opened_exporter(proxy.uri, run)
    refuse, sent = refusing(b"wrong"), []

    def rule(seen: Seen) -> Spoil:
        spoil = refuse(seen)
        if b'"metrics"' in seen.body and spoil.answer is None:
            sent.append(seen)
            if len(sent) == 2:
                return Spoil(hang_up=True)
        return spoil

    proxy.rule = rule
    rows = [("wrong" if n == 5 else "m", float(n), n, n) for n in range(64)]
    delivery = exporter.begin(batch(run, started(), rows=rows))
    answer = persist(delivery)
    assert isinstance(answer, Rejected)
    assert [item.facts["iteration"] for item in answer.items] == [5]
    assert sorted(r.step for r in rows_of(mlflow_server, mlflow_id(exporter))) == [n for n in range(64) if n != 5]


def test_equal_points_of_two_ranks_are_both_kept(mlflow_server: MlflowServer, run: RunInfo) -> None:
    exporter = opened_exporter(mlflow_server.uri, run)
    parts = tuple(
        Part(
            f"{rank:016x}",
            opened(rank=rank),
            (started(),) if rank == 0 else (),
            points([("m", math.nan, 1, 1), ("n", 1.0, 1, 1)]),
        )
        for rank in range(3)
    )
    deliver(exporter, Batch(1, run, "/spool/r/h", parts))
    assert len(rows_of(mlflow_server, mlflow_id(exporter))) == 6


# ---- artifacts ---------------------------------------------------------------------------------------------------


def test_artifacts_arrive_under_the_path_they_were_logged_as(
    mlflow_server: MlflowServer, run: RunInfo, tmp_path: Path
) -> None:
    exporter = opened_exporter(mlflow_server.uri, run)
    paths = ["model.pt", "models/deep/ckpt 10.pt", "plots/損失 é.png", "100%and+plus.txt", "empty"]
    logged = [artifact(tmp_path, path, b"" if path == "empty" else path.encode() * 1000) for path in paths]
    deliver(exporter, batch(run, started(), *logged, folder=str(tmp_path)))
    assert mlflow_server.artifacts(mlflow_id(exporter)) == {a.path: a.size for a in logged}


def test_artifact_paths_the_server_would_rewrite_are_renamed_and_told(
    mlflow_server: MlflowServer, run: RunInfo, tmp_path: Path
) -> None:
    exporter = opened_exporter(mlflow_server.uri, run)
    paths = ["d/50%20.txt", "d/50%2520.txt", "d/no#1.txt", "d/new\nline.txt", "d/\udcff.txt"]
    logged = [artifact(tmp_path, path, b"x" * (n + 1)) for n, path in enumerate(paths)]
    deliver(exporter, batch(run, started(), *logged, folder=str(tmp_path)))
    there = mlflow_server.artifacts(mlflow_id(exporter))
    assert sorted(there.values()) == [1, 2, 3, 4, 5]
    tags = get_run(mlflow_server, mlflow_id(exporter)).data.tags
    told = {tags[f"tracelet.name.{path}"] for path in there}
    assert told == {path.encode("utf-8", "backslashreplace").decode() for path in paths}


def test_an_artifact_whose_folder_is_a_file_is_refused(
    mlflow_server: MlflowServer, run: RunInfo, tmp_path: Path
) -> None:
    exporter = opened_exporter(mlflow_server.uri, run)
    logged = [artifact(tmp_path, path, b"x") for path in ("a", "a/b", "c/d", "c", "e")]
    answer = exporter.begin(batch(run, started(), *logged, folder=str(tmp_path))).attempt()
    assert isinstance(answer, Rejected)
    assert [item.facts["path"] for item in answer.items] == ["a/b", "c"]
    assert mlflow_server.artifacts(mlflow_id(exporter)) == {"a": 1, "c/d": 1, "e": 1}


def test_a_large_artifact_is_streamed(mlflow_server: MlflowServer, run: RunInfo, tmp_path: Path) -> None:
    big = tmp_path / "big.bin"
    with big.open("wb") as file:
        file.truncate(200_000_000)
    stat = big.stat()
    record = ArtifactLogged(1, "big.bin", str(big), None, stat.st_size, None, "x/y", stat.st_mtime_ns, stat.st_ino)
    exporter = opened_exporter(mlflow_server.uri, run)
    deliver(exporter, batch(run, started(), folder=str(tmp_path)))
    before = peak_memory()
    deliver(exporter, batch(run, record, folder=str(tmp_path), number=2))
    assert peak_memory() - before < 50_000_000
    assert mlflow_server.artifacts(mlflow_id(exporter)) == {"big.bin": 200_000_000}


def peak_memory() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


def test_a_changed_missing_or_escaping_artifact_is_refused_by_name_and_the_rest_arrives(
    mlflow_server: MlflowServer, run: RunInfo, tmp_path: Path
) -> None:
    exporter = opened_exporter(mlflow_server.uri, run)
    kept = tmp_path / "kept.bin"
    kept.write_bytes(b"12345")
    stat = kept.stat()
    reference = ArtifactLogged(1, "ref", str(kept), None, 5, None, "x/y", stat.st_mtime_ns, stat.st_ino)
    os.utime(kept, ns=(1, 1))
    damaged = artifact(tmp_path, "damaged", b"abc", sha256="0" * 64)
    gone = artifact(tmp_path, "gone", b"gone")
    (tmp_path / str(gone.stored)).unlink()
    outside = [artifact(tmp_path, path, b"x") for path in ("../up", "/abs", "a/../../b", "a//b", "", ".", "n" * 256)]
    good = artifact(tmp_path, "good", b"good")
    answer = exporter.begin(
        batch(run, started(), reference, damaged, gone, *outside, good, folder=str(tmp_path))
    ).attempt()
    assert isinstance(answer, Rejected)
    assert [item.facts["path"] for item in answer.items] == ["ref", "damaged", "gone", *(a.path for a in outside)]
    assert "changed since it was logged" in answer.items[0].reason
    assert "damaged" in answer.items[1].reason
    assert mlflow_server.artifacts(mlflow_id(exporter)) == {"good": 4}


def test_long_params_and_tags_are_cut_with_a_mark_and_whole_in_an_artifact(
    mlflow_server: MlflowServer, run: RunInfo
) -> None:
    exporter = opened_exporter(mlflow_server.uri, run)
    params = {"fits": "p" * 6000, "a/b": "ü" * 6001, "nul": "a\x00b\udc80"}
    deliver(
        exporter, batch(run, started(), ParamsLogged(1, params), TagsSet(1, {"fits": "t" * 8000, "long": "t" * 8001}))
    )
    data = get_run(mlflow_server, mlflow_id(exporter)).data
    assert (data.params["fits"], data.tags["fits"]) == ("p" * 6000, "t" * 8000)
    assert data.params["nul"] == "a\\x00b\\udc80"
    sizes = mlflow_server.artifacts(mlflow_id(exporter))
    assert sorted(sizes.values()) == [8001, 12002]
    for text, limit in ((data.params["a/b"], 6000), (data.tags["long"], 8000)):
        assert len(text) == limit
        assert text.rpartition("whole in artifact ")[2].rstrip("]") in sizes
