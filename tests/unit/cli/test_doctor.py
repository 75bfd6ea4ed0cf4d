"""doctor finds what is wrong, says what to do, and never shows a secret."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.servers import Spoil, recording_proxy
from tests.sinks import HttpSink, Say
from tracelet.cli.main import main

SECRETS = ("s3cret-in-header", "s3cret-token", "s3cret-password", "s3cret-in-uri", "s3cret-in-otlp-uri", "s3cret-proxy")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder without a pyproject.toml or a git root of ours."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return folder


def examined(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any]]:
    code = main(["doctor", "--json", *argv])
    return code, json.loads(capsys.readouterr().out)


def problems(report: dict[str, Any]) -> str:
    return "\n".join(problem["what"] + " -> " + problem["advice"] for problem in report["problems"])


def test_where_nothing_is_wrong_it_says_so_and_exits_with_0(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACELET_BACKEND", "file")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.rstrip().endswith("Nothing is wrong.")
    assert "TRACELET_BACKEND" in text


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_planted_secrets_are_in_no_output(
    form: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = {
        "TRACELET_BACKEND": "mlflow,otlp",
        "OTEL_EXPORTER_OTLP_HEADERS": f"api-key={SECRETS[0]},Authorization=Bearer%20{SECRETS[0]}",
        "MLFLOW_TRACKING_TOKEN": SECRETS[1],
        "MLFLOW_TRACKING_PASSWORD": SECRETS[2],
        "MLFLOW_TRACKING_URI": f"http://bob:{SECRETS[3]}@127.0.0.1:9/mlflow?api_token={SECRETS[3]}",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://carol:{SECRETS[4]}@127.0.0.1:9",
        "NO_PROXY": f"http://dan:{SECRETS[5]}@proxy:3128,127.0.0.1",
    }
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    assert main(["doctor", *form]) == 1
    told = capsys.readouterr()
    for secret in SECRETS:
        assert secret not in told.out
        assert secret not in told.err
    assert "127.0.0.1:9/mlflow" in told.out


def test_a_secret_that_a_server_sends_back_is_not_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with HttpSink() as sink:
        sink.rule = lambda received: Say(status=403, body=f"no: {SECRETS[0]}".encode())
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", sink.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"api-key={SECRETS[0]}")
        assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "403" in text
    assert SECRETS[0] not in text


def test_a_misspelt_variable_is_a_problem_beside_the_others_and_no_crash(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACELET_BAKEND", "mlflow")
    monkeypatch.setenv("TRACELET_SHIPPER", "sometimes")
    monkeypatch.setenv("TRACELET_BACKEND", "file")
    code, report = examined(capsys)
    assert code == 1
    assert "did you mean TRACELET_BACKEND?" in problems(report)
    assert "TRACELET_SHIPPER is 'sometimes'" in problems(report)
    assert report["destinations"][0]["reachable"] is True  # the rest was looked at all the same
    assert report["settings"]["backend"] == {"value": "file", "origin": "TRACELET_BACKEND"}


def test_a_broken_pyproject_is_a_problem_and_no_crash(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    (elsewhere / "pyproject.toml").write_text("[tool.tracelet]\nbackend = ")
    code, report = examined(capsys)
    assert code == 1
    assert "pyproject.toml can't be read" in problems(report)
    assert report["versions"]["tracelet"]


def test_a_setting_of_pyproject_has_its_origin(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    (elsewhere / "pyproject.toml").write_text('[tool.tracelet]\nbackend = "file"\n')
    _, report = examined(capsys)
    assert str(elsewhere / "pyproject.toml") in report["settings"]["backend"]["origin"]


def test_an_otlp_receiver_is_asked_with_an_empty_export_of_each_signal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with HttpSink() as sink:
        asked: list[tuple[str, bytes, str | None]] = []
        sink.rule = lambda received: asked.append(
            (received.signal, received.body, {k.lower(): v for k, v in received.headers.items()}.get("api-key"))
        )
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", sink.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=k")
        code, report = examined(capsys)
    assert code == 0, problems(report)
    assert asked == [("metrics", b"", "k"), ("traces", b"", "k"), ("logs", b"", "k")]


def test_what_nobody_answers_is_a_problem_with_a_way_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    code, report = examined(capsys)
    assert code == 1
    assert "Connection refused" in problems(report)
    assert "start the receiver" in problems(report)


def test_offline_asks_nobody(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    code, report = examined(capsys, "--offline")
    assert code == 0
    assert report["destinations"][0]["reachable"] is None


def test_a_database_in_a_folder_that_is_not_there_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////no/such/folder/mlflow.db")
    code, report = examined(capsys)
    assert code == 1
    assert "the folder /no/such/folder doesn't exist" in problems(report)


def test_a_file_that_is_no_database_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, elsewhere: Path
) -> None:
    (elsewhere / "mlflow.db").write_text("no database, " * 100)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    code, report = examined(capsys)
    assert code == 1
    assert "not a database" in problems(report)
    assert (elsewhere / "mlflow.db").read_text().startswith("no database")


def test_a_spool_below_a_file_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, elsewhere: Path
) -> None:
    (elsewhere / "file").write_text("")
    monkeypatch.setenv("TRACELET_DIR", str(elsewhere / "file" / "spool"))
    monkeypatch.setenv("TRACELET_BACKEND", "file")
    code, report = examined(capsys)
    assert code == 1
    assert "can't be made" in problems(report)


def test_doctor_makes_no_folder_and_leaves_no_file(
    capsys: pytest.CaptureFixture[str], clean_environment: Path, elsewhere: Path
) -> None:
    _, report = examined(capsys)
    assert report["spool"]["writable"] is True
    assert not clean_environment.exists()
    assert os.listdir(elsewhere) == []


def test_a_job_whose_shipper_dies_with_it_is_a_note_and_no_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACELET_BACKEND", "file")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    code, report = examined(capsys)
    assert code == 0
    assert any("can't outlive the program" in note for note in report["notes"])


def test_an_mlflow_server_that_wants_other_credentials_is_told_apart_from_one_that_is_away(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with recording_proxy("http://127.0.0.1:9") as server:
        server.rule = lambda seen: Spoil(forward=False, answer=(401, f"not {SECRETS[1]}".encode(), {}))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRETS[1])
        code, report = examined(capsys)
        assert code == 1
        assert "wants other credentials (401)" in problems(report)
        assert "MLFLOW_TRACKING_TOKEN" in problems(report)
        assert SECRETS[1] not in json.dumps(report)
        assert server.seen[-1].headers.get("Authorization") == f"Bearer {SECRETS[1]}"  # it was tried with it
    _, report = examined(capsys)
    assert "can't reach" in problems(report)
    assert "mlflow server" in problems(report)


def test_a_deleted_mlflow_experiment_is_a_problem_before_a_run_waits_for_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = json.dumps({"experiment": {"experiment_id": "7", "lifecycle_stage": "deleted"}}).encode()
    with recording_proxy("http://127.0.0.1:9") as server:
        server.rule = lambda seen: Spoil(forward=False, answer=(200, body, {}))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        monkeypatch.setenv("TRACELET_PROJECT", "digits")
        code, report = examined(capsys)
    assert code == 1
    assert "its experiment 'digits' is deleted" in problems(report)
    assert "mlflow experiments restore -x 7" in problems(report)


def test_a_grpc_receiver_that_is_away_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    code, report = examined(capsys)
    assert code == 1
    assert "gRPC UNAVAILABLE" in problems(report)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("TRACELET_ARTIFACT_STORE", "file:///shared/runs", "go to the store file:///shared/runs"),
        ("TRACELET_ARTIFACT_GATEWAY", "http://gateway:4318", "are put to the gateway http://gateway:4318"),
        ("TRACELET_ARTIFACT_TOKEN", "s3cret-token", "stay where they are"),
    ],
)
def test_where_files_go_that_travel_beside_otlp_is_said(
    variable: str, value: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACELET_BACKEND", "otlp")
    monkeypatch.setenv(variable, value)
    _, report = examined(capsys, "--offline")
    assert any(said in note for note in report["notes"])
    assert "s3cret-token" not in json.dumps(report)


def test_a_store_that_can_not_be_one_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACELET_BACKEND", "otlp")
    monkeypatch.setenv("TRACELET_ARTIFACT_STORE", "https://example.com/x")
    code, report = examined(capsys, "--offline")
    assert code == 1
    assert "TRACELET_ARTIFACT_STORE" in problems(report)
