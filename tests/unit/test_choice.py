"""Which destinations a run gets, by what is named and by the environment, and the line that says why."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tracelet import settings
from tracelet.backends import OTLP, MLflow
from tracelet.choice import Chosen, _installed, choose

CWD = Path("/work folder")
METRICS = "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"
BASE = "OTEL_EXPORTER_OTLP_ENDPOINT"


def chosen(
    backend: object = None, uri: str | None = None, environ: dict[str, str] | None = None, *, mlflow: bool = False
) -> Chosen:
    return choose(backend, tracking_uri=uri, environ=environ or {}, cwd=CWD, mlflow_installed=mlflow)


def kinds(choice: Chosen) -> list[str]:
    return [destination["kind"] for destination in choice.destinations]


def test_prometheus_takes_what_is_open_from_the_settings() -> None:
    environ = {"TRACELET_PROMETHEUS_URL": "http://p:1", "TRACELET_METRIC_PREFIX": "lab.", "TRACELET_WINDOW_AGE": "2h"}
    resolved = settings.resolve({}, {}, environ=environ, cwd=Path("/"), argv=["train.py"])
    named = choose("prometheus", tracking_uri=None, environ=environ, cwd=Path("/"), settings=resolved)
    (destination,) = named.destinations
    assert destination["spec"] == {
        "url": "http://p:1/api/v1/otlp/v1/metrics",
        "prefix": "lab.",
        "window_age_s": 7200.0,
        "window_ahead_s": 540.0,
        "timeout_s": None,
    }
    assert "metrics only" in named.why


def test_exporter_objects_stand_in_a_list_with_names_and_each_gets_its_own_signals() -> None:
    from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter
    from opentelemetry.sdk.metrics.export import ConsoleMetricExporter
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    spans, again, logs, metrics = (
        InMemorySpanExporter(),
        InMemorySpanExporter(),
        InMemoryLogRecordExporter(),
        ConsoleMetricExporter(),
    )
    choice = chosen(["file", spans, logs, metrics, spans, again])
    assert kinds(choice) == ["file", "live", "live", "live", "live"]  # one that is named twice is one
    live = choice.destinations[1:]
    assert [one["spec"]["signals"] for one in live] == [["traces"], ["logs"], ["metrics"], ["traces"]]
    assert len({one["id"] for one in live}) == 4
    assert all(one["in_process"] for one in live)
    assert [choice.secrets[one["id"]]["exporter"] for one in live] == [spans, logs, metrics, again]
    json.dumps(choice.destinations)  # nothing of the objects is in the manifest
    assert "it dies with the program" in choice.why
    assert "the traces to InMemorySpanExporter, the logs to InMemoryLogRecordExporter" in choice.why


def test_the_same_exporters_of_a_next_start_are_the_same_destinations() -> None:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    starts = [chosen([InMemorySpanExporter(), InMemorySpanExporter()]) for _ in range(2)]
    assert [d["id"] for d in starts[0].destinations] == [d["id"] for d in starts[1].destinations]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"MLFLOW_TRACKING_URI": "http://m:5000"}, ["mlflow"]),
        ({BASE: "http://c:4318"}, ["otlp"]),
        ({METRICS: "http://c:4318/v1/metrics"}, ["otlp"]),
        ({"MLFLOW_TRACKING_URI": "http://m:5000", BASE: "http://c:4318"}, ["mlflow", "otlp"]),
        ({BASE: "", "MLFLOW_TRACKING_URI": " "}, []),
        ({}, []),
    ],
)
def test_each_variable_names_its_own_destination(environ: dict[str, str], expected: list[str]) -> None:
    assert kinds(chosen(environ=environ)) == expected


def test_with_nothing_named_mlflows_local_store_is_used_where_mlflow_is_installed() -> None:
    choice = chosen(mlflow=True)
    assert [d["spec"]["tracking_uri"] for d in choice.destinations] == ["sqlite:////work folder/mlflow.db"]
    assert "mlflow is installed" in choice.why


def test_with_nothing_named_and_no_mlflow_the_run_stays_in_the_spool_and_the_line_says_what_to_set() -> None:
    choice = chosen()
    assert choice.destinations == ()
    assert choice.why.startswith("stays in the spool")
    assert "MLFLOW_TRACKING_URI" in choice.why


def test_mlflow_is_looked_up_without_importing_it() -> None:
    before = "mlflow" in sys.modules
    choice = choose(None, tracking_uri=None, environ={}, cwd=CWD)
    assert kinds(choice) == ["mlflow"]
    assert ("mlflow" in sys.modules) == before


def test_a_folder_that_is_merely_called_mlflow_is_not_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_folder_of_ours").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not _installed("some_folder_of_ours")


def test_a_named_backend_wins_over_the_environment() -> None:
    assert kinds(chosen("console", environ={"MLFLOW_TRACKING_URI": "http://m:5000"}, mlflow=True)) == ["console"]


def test_the_tracking_uri_is_that_of_mlflow_and_names_it_alone() -> None:
    environ = {"MLFLOW_TRACKING_URI": "http://other:5000"}
    for choice in (chosen(uri="http://m:5000", environ=environ), chosen("mlflow", "http://m:5000", environ)):
        assert [d["spec"]["tracking_uri"] for d in choice.destinations] == ["http://m:5000"]
    own = chosen([MLflow("http://own:1")], "http://m:5000")
    assert own.destinations[0]["spec"]["tracking_uri"] == "http://own:1"


def test_otlp_chosen_by_the_environment_sends_only_signals_with_an_endpoint_and_names_the_others() -> None:
    choice = chosen(environ={METRICS: "http://c:4318/v1/metrics"})
    assert choice.destinations[0]["spec"]["signals"] == ["metrics"]
    assert not choice.destinations[0]["spec"]["explicit"]
    assert "traces, logs not sent" in choice.why
    assert chosen("otlp").destinations[0]["spec"]["signals"] == ["metrics", "traces", "logs"]


def test_with_otels_sdk_disabled_nothing_goes_out_by_otlp_and_the_line_says_so() -> None:
    environ = {"OTEL_SDK_DISABLED": "true", BASE: "http://c:4318", "MLFLOW_TRACKING_URI": "http://m:5000"}
    choice = chosen(environ=environ)
    assert kinds(choice) == ["mlflow"]
    assert "OTEL_SDK_DISABLED" in choice.why
    assert kinds(chosen("otlp", environ=environ)) == []


def test_the_line_says_where_and_why() -> None:
    assert chosen(environ={"MLFLOW_TRACKING_URI": "http://u:pw@m:5000"}).why == (
        "goes to MLflow at http://m:5000 (MLFLOW_TRACKING_URI)"
    )


def test_secrets_are_not_in_a_repr_nor_in_the_chosen_line() -> None:
    choice = chosen([MLflow("http://u:s3cret@m"), OTLP("http://u:s3cret@c:1", headers={"a": "s3cret"})])
    assert "s3cret" not in repr(choice) + choice.why
    assert "s3cret" not in repr(MLflow("http://u:s3cret@m")) + repr(OTLP("http://u:s3cret@c", headers={"a": "s3cret"}))
    assert set(choice.secrets) == {destination["id"] for destination in choice.destinations}


def test_a_destination_named_twice_is_one() -> None:
    assert kinds(chosen(["mlflow", MLflow("sqlite:///mlflow.db")])) == ["mlflow"]
