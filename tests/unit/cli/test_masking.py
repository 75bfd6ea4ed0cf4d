"""No secret gets through to what is printed."""

from __future__ import annotations

import pytest

from tracelet.cli.masking import Sieve, shown

SECRET = "s3cret-planted"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_EXPORTER_OTLP_HEADERS", f"api-key={SECRET},other=x"),
        ("OTEL_EXPORTER_OTLP_METRICS_HEADERS", f"Authorization=Bearer%20{SECRET}"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", f"https://user:{SECRET}@collector:4318"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"https://{SECRET}@collector:4318/v1/traces"),
        ("OTEL_EXPORTER_OTLP_CLIENT_KEY", f"/home/{SECRET}"),
        ("OTEL_RESOURCE_ATTRIBUTES", f"team=a,password={SECRET}"),
        ("MLFLOW_TRACKING_TOKEN", SECRET),
        ("MLFLOW_TRACKING_PASSWORD", SECRET),
        ("MLFLOW_TRACKING_URI", f"postgresql://ml:{SECRET}@db/runs"),
        ("MLFLOW_TRACKING_URI", f"https://host/x?access_token={SECRET}"),
        ("HTTPS_PROXY", f"http://me:{SECRET}@proxy:3128"),
        ("HTTPS_PROXY", f"me:{SECRET}@proxy:3128"),
        ("HTTPS_PROXY", f"http://me:{SECRET},a@proxy:3128"),
        ("TRACELET_BACKEND", f"otlp,http://me:a/{SECRET}@h"),
        ("TRACELET_BACKEND", f"otlp,http://me:{SECRET},a@h"),
        ("MLFLOW_SOMETHING_OF_TOMORROW", SECRET),
    ],
)
def test_what_is_shown_of_a_variable_holds_no_secret(name: str, value: str) -> None:
    assert SECRET not in shown(name, value)


def test_an_address_stays_readable_without_its_credentials() -> None:
    assert shown("MLFLOW_TRACKING_URI", f"postgresql://ml:{SECRET}@db/runs") == "postgresql://ml@db/runs"
    assert shown("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318") == "http://collector:4318"


def test_the_names_of_headers_are_shown_and_their_values_are_not() -> None:
    assert shown("OTEL_EXPORTER_OTLP_HEADERS", "api-key=abc, x-scope=t1") == "set (api-key=***, x-scope=***)"


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"MLFLOW_TRACKING_TOKEN": SECRET}, f"401: bad token {SECRET}"),
        ({"OTEL_EXPORTER_OTLP_HEADERS": "Authorization=Basic%20" + SECRET}, f"sent Basic {SECRET}"),
        ({"OTEL_EXPORTER_OTLP_HEADERS": "api-key=a%2Fb%2F" + SECRET}, f"sent a/b/{SECRET}"),
        ({"MLFLOW_TRACKING_URI": f"http://bob:{SECRET}@host"}, f"user bob, password {SECRET}"),
        ({"MLFLOW_TRACKING_URI": "http://bob:p%40" + SECRET + "@host"}, f"password p@{SECRET}"),
        ({"MLFLOW_TRACKING_URI": f"http://bob:{SECRET}@host"}, "Basic Ym9iOnMzY3JldC1wbGFudGVk"),
        ({"MLFLOW_TRACKING_URI": f"http://bob:{SECRET}@host"}, "Basic Ym9iOnMzY3JldC1wbGFudGVk=="),
        ({"X_USERNAME": "bob", "X_PASSWORD": SECRET}, "sent Basic Ym9iOnMzY3JldC1wbGFudGVk"),
        ({"X_USER": "bob", "X_PASSWORD": SECRET}, "sent Basic Ym9iOnMzY3JldC1wbGFudGVk"),
        ({"ENDPOINT": f"http://host/x?api_key={SECRET}"}, f"POST /x?api_key={SECRET}"),
        ({"MY_TOKEN": f'a"b/{SECRET}'}, 'in JSON a\\"b/' + SECRET),
        ({"MY_TOKEN": f"a+b/{SECRET}"}, f"in an address a%2Bb%2F{SECRET}"),
        ({}, f"can't open postgresql://ml:{SECRET}@db/runs"),
    ],
)
def test_the_sieve_takes_a_secret_out_of_the_words_of_others(environ: dict[str, str], words: str) -> None:
    sieved = Sieve(environ)(words)
    assert SECRET not in sieved
    assert "Ym9iOnMzY3JldC1wbGFudGVk" not in sieved


def test_the_sieve_knows_secrets_given_as_arguments() -> None:
    secrets = {"headers": {"api-key": SECRET}, "endpoint": "https://u:pass-word@host", "environment": {"P": "grpc"}}
    assert Sieve({}, [secrets])(f"{SECRET} and pass-word by grpc") == "*** and *** by grpc"


def test_a_secret_too_short_to_tell_apart_does_not_blot_out_the_text() -> None:
    assert Sieve({"MLFLOW_TRACKING_TOKEN": "a"})("a banana") == "a banana"


def test_a_variable_that_only_sounds_like_a_secret_does_not_blot_out_ordinary_words() -> None:
    environ = {"TOKENIZERS_PARALLELISM": "false", "USE_AUTH_TOKEN": "true", "KEYBOARD": "qwerty"}
    assert Sieve(environ)("false is not true, nor qwerty") == "false is not true, nor qwerty"


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "GITHUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "DB_PASSWORD", "X_API_KEY"]
)
def test_the_usual_names_of_secrets_are_known(name: str) -> None:
    assert Sieve({name: SECRET})(f"it said {SECRET}") == "it said ***"


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"MAX_NEW_TOKENS": "1024"}, "1024 points are left"),
        ({"TRACELET_OTLP_HEADERS_FILE": "/run/token"}, "can't read /run/token"),
        ({"MLFLOW_TRACKING_URI": "postgresql://mlflow@db/runs"}, "mlflow at db does not answer"),
    ],
)
def test_what_only_leads_to_a_secret_or_counts_stays_readable(environ: dict[str, str], words: str) -> None:
    assert Sieve(environ)(words) == words


def test_a_header_with_commas_given_as_an_argument_is_a_secret_whole() -> None:
    assert Sieve({}, [{"headers": {"x-sig": "part-one,part-two"}}])("it was part-one,part-two") == "it was ***"
