"""What reaches MLflow through a gateway, on a real server and in a database: first signs, spans, states."""

from __future__ import annotations

import base64
import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span

from tests.mlflow_batches import (
    START_NS,
    batch,
    deliver,
    ended,
    exporters_closed,
    opened,
    opened_exporter,
    persist,
    run_info,
    started,
)
from tests.servers import MlflowServer, Proxy, Seen, Spoil, get_run, recording_proxy
from tracelet.exporters.base import Delivered, Rejected, RetryLater
from tracelet.exporters.mlflow.exporter import MLflowExporter
from tracelet.records import ParamsLogged, RunInfo, SpansReceived, StateNoted, TagsSet

__all__ = ["exporters_closed"]


@pytest.fixture
def run() -> RunInfo:
    return run_info(os.urandom(16).hex())


@pytest.fixture
def proxy(mlflow_server: MlflowServer) -> Iterator[Proxy]:
    with recording_proxy(mlflow_server.uri) as proxy:
        yield proxy


def span(trace: bytes, own: int, name: str, parent: int | None = None, **other: Any) -> Span:
    begin = START_NS + own * 1_000_000
    return Span(
        trace_id=trace,
        span_id=own.to_bytes(8, "big"),
        parent_span_id=b"" if parent is None else parent.to_bytes(8, "big"),
        name=name,
        start_time_unix_nano=begin,
        end_time_unix_nano=begin + 1_000_000,
        **other,
    )


def received(*spans: Span) -> SpansReceived:
    """As they come over the wire: one Resource, in base64."""
    resource = Resource(attributes=[KeyValue(key="service.name", value=AnyValue(string_value="train"))])
    whole = ResourceSpans(resource=resource, scope_spans=[ScopeSpans(spans=spans)])
    return SpansReceived(START_NS, base64.b64encode(whole.SerializeToString()).decode())


def mlflow_id(exporter: MLflowExporter) -> str:
    return str(exporter.memory()["run_id"])


