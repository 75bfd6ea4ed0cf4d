"""Names, specifications and lists of them, and what is no backend at all."""

from __future__ import annotations

import pytest

from tracelet.backends import OTLP, Console, File, MLflow, parse
from tracelet.errors import ConfigError


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


def test_an_object_that_is_no_exporter_of_the_sdk_is_told_what_to_be() -> None:
    class Mine:
        def export(self, spans: object) -> None: ...

    with pytest.raises(ConfigError, match="Mine is none of OpenTelemetry's exporters: make it a subclass of Span"):
        parse(Mine())


@pytest.mark.parametrize("backend", [[], "", " , ", 5, {"mlflow": 1}, MLflow, object()])
def test_what_names_no_destination_is_refused(backend: object) -> None:
    with pytest.raises(ConfigError):
        parse(backend)
