"""What real destinations refused is readable, goes out once more with its first times, and is marked when taken."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.servers import MlflowServer, Proxy, Seen, Spoil, get_run, recording_proxy, rows_of
from tests.sinks import GrpcSink, HttpSink, Received, Say, Sink
from tracelet.cli.main import main
from tracelet.exporters.prometheus import PrometheusExporter
from tracelet.shipper.process import ship
from tracelet.spool import store
from tracelet.spool.cursor import Progress

TRAIN = """
import math, sys, pathlib, tracelet
pathlib.Path("model.bin").write_bytes(b"weights")
exp = tracelet.start_logging(exp_name="letters", project="tests", run_id=sys.argv[1])
exp.log_params({"lr": 0.1, "wrong/param ☃": "long " * 3000})
exp.set_tags({"wrong-tag": "yes", "team": "ml"})
with exp.span("wrong-phase"):
    for i in range(200):
        exp.log_metric("loss", 1 / (i + 1), iteration=i)
        if i % 50 == 0:
            exp.log_metric("wrong ☃", math.nan if i == 100 else float(i), iteration=i)
exp.log_artifact("model.bin", "wrong/model.bin")
exp.stop()
"""
WRONG = [(0, 0.0), (50, 50.0), (100, None), (150, 150.0)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def train(run_id: str, **variables: str) -> Path:
    """A program that has logged and gone, its data in the spool; the folder of its run."""
    environ = {**os.environ, "TRACELET_SHIPPER": "off", **variables}
    subprocess.run([sys.executable, "-c", TRAIN, run_id], env=environ, check=True, timeout=60)
    (found,) = [run.folder for run in store.list_runs(Path(os.environ["TRACELET_DIR"])) if run.run_id == run_id]
    return found


def letters(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("rejected-*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def refuses_wrong(received: Received) -> Say | None:
    """A receiver that takes nothing with `wrong` in it."""
    said = Say(400, code=grpc.StatusCode.INVALID_ARGUMENT, message="nothing wrong here")
    return said if b"wrong" in received.body else None


def wrong_points(sink: Sink) -> list[tuple[int, float | None, int]]:
    found = [point for point in sink.points() if point.name == "wrong ☃"]
    return [(p.iteration, None if math.isnan(p.value) else p.value, p.time_unix_nano) for p in found]


@pytest.fixture(params=["http/protobuf", "grpc"])
def receiver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sink]:
    """An OTLP receiver, whose address and protocol are in the environment."""
    with GrpcSink() if request.param == "grpc" else HttpSink() as sink:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", sink.endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", request.param)
        yield sink


def test_what_an_otlp_receiver_refused_goes_out_again_as_it_was_once_it_is_taken(
    receiver: Sink, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train("otlp-letters")
    receiver.rule = refuses_wrong
    assert main(["ship", "otlp-letters"]) == 0
    lines = letters(folder)
    assert {line["what"] for line in lines} == {"point", "event", "span"}
    assert {line["version"] for line in lines} == {1}
    assert len({json.dumps(line["at"], sort_keys=True) for line in lines}) == 1
    assert lines[0]["at"]["rank"] == 0
    assert lines[0]["opened"]["resource"]["tracelet.run.id"] == "otlp-letters"
    points = [line["facts"] for line in lines if line["what"] == "point" and "message" not in line["facts"]]
    assert [(p["iteration"], None if p["value"] == "nan" else p["value"]) for p in points] == WRONG
    assert [p.iteration for p in receiver.points() if p.name == "loss"] == list(range(200))
    assert not wrong_points(receiver)
    capsys.readouterr()

    assert main(["show", "otlp-letters"]) == 0
    assert "tracelet ship --dead-letters otlp-let" in capsys.readouterr().out
    assert main(["prune", "--keep", "0d"]) == 0
    assert folder.exists(), "what was refused stands only here"

    assert main(["ship", "--dead-letters", "otlp-letters"]) == 1
    assert f"0 dead letters of {len(lines)} taken by otlp" in capsys.readouterr().out
    assert letters(folder) == lines, "what is refused again stays, and is not written twice"

    receiver.rule = None
    before = len(receiver.stored)
    assert main(["ship", "--dead-letters"]) == 0
    assert f"{len(lines)} dead letters of {len(lines)} taken by otlp" in capsys.readouterr().out
    assert wrong_points(receiver) == [
        (p["iteration"], None if p["value"] == "nan" else p["value"], p["time_unix_nano"]) for p in points
    ]
    new = receiver.stored[before:]
    assert not any(b"tracelet.metric.nonfinite" in one.body for one in new if b"tracelet.run" not in one.body)
    assert {one.signal for one in new} == {"metrics", "logs", "traces"}
    assert [span.name for span in receiver.spans() if span.name == "wrong-phase"] == ["wrong-phase"]
    assert {one.message.resource_spans[0].resource.SerializeToString() for one in new if one.signal == "traces"} == {
        one.message.resource_spans[0].resource.SerializeToString() for one in receiver.stored if one.signal == "traces"
    }

    assert main(["ship", "--dead-letters"]) == 0
    assert "No dead letters." in capsys.readouterr().out
    assert len(receiver.stored) == before + len(new), "what was taken is not sent a third time"
    assert main(["prune", "--keep", "0d"]) == 0
    assert not folder.exists()


def test_what_prometheus_refused_goes_out_again_in_the_form_and_at_the_times_it_had(otlp_sink: HttpSink) -> None:
    address = f"{otlp_sink.url}/v1/metrics"
    folder = train("prometheus-letters", TRACELET_BACKEND="prometheus", TRACELET_PROMETHEUS_URL=address)
    otlp_sink.rule = refuses_wrong
    assert main(["ship", "prometheus-letters"]) == 0
    lines = letters(folder)
    assert {line["what"] for line in lines} == {"point"}
    shaped = [line["facts"]["message"]["name"] for line in lines if "message" in line["facts"]]
    assert sorted({name for name in shaped if "wrong" in name}) == ["ml.wrong ☃"], "the mark at the end of the series"
    otlp_sink.rule = None
    # By a clock of a hundred years later: what a person asks for is asked of the server, however old it is.
    outcome = ship(
        folder,
        again=True,
        timeout_s=60,
        build=lambda destination, secrets, environ: PrometheusExporter(
            destination["spec"], secrets, environ, now_ns=lambda: 2**62
        ),
    )
    assert (outcome.complete, set(outcome.refused.values())) == (True, {0})
    times = {line["facts"]["time_unix_nano"] for line in lines if "message" not in line["facts"]}
    found = [
        (metric.name, point.flags, point.time_unix_nano)
        for _, scope, metric in otlp_sink.metrics()
        if scope == "tracelet"
        for point in metric.gauge.data_points
        if any(one.value.string_value == "wrong ☃" for one in point.attributes)
    ]
    assert {time for name, flags, time in found if name == "ml.wrong ☃" and not flags} == times
    assert sorted({name for name, _, _ in found}) == ["ml.wrong ☃", "tracelet.iteration"]
    assert {flags for name, flags, _ in found if name == "ml.wrong ☃"} == {0, 1}


def refusing_proxy(seen: Seen) -> Spoil:
    """An MLflow that says no to names with `wrong` in them; the rest of such a request has to be sent anew."""
    said = json.dumps({"error_code": "INVALID_PARAMETER_VALUE", "message": "nothing wrong here"}).encode()
    if seen.path.endswith("log-batch"):
        body = json.loads(seen.body)
        named = [one["key"] for kind in ("metrics", "params", "tags") for one in body.get(kind, ())]
        # The tags that keep an unusual name are tracelet's own, and pass.
        if any(name.startswith("wrong") for name in named):
            return Spoil(forward=False, answer=(400, said, {"Content-Type": "application/json"}))
    elif seen.method == "PUT" and "/wrong/" in seen.path:
        return Spoil(forward=False, answer=(400, said, {"Content-Type": "application/json"}))
    return Spoil()


def test_what_mlflow_refused_arrives_whole_under_the_names_it_would_have_had(
    mlflow_server: MlflowServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with recording_proxy(mlflow_server.uri) as proxy:
        folder = train("mlflow-letters", MLFLOW_TRACKING_URI=proxy.uri)
        proxy.rule = refusing_proxy
        assert main(["ship", "mlflow-letters"]) == 0
        lines = letters(folder)
        kinds = [line["what"] for line in lines]
        assert sorted(set(kinds)) == ["artifact", "param", "point", "tag"]
        assert kinds.count("point") == 4
        # Once, though the end of the run, which has the last value of every param and tag, is refused them again.
        pairs = [(line["facts"]["key"], line["facts"]["value"]) for line in lines if line["what"] in ("param", "tag")]
        assert pairs == [("wrong/param ☃", "long " * 3000), ("wrong-tag", "yes")]
        progress = Progress(folder)
        progress.refresh()
        assert [state.refused for state in progress.destinations.values()] == [len(lines)]
        (copy,) = [line["facts"]["stored"] for line in lines if line["what"] == "artifact"]
        assert (folder / copy).read_bytes() == b"weights"
        run_id = _run_id(proxy)

        proxy.rule = lambda seen: Spoil()
        capsys.readouterr()
        before = len(proxy.calls("log-batch"))
        assert main(["ship", "--dead-letters", "mlflow-letters"]) == 0, capsys.readouterr().out
        sent = [json.loads(seen.body) for seen in proxy.calls("log-batch")[before:]]
        named = [one["key"] for body in sent for kind in ("params", "tags") for one in body.get(kind, ())]
        assert len([name for name in named if name.startswith("wrong")]) == 2
        assert not (folder / copy).exists(), "a copy goes once everybody has it"
    run = get_run(mlflow_server, run_id)
    (key,) = [key for key in run.data.params if key.startswith("wrong")]
    assert run.data.params[key].startswith("long long")
    assert run.data.tags["wrong-tag"] == "yes"
    assert run.info.status == "FINISHED"
    stored = [row for row in rows_of(mlflow_server, run_id) if row.key.startswith("wrong")]
    assert [(row.step, None if row.is_nan else row.value) for row in stored] == WRONG
    times = {line["facts"]["iteration"]: line["facts"]["time_unix_nano"] for line in lines if line["what"] == "point"}
    assert [row.timestamp for row in stored] == [times[row.step] // 1_000_000 for row in stored]
    artifacts = mlflow_server.artifacts(run_id)
    assert artifacts["wrong/model.bin"] == 7
    assert len(rows_of(mlflow_server, run_id, "loss")) == 200


def _run_id(proxy: Proxy) -> str:
    return str(json.loads(proxy.calls("runs/log-batch")[0].body)["run_id"])


@pytest.mark.parametrize("kind", ["otlp", "otlp-grpc", "mlflow"])
def test_a_kill_between_the_answer_and_the_mark_repeats_the_same_bytes_and_doubles_nothing(
    kind: str, mlflow_server: MlflowServer
) -> None:
    run_id = f"killed-{kind}"
    sink_of: type[GrpcSink | HttpSink] = GrpcSink if kind == "otlp-grpc" else HttpSink
    with recording_proxy(mlflow_server.uri) as proxy, sink_of() as otlp_sink:
        to_mlflow = {"MLFLOW_TRACKING_URI": proxy.uri}
        protocol = "grpc" if kind == "otlp-grpc" else "http/protobuf"
        to_otlp = {"OTEL_EXPORTER_OTLP_ENDPOINT": otlp_sink.endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol}
        variables = to_mlflow if kind == "mlflow" else to_otlp
        folder = train(run_id, **variables)
        otlp_sink.rule, proxy.rule = refuses_wrong, refusing_proxy
        assert main(["ship", run_id]) == 0
        lines = letters(folder)

        command = [sys.executable, "-m", "tracelet", "ship", "--dead-letters", run_id]
        again = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        bodies: list[bytes] = []

        def strike(body: bytes) -> None:
            """It has been carried out, and who asked hears nothing any more."""
            if not bodies:
                again.send_signal(signal.SIGKILL)
                again.wait(10)
            bodies.append(body)

        def struck_sink(received: Received) -> Say | None:
            if received.signal == "metrics" and b"tracelet.iteration" in received.body:
                strike(received.body)
            return None

        def struck_proxy(seen: Seen) -> Spoil:
            if b'"metrics"' in seen.body and b'"wrong' in seen.body:
                strike(seen.body)
            return Spoil()

        otlp_sink.rule, proxy.rule = struck_sink, struck_proxy
        assert again.wait(60) == -signal.SIGKILL
        assert main(["ship", "--dead-letters", run_id]) == 0
        assert letters(folder) == lines
        if kind != "mlflow":
            assert len(bodies) == 2
            assert bodies[0] == bodies[1]
            kept = {(p.name, p.time_unix_nano): p for p in otlp_sink.points() if p.name == "wrong ☃"}
            assert sorted(p.iteration for p in kept.values()) == [0, 50, 100, 150]
        else:
            assert len(bodies) == 1, "rows that are stored are not sent again"
            stored = [row for row in rows_of(mlflow_server, _run_id(proxy)) if row.key.startswith("wrong")]
            assert [row.step for row in stored] == [0, 50, 100, 150]


def test_lines_of_an_earlier_release_are_shown_and_refused_by_name(
    otlp_sink: HttpSink, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train("old-letters", OTEL_EXPORTER_OTLP_ENDPOINT=otlp_sink.url)
    otlp_sink.rule = refuses_wrong
    assert main(["ship", "old-letters"]) == 0
    (path,) = folder.glob("rejected-*.jsonl")
    first, *rest = path.read_text().splitlines(keepends=True)
    old = json.loads(first)
    for name in ("version", "at", "opened"):
        old.pop(name)
    tomorrow = json.loads(first) | {"version": 2}
    path.write_text(json.dumps(old) + "\n" + json.dumps(tomorrow) + "\n" + first + "".join(rest) + "{damaged\n")
    otlp_sink.rule = None
    capsys.readouterr()
    assert main(["ship", "--dead-letters", "old-letters"]) == 1
    out = capsys.readouterr().out
    assert f"{len(rest) + 1} dead letters of {len(rest) + 1} taken" in out
    for why in ("an earlier release wrote it", "it is of version 2, which this release doesn't know", "can't be read"):
        assert f"1 line of {path} can't be sent again: " in out
        assert why in out
    assert main(["show", "old-letters"]) == 0
    assert "3 wait" in capsys.readouterr().out
    assert main(["prune", "--keep", "0d"]) == 0
    assert folder.exists()
