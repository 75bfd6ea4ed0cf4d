"""The gateway's settings: options before the environment, strict names, and no open door by mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from tracelet import settings
from tracelet.errors import ConfigError
from tracelet.gateway.options import GATEWAY_SETTINGS, destination, resolve

MLFLOW = {"MLFLOW_TRACKING_URI": "http://mlflow:5000"}


def test_an_option_comes_before_the_environment_and_that_before_the_default() -> None:
    environ = {**MLFLOW, "TRACELET_GATEWAY_HTTP_PORT": "1111", "TRACELET_GATEWAY_MAX_BODY": "1MiB"}
    options = resolve({"http_port": "2222"}, environ)
    assert (options.http_port, options.max_body, options.grpc_port) == (2222, 1 << 20, 4317)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TRACELET_GATEWAY_HTTP_PORT", "http"),
        ("TRACELET_GATEWAY_HTTP_PORT", "65536"),
        ("TRACELET_GATEWAY_GRPC_PORT", "none"),
        ("TRACELET_GATEWAY_MAX_BODY", "0"),
        ("TRACELET_GATEWAY_MAX_BODY", "many"),
        ("TRACELET_GATEWAY_THREADS", "0"),
        ("TRACELET_GATEWAY_ALLOW_ANONYMOUS", "perhaps"),
        ("TRACELET_LOST_AFTER", "soon"),
        ("TRACELET_GATEWAY_MAX_IN_FLIGHT", "1MiB"),
        ("TRACELET_GATEWAY_MLFLOW_PUBLIC", "mlflow:5000"),
        ("TRACELET_GATEWAY_MLFLOW_PUBLIC", "javascript:alert(1)"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_it(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve({}, {**MLFLOW, name: value})
    assert value in str(error.value) or "max-in-flight" in str(error.value)


def test_the_address_that_browsers_are_sent_to_has_no_password() -> None:
    given = {"TRACELET_GATEWAY_MLFLOW_PUBLIC": "https://me:secret@ml.example.com/mlflow/"}
    assert resolve({}, {**MLFLOW, **given}).mlflow_public == "https://ml.example.com/mlflow"


def test_a_misspelt_name_is_an_error_that_names_the_right_one() -> None:
    with pytest.raises(ConfigError, match="TRACELET_GATEWAY_TOKENS"):
        resolve({}, {**MLFLOW, "TRACELET_GATEWAY_TOKNES": "x"})


def test_names_of_the_collector_and_of_kubernetes_are_no_misspelling() -> None:
    resolve(
        {},
        {
            **MLFLOW,
            "TRACELET_GATEWAY_URL": "http://gateway:4318",
            "TRACELET_GATEWAY_2_URL": "http://gateway-2:4318",
            "TRACELET_GATEWAY_TOKEN": "x",
            "TRACELET_GATEWAY_SERVICE_HOST": "10.0.0.1",
            "TRACELET_GATEWAY_PORT_4318_TCP": "tcp://10.0.0.1:4318",
            "TRACELET_GATEWAY_HTTP_PORT": "tcp://10.0.0.1:4318",
        },
    )


def test_training_takes_no_notice_of_the_gateways_names(tmp_path: Path) -> None:
    environ = {str(setting.env): "x" for setting in GATEWAY_SETTINGS}
    settings.resolve({}, {}, environ=environ, cwd=tmp_path, argv=["train.py"])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "gateway.example.com"])
def test_beyond_loopback_somebody_has_to_guard_the_door(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokens"):
        resolve({"host": host}, MLFLOW)
    assert resolve({"host": host, "allow_anonymous": True}, MLFLOW).host == host
    assert resolve({"host": host, "tokens": str(tmp_path / "tokens.toml")}, MLFLOW).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_on_loopback_no_token_is_needed(host: str) -> None:
    assert resolve({"host": host}, MLFLOW).host == host


def test_without_mlflow_nothing_says_where_runs_go() -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):
        resolve({}, {})


def test_half_of_a_certificate_is_an_error() -> None:
    with pytest.raises(ConfigError, match="both"):
        resolve({"tls_cert": "a.pem"}, MLFLOW)


def test_the_destination_holds_no_credentials() -> None:
    environ = {"MLFLOW_TRACKING_URI": "http://user:sesame@mlflow:5000"}
    found, secrets = destination(resolve({"dir": "/spool", "artifact_prefixes": "s3://a/, s3://b/"}, environ), environ)
    assert "sesame" not in str(found)
    assert secrets["tracking_uri"] == environ["MLFLOW_TRACKING_URI"]
    assert found["spec"]["artifact_dir"] == "/spool/artifacts"
    assert found["spec"]["artifact_prefixes"] == ["s3://a/", "s3://b/"]
