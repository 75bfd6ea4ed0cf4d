"""One run with everything a name, a value or a file can be, at every destination; files that change on their way."""

from __future__ import annotations

import json
import math
import os
import re
import sqlite3
import threading
from collections import Counter
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import unquote

import pytest

import tracelet
from tests.gateway_process import GatewayProcess
from tests.otlp_decode import decode
from tests.servers import MlflowServer, Run, Seen, Spoil, recording_proxy, rows_of, run_of
from tests.sinks import HttpSink
from tracelet.exporters.mlflow import artifacts
from tracelet.exporters.mlflow.names import legal_name, legal_path
from tracelet.shipper.process import ship
from tracelet.spool import store

NAMES = [
    "loss 🔥",
    "损失/валидация",
    "..",
    "../../etc/passwd",
    "/",
    "///",
    "a//b",
    "a/./b",
    "tab\there",
    "line\nbreak",
    "\x01\x7f",
    "%2e%2e%2f",
    "a" * 240,
    "e\u0301",  # an accent of its own: not the same name as the one letter
    "\u00e9",
    "'; drop table runs; --",
    '{"json": "not"}',
    "C:\\windows",
    "Loss",
    "loss",
]
HUGE = "0123456789" * 1_000_000
VALUES = {"nul": "a\x00b", "half": "caf\udce9", "nothing": "", "lines": "a\nb\r\n\tc", "deep": {"a": {"b": [1, None]}}}


def log_all(name: str, folder: Path, *backends: object) -> str:
    """The run, logged and not shipped; its id."""
    (folder / "bytes").write_bytes(b"12345")
    exp = tracelet.Experiment(name, project="odd input", backend=list(backends))
    exp.log_params({"huge": HUGE, **VALUES, **{f"p {odd}": odd for odd in NAMES}})
    exp.set_tags({f"t {odd}": odd for odd in NAMES})
    for i in range(3):
        for odd in NAMES:
            exp.log_metric(odd, math.nan if i == 1 else i / 7, iteration=i)
    for odd in ("emoji 🔥.bin", "a b/c%2fd.bin", ".hidden", "..dots", "x" * 200):
        exp.log_artifact(folder / "bytes", odd)
    exp.stop()
    return str(exp.id)


def shipped(run_id: str) -> Path:
    """Ship it, with nothing refused; its folder."""
    (found,) = [run for run in store.list_runs(Path(os.environ["TRACELET_DIR"])) if run.run_id == run_id]
    outcome = ship(found.folder, timeout_s=120)
    assert outcome.complete, outcome.reasons
    assert set(outcome.refused.values()) == {0}, [path.read_text() for path in found.folder.glob("rejected-*")]
    return found.folder


