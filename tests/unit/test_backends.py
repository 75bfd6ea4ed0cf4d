"""Backends: names and specifications, the choice when none is named, absolute addresses, secrets kept apart."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tracelet import settings
from tracelet.addresses import without_credentials
from tracelet.backends import OTLP, Console, File, MLflow, Prometheus, Spec, parse
from tracelet.choice import Chosen, _installed, choose
from tracelet.destinations import to_destination, tracking_uri
from tracelet.errors import ConfigError

CWD = Path("/work folder")
METRICS = "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"
BASE = "OTEL_EXPORTER_OTLP_ENDPOINT"


def chosen(
    backend: object = None, uri: str | None = None, environ: dict[str, str] | None = None, *, mlflow: bool = False
) -> Chosen:
    return choose(backend, tracking_uri=uri, environ=environ or {}, cwd=CWD, mlflow_installed=mlflow)


def kinds(choice: Chosen) -> list[str]:
    return [destination["kind"] for destination in choice.destinations]


@pytest.mark.parametrize(
    ("backend", "specs"),
    [
        ("mlflow", (MLflow(),)),
        ("MLflow", (MLflow(),)),
        ("mlflow, otlp", (MLflow(), OTLP())),
        (["console", "file"], (Console(), File())),
        (MLflow("http://h:1"), (MLflow("http://h:1"),)),
        (["mlflow", OTLP(headers={"a": "b"}), OTLP(headers={"a": "b"})], (MLflow(), OTLP(headers={"a": "b"}))),
    ],
)
def test_a_backend_is_a_name_a_specification_or_several(backend: object, specs: tuple[object, ...]) -> None:
    assert parse(backend) == specs


def test_a_misspelt_backend_is_named_with_the_nearest_right_one() -> None:
    with pytest.raises(ConfigError, match="backend 'mlflwo' is none: did you mean 'mlflow'"):
        parse("otlp,mlflwo")


@pytest.mark.parametrize(
    ("url", "completed"),
    [
        ("http://prom:9090", "http://prom:9090/api/v1/otlp/v1/metrics"),
        ("http://prom:9090/", "http://prom:9090/api/v1/otlp/v1/metrics"),
        ("http://prom:9090/api/v1/otlp", "http://prom:9090/api/v1/otlp/v1/metrics"),
        ("https://host/prometheus", "https://host/prometheus/api/v1/otlp/v1/metrics"),
        ("http://mimir:8080/otlp", "http://mimir:8080/otlp/v1/metrics"),
        ("http://vm:8428/opentelemetry/v1/metrics", "http://vm:8428/opentelemetry/v1/metrics"),
    ],
)
def test_prometheus_address_is_completed_and_the_collectors_own_variable_fits(url: str, completed: str) -> None:
    assert to_destination(Prometheus(url), {}, Path("/"))[0]["spec"]["url"] == completed


def test_what_lets_somebody_into_prometheus_is_a_secret() -> None:
    spec = Prometheus("http://ml:s3cret@prom:9090", headers={"X-Scope-OrgID": "team-a"})
    destination, secrets = to_destination(spec, {}, Path("/"))
    assert "s3cret" not in repr(destination) + repr(spec)
    assert secrets["url"].startswith("http://ml:s3cret@prom:9090/")
    assert secrets["headers"] == {"X-Scope-OrgID": "team-a"}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (Prometheus("prom:9090"), "has to be one such as http://localhost:9090"),
        (Prometheus(prefix=""), "begin with a letter"),
        (Prometheus(prefix="9."), "begin with a letter"),
        (Prometheus(window_age="a week"), "window_age is 'a week', but has to be a number of seconds"),
        (Prometheus(timeout_s=0), "timeout_s is 0"),
    ],
)
def test_what_cannot_be_right_for_prometheus_is_refused(spec: Prometheus, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        to_destination(spec, {}, Path("/"))


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


def test_an_object_that_is_no_exporter_of_the_sdk_is_told_what_to_be() -> None:
    class Mine:
        def export(self, spans: object) -> None: ...

    with pytest.raises(ConfigError, match="Mine is none of OpenTelemetry's exporters: make it a subclass of Span"):
        parse(Mine())


@pytest.mark.parametrize("backend", [[], "", " , ", 5, {"mlflow": 1}, MLflow, object()])
def test_what_names_no_destination_is_refused(backend: object) -> None:
    with pytest.raises(ConfigError):
        parse(backend)


# ---- which one is meant ------------------------------------------------------------------------------------------


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


# ---- addresses and secrets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "absolute"),
    [
        ("sqlite:///mlflow.db", "sqlite:////work folder/mlflow.db"),
        ("sqlite:///./x/../mlflow.db?timeout=5", "sqlite:////work folder/mlflow.db?timeout=5"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("http://m:5000/", "http://m:5000"),
        ("https://m/base/", "https://m/base"),
        ("postgresql://db/runs", "postgresql://db/runs"),
    ],
)
def test_mlflows_addresses_become_absolute(given: str, absolute: str) -> None:
    destination, secrets = to_destination(MLflow(given), {}, CWD)
    assert destination["spec"]["tracking_uri"] == absolute
    assert secrets == {}


@pytest.mark.parametrize(
    "uri",
    ["databricks-uc", "uc", "file:///x", "mlruns", "uc:x", "ftp://x", "sqlite://", "sqlite:///:memory:", "http://"],
)
def test_an_address_that_another_process_cannot_use_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError):
        to_destination(MLflow(uri), {}, CWD)


@pytest.mark.parametrize(
    ("uri", "public"),
    [
        ("http://user:s3cret@m:5000", "http://m:5000"),
        ("https://s3cret@m", "https://m"),
        ("postgresql+psycopg://ml:s3cret@db/runs?sslmode=require", "postgresql+psycopg://ml@db/runs?sslmode=require"),
        ("mysql://ml@db/runs?ssl_key=s3cret&charset=utf8", "mysql://ml@db/runs?charset=utf8"),
    ],
)
def test_credentials_leave_the_destination_and_can_be_put_back(uri: str, public: str) -> None:
    destination, secrets = to_destination(MLflow(uri), {}, CWD)
    assert destination["spec"]["tracking_uri"] == public
    assert "s3cret" not in json.dumps(destination)
    assert tracking_uri(destination, secrets) == uri
    assert tracking_uri(destination, {}) == public


def test_otlps_headers_and_credentials_are_secrets() -> None:
    environ = {BASE: "http://u:s3cret@c:4318", "OTEL_EXPORTER_OTLP_HEADERS": "authorization=s3cret"}
    spec = OTLP(endpoint="https://u:s3cret@o:4318", headers={"authorization": "s3cret"})
    destination, secrets = to_destination(spec, environ, CWD)
    assert "s3cret" not in json.dumps(destination)
    assert secrets == {
        "headers": {"authorization": "s3cret"},
        "endpoint": "https://u:s3cret@o:4318",
        "environment": {BASE: "http://u:s3cret@c:4318"},
    }
    assert destination["spec"]["endpoint"] == "https://o:4318"


def test_secrets_are_not_in_a_repr_nor_in_the_chosen_line() -> None:
    choice = chosen([MLflow("http://u:s3cret@m"), OTLP("http://u:s3cret@c:1", headers={"a": "s3cret"})])
    assert "s3cret" not in repr(choice) + choice.why
    assert "s3cret" not in repr(MLflow("http://u:s3cret@m")) + repr(OTLP("http://u:s3cret@c", headers={"a": "s3cret"}))
    assert set(choice.secrets) == {destination["id"] for destination in choice.destinations}


def test_the_address_of_the_environment_is_kept_for_a_later_shipper() -> None:
    environ = {BASE: "http://c:4318", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_HEADERS": "a=b"}
    destination, _ = to_destination(OTLP(explicit=False), environ, CWD)
    assert destination["spec"]["environment"] == {BASE: "http://c:4318", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}


@pytest.mark.parametrize(
    "spec",
    [OTLP(protocol="http"), OTLP(compression="zip"), OTLP(timeout_s=0), OTLP(timeout_s=float("nan")), OTLP("c:4318")],
)
def test_an_otlp_field_that_cannot_be_right_is_refused(spec: OTLP) -> None:
    with pytest.raises(ConfigError):
        to_destination(spec, {}, CWD)


def test_grpc_takes_a_bare_host_and_port() -> None:
    assert to_destination(OTLP("c:4317", protocol="grpc"), {}, CWD)[0]["spec"]["endpoint"] == "c:4317"
    assert to_destination(OTLP("c:4317"), {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, CWD)[0]["kind"] == "otlp"


def test_the_id_is_of_the_address_and_not_of_its_credentials_or_timeout() -> None:
    def one(spec: Spec) -> str:
        return str(to_destination(spec, {}, CWD)[0]["id"])

    assert one(MLflow("http://a:1@m")) == one(MLflow("http://m"))
    assert one(OTLP("http://c:1", timeout_s=3, headers={"a": "b"})) == one(OTLP("http://c:1"))
    ids = [one(spec) for spec in (MLflow("http://m"), MLflow("http://n"), OTLP("http://m"), OTLP(), Console(), File())]
    assert len(set(ids)) == len(ids)
    assert one(MLflow("http://m")).startswith("mlflow-")


def test_a_destination_named_twice_is_one() -> None:
    assert kinds(chosen(["mlflow", MLflow("sqlite:///mlflow.db")])) == ["mlflow"]


def test_a_file_is_absolute_and_the_console_is_served_in_process() -> None:
    assert to_destination(File("out.jsonl"), {}, CWD)[0]["spec"] == {"path": "/work folder/out.jsonl"}
    assert to_destination(File(), {}, CWD)[0]["spec"] == {"path": "/work folder/tracelet.otlp.jsonl"}
    assert to_destination(Console(), {}, CWD)[0]["in_process"] is True


@pytest.mark.parametrize("uri", ["sqlite:////x/mlflow.db", "http://h:1/p?q=1", "", "mlruns", "http://[::1]:5000"])
def test_an_address_without_credentials_is_untouched(uri: str) -> None:
    assert without_credentials(uri) == uri