def traces_of(server: MlflowServer, exporter: MLflowExporter) -> list[dict[str, Any]]:
    """The traces that MLflow links to the run, as `mlflow.search_traces(run_id=...)` and its UI ask for them."""
    wanted = {
        "locations": [
            {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": exporter.memory()["experiment_id"]}}
        ],
        "filter": f"attributes.run_id = '{mlflow_id(exporter)}'",
        "max_results": 100,
    }
    body = json.dumps(wanted).encode()
    asked = Request(f"{server.uri}/api/3.0/mlflow/traces/search", body, {"Content-Type": "application/json"})
    with urlopen(asked, timeout=60) as reply:
        return list(json.load(reply).get("traces", []))


def spans_in(database: Path, trace: bytes) -> list[str]:
    with closing(sqlite3.connect(database)) as open_database:
        found = open_database.execute(
            "select name from spans where trace_id = ? order by start_time_unix_nano", [f"tr-{trace.hex()}"]
        )
        return [name for (name,) in found]


# ---- a run made at its first sign --------------------------------------------------------------------------------


def test_a_start_that_comes_late_names_the_run_and_tells_whose_it_is(mlflow_server: MlflowServer, run: RunInfo) -> None:
    nameless = RunInfo(run.run_id, run.project, "", "")
    exporter = opened_exporter(mlflow_server.uri, nameless)
    early = opened(started=START_NS + 2_000_000_000)
    deliver(exporter, batch(nameless, ParamsLogged(START_NS, {"lr": 1}), by=early))
    before = get_run(mlflow_server, mlflow_id(exporter))
    assert before.info.run_name == run.run_id
    assert before.info.start_time == (START_NS + 2_000_000_000) // 1_000_000

    tags = {"mlflow.user": "ada", "mlflow.source.name": "train.py", "mlflow.source.git.commit": "c0ffee"}
    deliver(exporter, batch(nameless, started("best run", tags), number=2, by=early))
    after = get_run(mlflow_server, mlflow_id(exporter))
    assert after.info.run_name == "best run"
    assert tags.items() <= after.data.tags.items()
    assert after.info.status == "RUNNING"


def test_what_a_person_set_before_a_late_start_stays(mlflow_server: MlflowServer, run: RunInfo) -> None:
    nameless = RunInfo(run.run_id, run.project, "", "")
    exporter = opened_exporter(mlflow_server.uri, nameless)
    deliver(exporter, batch(nameless, ParamsLogged(START_NS, {"lr": 1})))
    run_id = mlflow_id(exporter)
    mlflow_server.ask("runs/set-tag", {"run_id": run_id, "key": "mlflow.source.name", "value": "by hand"})
    mlflow_server.ask("runs/update", {"run_id": run_id, "run_name": "named by hand"})
    late = started("best run", {"mlflow.user": "ada", "mlflow.source.name": "train.py"})
    deliver(exporter, batch(nameless, late, number=2))
    after = get_run(mlflow_server, run_id)
    assert after.info.run_name == "named by hand"
    assert after.data.tags["mlflow.source.name"] == "by hand"
    assert after.data.tags["mlflow.user"] == "ada"


def test_a_run_begins_at_the_earliest_time_its_first_batch_tells_of(mlflow_server: MlflowServer, run: RunInfo) -> None:
    exporter = opened_exporter(mlflow_server.uri, run)
    guessed = opened(started=START_NS + 7_000_000_000)  # by the first point that came
    deliver(exporter, batch(run, started(), by=guessed))
    assert get_run(mlflow_server, mlflow_id(exporter)).info.start_time == START_NS // 1_000_000


def test_a_new_attempt_is_running_at_its_first_sign_and_ends_whatever_its_start_was_guessed_to_be(
    mlflow_server: MlflowServer, run: RunInfo
) -> None:
    exporter = opened_exporter(mlflow_server.uri, run)
    deliver(exporter, batch(run, started(), ended("FAILED")))
    guessed = opened("b" * 16, START_NS + 20_000_000_000)
    deliver(exporter, batch(run, ParamsLogged(START_NS, {"a": 1}), number=2, by=guessed))
    assert get_run(mlflow_server, mlflow_id(exporter)).info.status == "RUNNING"
    exact = opened("b" * 16, START_NS + 15_000_000_000)
    deliver(exporter, batch(run, started(), ended("FINISHED"), number=3, by=exact))
    assert get_run(mlflow_server, mlflow_id(exporter)).info.status == "FINISHED"
    deliver(exporter, batch(run, ended("KILLED"), number=4))  # of the first attempt, late
    assert get_run(mlflow_server, mlflow_id(exporter)).info.status == "FINISHED"


# ---- spans -------------------------------------------------------------------------------------------------------


def test_spans_become_traces_of_the_run_whatever_comes_first_and_however_often(
    mlflow_server: MlflowServer, run: RunInfo
) -> None:
    first, second = os.urandom(16), os.urandom(16)
    exporter = opened_exporter(mlflow_server.uri, run)
    deliver(exporter, batch(run, started(), received(span(first, 2, "epoch", 1), span(first, 3, "eval", 2))))
    assert traces_of(mlflow_server, exporter) == []  # MLflow links a trace when its root arrives
    assert spans_in(mlflow_server.database, first) == ["epoch", "eval"]

    root = batch(run, received(span(first, 1, "run")), number=2)
    deliver(exporter, root, root)
    deliver(exporter, batch(run, received(span(first, 2, "epoch", 1), span(first, 3, "eval", 2)), number=3))
    assert [trace["trace_id"] for trace in traces_of(mlflow_server, exporter)] == [f"tr-{first.hex()}"]
    assert spans_in(mlflow_server.database, first) == ["run", "epoch", "eval"]

    again = opened("b" * 16, START_NS + 10_000_000_000)
    deliver(exporter, batch(run, started(), received(span(second, 1, "run")), number=4, by=again))
    found = {trace["trace_id"] for trace in traces_of(mlflow_server, exporter)}
    assert found == {f"tr-{first.hex()}", f"tr-{second.hex()}"}


def test_mlflows_own_client_finds_them_by_the_run(mlflow_server: MlflowServer, run: RunInfo) -> None:
    import mlflow

    trace = os.urandom(16)
    exporter = opened_exporter(mlflow_server.uri, run)
    deliver(exporter, batch(run, started(), received(span(trace, 1, "run"), span(trace, 2, "epoch", 1))))
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(mlflow_server.uri)
    try:
        found = mlflow.search_traces(
            locations=[exporter.memory()["experiment_id"]], run_id=mlflow_id(exporter), return_type="list"
        )
    finally:
        mlflow.set_tracking_uri(before)
    assert [[one.name for one in trace.data.spans] for trace in found] == [["run", "epoch"]]


def test_a_span_that_mlflow_refuses_is_named_and_the_others_arrive(
    mlflow_server: MlflowServer, run: RunInfo, proxy: Proxy
) -> None:
    trace = os.urandom(16)
    proxy.rule = lambda seen: (
        Spoil(forward=False, answer=(422, b'{"detail": "Cannot convert"}', {"Content-Type": "application/json"}))
        if seen.path == "/v1/traces" and b"poison" in seen.body
        else Spoil()
    )
    exporter = opened_exporter(proxy.uri, run)
    spans = [span(trace, 1, "run"), *(span(trace, n, f"s{n}", 1) for n in range(2, 9)), span(trace, 9, "poison", 1)]
    other = received(span(os.urandom(16), 1, "other"))
    answer = exporter.begin(batch(run, started(), ParamsLogged(START_NS, {"a": 1}), received(*spans), other)).attempt()
    assert isinstance(answer, Rejected)
    assert [(item.what, item.facts["name"]) for item in answer.items] == [("span", "poison")]
    assert spans_in(mlflow_server.database, trace) == ["run", *(f"s{n}" for n in range(2, 9))]
    assert len(traces_of(mlflow_server, exporter)) == 2
    assert get_run(mlflow_server, mlflow_id(exporter)).data.params == {"a": "1"}


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_server_that_takes_no_spans_is_told_of_once_and_stops_nothing(
    mlflow_server: MlflowServer, run: RunInfo, proxy: Proxy, status: int
) -> None:
    said = b'{"detail": "REST OTLP span logging is not supported by FileStore"}'
    proxy.rule = lambda seen: (
        Spoil(forward=False, answer=(status, said, {"Content-Type": "application/json"}))
        if seen.path == "/v1/traces"
        else Spoil()
    )
    exporter = opened_exporter(proxy.uri, run)
    trace = os.urandom(16)
    answer = exporter.begin(batch(run, started(), received(span(trace, 1, "run"), span(trace, 2, "a", 1)))).attempt()
    assert isinstance(answer, Rejected)
    assert [(item.what, item.facts["count"]) for item in answer.items] == [("span", 2)]
    assert "takes no spans" in answer.items[0].reason
    deliver(exporter, batch(run, received(span(trace, 3, "b", 1)), ParamsLogged(START_NS, {"a": 1}), number=2))
    assert len(proxy.calls("/v1/traces")) == 1
    assert get_run(mlflow_server, mlflow_id(exporter)).data.params == {"a": "1"}


def test_spans_wait_for_a_server_in_trouble_and_what_went_is_not_sent_again(
    mlflow_server: MlflowServer, run: RunInfo, proxy: Proxy
) -> None:
    trace = os.urandom(16)
    failures = iter(range(2))
    lock = threading.Lock()

    def rule(seen: Seen) -> Spoil:
        with lock:
            troubled = seen.path == "/v1/traces" and next(failures, None) is not None
        return Spoil(forward=False, answer=(503, b"busy", {})) if troubled else Spoil()

    proxy.rule = rule
    exporter = opened_exporter(proxy.uri, run)
    delivery = exporter.begin(batch(run, started(), received(span(trace, 1, "run")), rows=[("loss", 1.0, 0, 0)]))
    assert isinstance(delivery.attempt(), RetryLater)
    assert persist(delivery) == Delivered()
    assert len(proxy.calls("/v1/traces")) == 3
    assert len([seen for seen in proxy.calls("log-batch") if b'"metrics"' in seen.body]) == 1
    assert spans_in(mlflow_server.database, trace) == ["run"]


def test_damaged_spans_are_refused_and_the_rest_arrives(mlflow_server: MlflowServer, run: RunInfo) -> None:
    trace = os.urandom(16)
    exporter = opened_exporter(mlflow_server.uri, run)
    damaged = [SpansReceived(START_NS, "not base64!"), SpansReceived(START_NS, base64.b64encode(b"\xff\xff").decode())]
    answer = exporter.begin(batch(run, started(), *damaged, received(span(trace, 1, "run")))).attempt()
    assert isinstance(answer, Rejected)
    assert [item.what for item in answer.items] == ["span", "span"]
    assert spans_in(mlflow_server.database, trace) == ["run"]


def test_a_database_takes_spans_as_its_server_does(tmp_path: Path, run: RunInfo) -> None:
    trace = os.urandom(16)
    database = tmp_path / "mlflow.db"
    exporter = opened_exporter(f"sqlite:///{database}", run, artifact_root=str(tmp_path / "mlruns"))
    one = batch(run, started(), received(span(trace, 2, "epoch", 1)))
    deliver(exporter, one, batch(run, received(span(trace, 1, "run")), number=2), one)
    assert spans_in(database, trace) == ["run", "epoch"]
    with closing(sqlite3.connect(database)) as open_database:
        links = open_database.execute(
            "select source_id from entity_associations where destination_id = ?", [mlflow_id(exporter)]
        ).fetchall()
    assert links == [(f"tr-{trace.hex()}",)]


# ---- lost and found ----------------------------------------------------------------------------------------------


def test_lost_is_a_tag_that_the_next_sign_of_life_removes_and_never_a_status(
    mlflow_server: MlflowServer, run: RunInfo
) -> None:
    exporter = opened_exporter(mlflow_server.uri, run)
    deliver(exporter, batch(run, started(), StateNoted(START_NS, "RUNNING")))  # a tag that is not there
    lost = batch(run, StateNoted(START_NS + 1, "LOST"), number=2)
    deliver(exporter, lost, lost)
    found = get_run(mlflow_server, mlflow_id(exporter))
    assert (found.data.tags["tracelet.state"], found.info.status) == ("LOST", "RUNNING")

    back = batch(run, StateNoted(START_NS + 2, "RUNNING"), number=3)
    deliver(exporter, back, back)
    found = get_run(mlflow_server, mlflow_id(exporter))
    assert "tracelet.state" not in found.data.tags
    assert found.info.status == "RUNNING"

    both = (StateNoted(START_NS + 3, "LOST"), StateNoted(START_NS + 4, "RUNNING"))
    both = batch(run, *both, ended("FINISHED"), number=4)
    deliver(exporter, both)
    found = get_run(mlflow_server, mlflow_id(exporter))
    assert "tracelet.state" not in found.data.tags
    assert found.info.status == "FINISHED"


def test_lost_that_comes_after_what_ended_it_has_no_effect_over_restarts_too(
    mlflow_server: MlflowServer, run: RunInfo
) -> None:
    """Two writers' files travel in batches of their own, and the order of these is anybody's."""
    exporter = opened_exporter(mlflow_server.uri, run)
    deliver(exporter, batch(run, started(), StateNoted(START_NS + 2, "RUNNING")))
    deliver(exporter, batch(run, StateNoted(START_NS + 1, "LOST"), number=2))
    assert "tracelet.state" not in get_run(mlflow_server, mlflow_id(exporter)).data.tags
    with closing(MLflowExporter({"tracking_uri": mlflow_server.uri}, {}, {})) as again:
        assert again.open(run, exporter.memory()) == Delivered()
        deliver(again, batch(run, StateNoted(START_NS + 1, "LOST"), number=2))
        assert "tracelet.state" not in get_run(mlflow_server, mlflow_id(again)).data.tags
        deliver(again, batch(run, StateNoted(START_NS + 3, "LOST"), number=3))
        assert get_run(mlflow_server, mlflow_id(again)).data.tags["tracelet.state"] == "LOST"


def test_a_database_forgets_lost_too(tmp_path: Path, run: RunInfo) -> None:
    exporter = opened_exporter(f"sqlite:///{tmp_path / 'mlflow.db'}", run, artifact_root=str(tmp_path / "mlruns"))
    deliver(exporter, batch(run, started(), StateNoted(START_NS, "RUNNING"), number=1))
    deliver(exporter, batch(run, StateNoted(START_NS, "LOST"), number=2))
    deliver(exporter, batch(run, StateNoted(START_NS, "RUNNING"), number=3))
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        assert database.execute("select count(*) from tags where key = 'tracelet.state'").fetchone() == (0,)


def test_the_state_tag_is_nobodys_to_log(mlflow_server: MlflowServer, run: RunInfo) -> None:
    exporter = opened_exporter(mlflow_server.uri, run)
    answer = exporter.begin(batch(run, started(), TagsSet(START_NS, {"tracelet.state": "LOST"}))).attempt()
    assert isinstance(answer, Rejected)
    assert "tracelet.state" not in get_run(mlflow_server, mlflow_id(exporter)).data.tags