def test_one_run_with_every_odd_name_and_a_param_of_10_mb_is_whole_at_every_destination(
    tmp_path: Path, mlflow_server: MlflowServer, otlp_sink: HttpSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACELET_SHIPPER", "off")
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out.jsonl"
    with HttpSink() as prometheus:
        run_id = log_all(
            "odd",
            tmp_path,
            tracelet.MLflow(mlflow_server.uri),
            tracelet.MLflow("sqlite:///mlflow.db"),
            tracelet.OTLP(otlp_sink.endpoint),
            tracelet.File(str(out)),
            tracelet.Prometheus(f"{prometheus.endpoint}/v1/metrics"),
        )
        shipped(run_id)
        keys = Counter(
            next(each.value.string_value for each in point.attributes if each.key == "tracelet.metric.key")
            for _, scope, metric in prometheus.metrics()
            if scope == "tracelet" and metric.name != "tracelet.iteration"
            for point in metric.gauge.data_points
            if not point.flags
        )
        assert keys == Counter(dict.fromkeys(NAMES, 3))

    # OTLP: every name and value as it was; what a receiver can't take in one record comes in pieces.
    (attempt,) = {id(one): one for one in decode((r.signal, r.message) for r in otlp_sink.stored).values()}.values()
    assert attempt.params["huge"] == HUGE
    assert attempt.params["nul"] == "a\x00b"
    assert {name: attempt.params[f"p {name}"] for name in NAMES} == dict(zip(NAMES, NAMES, strict=True))
    assert Counter(point.name for point in otlp_sink.points(run_id)) == Counter(dict.fromkeys(NAMES, 3))
    assert all(len(received.body) < 1_000_000 for received in otlp_sink.stored)

    # A file: no line longer than its reader takes.
    lines = out.read_bytes().splitlines()
    assert max(map(len, lines)) < 2**20
    found = {
        metric["name"]
        for line in map(json.loads, lines)
        for resource in line.get("resourceMetrics", ())
        for scope in resource["scopeMetrics"]
        if scope["scope"]["name"] == "tracelet"
        for metric in scope["metrics"]
    }
    assert found == set(NAMES)

    # MLflow: a legal name for each, and the original beside it.
    run = run_of(mlflow_server, "odd", project="odd input", status="FINISHED")
    check_mlflow(run)
    rows = Counter(row.key for row in rows_of(mlflow_server, run.info.run_id))
    assert rows == Counter(dict.fromkeys(map(legal_name, NAMES), 3))
    files = mlflow_server.artifacts(run.info.run_id)
    assert 10_000_000 in files.values()
    assert {path for path in files if not path.startswith("tracelet/")} == {
        legal_path(path) for path in ("emoji 🔥.bin", "a b/c%2fd.bin", ".hidden", "..dots", "x" * 200)
    }
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        assert dict(database.execute("select key, value from params")) == run.data.params
        counted = dict(database.execute("select key, count(*) from metrics group by key"))
    assert counted == rows
    inside = tmp_path / "mlruns"
    assert {path.resolve().is_relative_to(inside) for path in inside.rglob("*")} == {True}


def check_mlflow(run: Run) -> None:
    params, tags = run.data.params, run.data.tags
    for odd in NAMES:
        key = legal_name(f"p {odd}")
        assert params[key] == odd
        assert tags[legal_name(f"t {odd}")] == odd
        if legal_name(odd) != odd:
            assert tags[f"tracelet.name.{legal_name(odd)}"] == odd
    assert len({legal_name(odd) for odd in NAMES}) == len(NAMES), "no two names become one"
    assert params["huge"].startswith(HUGE[:1000])
    assert "whole in artifact tracelet/params/huge" in unquote(params["huge"])


@pytest.mark.parametrize("name", ["nul \x00", "", " ", "tracelet.mine", "half \udce9"])
def test_a_name_that_no_backend_could_give_back_is_refused_before_it_is_written(name: str) -> None:
    exp = tracelet.Experiment("odd", project="odd input", backend="file", shipper="off")
    exp.log_metric("good", 1.0, iteration=1)
    with pytest.raises(tracelet.TraceletError):
        exp.log_metric(name, 1.0, iteration=1)
    exp.stop()


@pytest.mark.parametrize("what", ["grows", "changes", "is replaced", "vanishes"])
def test_a_file_that_changes_on_its_way_is_refused_and_one_whose_bytes_are_still_there_arrives(
    what: str, tmp_path: Path, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACELET_SHIPPER", "off")
    file = tmp_path / "model.bin"
    file.write_bytes(b"a" * 3_000_000)
    with recording_proxy(mlflow_server.uri) as proxy:
        exp = tracelet.Experiment(f"on its way: {what}", project="odd input", tracking_uri=proxy.uri)
        exp.log_metric("loss", 1.0, iteration=1)
        exp.log_artifact(file, "models/model.bin", copy=False)
        exp.stop()

        def rule(seen: Seen) -> Spoil:
            """The request has come in whole, and MLflow has not answered yet."""
            if seen.method == "PUT" and file.exists() and file.stat().st_size == 3_000_000:
                if what == "grows":
                    with open(file, "ab") as end:
                        end.write(b"b")
                elif what == "changes":
                    with open(file, "r+b") as start:
                        start.write(b"b")
                elif what == "is replaced":
                    (tmp_path / "new").write_bytes(b"b")
                    (tmp_path / "new").rename(file)
                else:
                    file.unlink()
            return Spoil()

        proxy.rule = rule
        (found,) = [run for run in store.list_runs(Path(os.environ["TRACELET_DIR"])) if run.run_id == exp.id]
        outcome = ship(found.folder, timeout_s=60)
    assert outcome.complete
    run = run_of(mlflow_server, f"on its way: {what}", project="odd input", status="FINISHED")
    there = mlflow_server.artifacts(run.info.run_id)
    if what in ("grows", "changes"):
        assert there == {}, "a mixture of two states is nobody's file"
        (path,) = found.folder.glob("rejected-*.jsonl")
        letter = json.loads(path.read_text())
        assert letter["facts"]["path"] == "models/model.bin"
        assert "when it was logged" in letter["reason"] or "has changed" in letter["reason"]
    else:
        assert there == {"models/model.bin": 3_000_000}
        assert set(outcome.refused.values()) == {0}
    assert run.data.metrics == {"loss": 1.0}


WAYS_TO_CHANGE = ("grows", "its beginning changes", "its end changes", "is replaced", "vanishes")


def happen(what: str, file: Path) -> None:
    """One of these, in the middle of the file's way."""
    if what == "grows":
        with open(file, "ab") as end:
            end.write(b"b")
    elif what == "is replaced":
        file.with_name("new").write_bytes(b"b")
        file.with_name("new").rename(file)
    elif what == "vanishes":
        file.unlink()
    else:
        with open(file, "r+b") as there:
            there.seek(0 if "beginning" in what else file.stat().st_size - 1)
            there.write(b"b")


def logged_by_reference(tmp_path: Path, name: str, size: int, **given: Any) -> tuple[store.RunFolder, dict[str, Path]]:
    """A run with a file for each of these, none of them copied, and not shipped."""
    files = {what: tmp_path / f"{what}.bin" for what in WAYS_TO_CHANGE}
    exp = tracelet.Experiment(name, project="odd input", **given)
    exp.log_metric("loss", 1.0, iteration=1)
    for what, file in files.items():
        file.write_bytes(what.encode().ljust(size, b"a"))
        exp.log_artifact(file, f"models/{what}.bin", copy=False)
    exp.stop()
    (found,) = [run for run in store.list_runs(Path(os.environ["TRACELET_DIR"])) if run.run_id == exp.id]
    return found, files


def refused_files(folder: Path) -> set[str]:
    """What of a run's files stands in its dead letters, each for having changed."""
    letters = [json.loads(line) for path in folder.glob("rejected-*.jsonl") for line in path.read_text().splitlines()]
    for letter in letters:
        assert re.search("has changed|when (it was )?logged", letter["reason"]), letter
    return {Path(letter["facts"]["path"]).stem for letter in letters}


def test_a_file_that_changes_while_it_is_put_to_a_gateway_is_refused_or_arrives_as_it_was_logged(
    tmp_path: Path, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACELET_SHIPPER", "off")
    size = 9_000_000  # two pieces
    with (
        GatewayProcess(tmp_path / "gateway", mlflow_server.uri) as gateway,
        recording_proxy(gateway.http) as proxy,
    ):
        monkeypatch.setenv("TRACELET_ARTIFACT_GATEWAY", proxy.uri)
        name = "on its way to a gateway"
        found, files = logged_by_reference(tmp_path, name, size, backend=tracelet.OTLP(gateway.http))
        contents = {what: file.read_bytes() for what, file in files.items()}
        happened: set[str] = set()

        def rule(seen: Seen) -> Spoil:
            """The first piece has come in whole, and the second has not been read."""
            if seen.method == "PATCH" and seen.headers["Upload-Offset"] == "0":
                (what,) = [what for what in WAYS_TO_CHANGE if seen.body.startswith(what.encode() + b"a")]
                if what not in happened:
                    happen(what, files[what])
                happened.add(what)
            return Spoil()

        proxy.rule = rule
        outcome = ship(found.folder, timeout_s=60)
        assert outcome.complete, outcome.reasons
        assert happened == set(WAYS_TO_CHANGE)
        run = run_of(mlflow_server, name, project="odd input", status="FINISHED")
        there = mlflow_server.artifacts(run.info.run_id)
        # The gateway compares the digest: of the first four it had what was logged, and of the fifth a mixture.
        assert refused_files(found.folder) == {"its end changes"}
        assert there.keys() == {
            *(f"models/{what}.bin" for what in WAYS_TO_CHANGE if what != "its end changes"),
            "models/its end changes.bin.reference.json",
        }
        for path in there.keys() - {"models/its end changes.bin.reference.json"}:
            (stored,) = (mlflow_server.folder / "artifacts").glob(f"*/{run.info.run_id}/artifacts/{path}")
            assert stored.read_bytes() == contents[Path(path).stem]


def test_a_file_that_changes_while_it_is_copied_beside_a_database_is_refused_and_leaves_nothing_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACELET_SHIPPER", "off")
    monkeypatch.chdir(tmp_path)
    found, files = logged_by_reference(tmp_path, "beside", 3_000_000, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    contents = {what: file.read_bytes() for what, file in files.items()}
    happened: set[str] = set()

    def in_the_middle(frame: FrameType, event: str, _: object) -> Any:
        """At a line of the copying, once the first megabyte is through and the last is not."""
        if frame.f_code is not artifacts._into_folder.__code__:
            return None
        out, what = frame.f_locals.get("out"), Path(frame.f_locals["path"]).stem
        if event == "line" and what in files.keys() - happened and out is not None and 0 < out.tell() < 3_000_000:
            happened.add(what)
            happen(what, files[what])
        return in_the_middle

    before = threading.gettrace()
    threading.settrace(in_the_middle)
    try:
        outcome = ship(found.folder, timeout_s=60)
    finally:
        threading.settrace(before)  # type: ignore[arg-type]
    assert outcome.complete, outcome.reasons
    assert happened == set(WAYS_TO_CHANGE)
    assert refused_files(found.folder) == {"grows", "its beginning changes", "its end changes"}
    there = {path.stem: path.read_bytes() for path in (tmp_path / "mlruns").rglob("models/*")}
    assert there == {what: contents[what] for what in ("is replaced", "vanishes")}
