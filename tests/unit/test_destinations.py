"""A destination as the manifest keeps it: addresses that another process can use, and secrets kept apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tracelet.backends import OTLP, Console, File, MLflow, Prometheus, Spec
from tracelet.destinations import to_destination, tracking_uri
from tracelet.errors import ConfigError

CWD = Path("/work folder")
BASE = "OTEL_EXPORTER_OTLP_ENDPOINT"


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


def test_a_file_is_absolute_and_the_console_is_served_in_process() -> None:
    assert to_destination(File("out.jsonl"), {}, CWD)[0]["spec"] == {"path": "/work folder/out.jsonl"}
    assert to_destination(File(), {}, CWD)[0]["spec"] == {"path": "/work folder/tracelet.otlp.jsonl"}
    assert to_destination(Console(), {}, CWD)[0]["in_process"] is True
