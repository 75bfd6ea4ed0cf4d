"""Each limit of `limits.py` at a real MLflow server: what is at the limit is taken, one beyond is not."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest

from tests.mlflow_batches import batch, deliver, exporters_closed, opened_exporter, run_info, started
from tests.servers import MlflowServer, get_run, rows_of
from tracelet.exporters.mlflow import limits
from tracelet.exporters.mlflow.exporter import MLflowExporter
from tracelet.exporters.mlflow.transport import MetricRow, Refused, Transport
from tracelet.records import ParamsLogged, TagsSet

__all__ = ["exporters_closed"]


@pytest.fixture
def exporter(mlflow_server: MlflowServer) -> MLflowExporter:
    run = run_info(uuid.uuid4().hex)
    exporter = opened_exporter(mlflow_server.uri, run)
    deliver(exporter, batch(run, started()))
    return exporter


def pairs(count: int) -> list[tuple[str, str]]:
    return [(f"k{n}", "v") for n in range(count)]


def rows(count: int) -> list[MetricRow]:
    return [("m", 1.0, n, n) for n in range(count)]


Send = Callable[[Transport, str, int], None]
LIMITS: list[tuple[str, int, Send]] = [
    ("metrics", limits.METRICS_PER_REQUEST, lambda to, run, n: to.log_metrics(run, rows(n))),
    ("params", limits.PARAMS_PER_REQUEST, lambda to, run, n: to.log_params(run, pairs(n))),
    ("tags", limits.TAGS_PER_REQUEST, lambda to, run, n: to.log_tags(run, pairs(n))),
    ("metric key", limits.KEY_CHARS, lambda to, run, n: to.log_metrics(run, [("é" * n, 1.0, 1, 1)])),
    ("param key", limits.KEY_CHARS, lambda to, run, n: to.log_params(run, [("é" * n, "v")])),
    ("tag key", limits.KEY_CHARS, lambda to, run, n: to.log_tags(run, [("é" * n, "v")])),
]


@pytest.mark.parametrize(("what", "limit", "send"), LIMITS, ids=[what for what, _, _ in LIMITS])
def test_mlflow_takes_the_limit_and_refuses_one_more(
    exporter: MLflowExporter, what: str, limit: int, send: Send
) -> None:
    transport, run_id = exporter._transport, str(exporter.memory()["run_id"])
    with pytest.raises(Refused, match="INVALID_PARAMETER_VALUE"):
        send(transport, run_id, limit + 1)
    send(transport, run_id, limit)


def test_mlflow_cuts_one_character_beyond_the_limit_of_values_without_a_word(
    mlflow_server: MlflowServer, exporter: MLflowExporter
) -> None:
    transport, run_id = exporter._transport, str(exporter.memory()["run_id"])
    most, more = limits.PARAM_VALUE_CHARS, limits.PARAM_VALUE_CHARS + 1
    transport.log_params(run_id, [("at", "x" * most), ("over", "x" * more)])
    most_tag = limits.TAG_VALUE_CHARS
    transport.log_tags(run_id, [("at", "x" * most_tag), ("over", "x" * (most_tag + 1))])
    data = get_run(mlflow_server, run_id).data
    assert {len(value) for value in data.params.values()} == {most}
    assert (len(data.tags["at"]), len(data.tags["over"])) == (most_tag, most_tag)


def test_all_at_their_limits_in_one_batch_is_delivered_whole(mlflow_server: MlflowServer) -> None:
    run = run_info(uuid.uuid4().hex)
    exporter = opened_exporter(mlflow_server.uri, run)
    points = [("損" * limits.KEY_CHARS, float(n), n, n) for n in range(limits.POINTS_PER_BATCH)]
    params = {f"{n:03d}" + "é" * (limits.KEY_CHARS - 3): "ü" * limits.PARAM_VALUE_CHARS for n in range(200)}
    tags = {f"{n:03d}": "ü" * limits.TAG_VALUE_CHARS for n in range(200)}
    deliver(exporter, batch(run, started(), ParamsLogged(1, params), TagsSet(1, tags), rows=points))
    run_id = str(exporter.memory()["run_id"])
    data = get_run(mlflow_server, run_id).data
    assert data.params == params
    assert {key: value for key, value in data.tags.items() if key in tags} == tags
    assert len(rows_of(mlflow_server, run_id)) == limits.POINTS_PER_BATCH


def test_more_points_than_fit_beside_the_marker_are_a_fault_of_the_caller(exporter: MLflowExporter) -> None:
    assert exporter.max_points == limits.POINTS_PER_BATCH == limits.METRICS_PER_REQUEST - 1
    many = batch(run_info("x"), rows=[("m", 1.0, n, n) for n in range(limits.POINTS_PER_BATCH + 1)])
    with pytest.raises(ValueError, match="at most 999"):
        exporter.begin(many)


@pytest.mark.parametrize("beyond", [0, 1])
def test_names_of_runs_and_experiments_at_and_beyond_their_limit(mlflow_server: MlflowServer, beyond: int) -> None:
    project = f"{uuid.uuid4().hex}{'p' * limits.EXPERIMENT_NAME_CHARS}"[: limits.EXPERIMENT_NAME_CHARS + beyond]
    name = "n" * (limits.RUN_NAME_CHARS + beyond)
    run = run_info(uuid.uuid4().hex, project=project, run_name=name)
    exporter = opened_exporter(mlflow_server.uri, run)
    deliver(exporter, batch(run, started(name)))
    seen = get_run(mlflow_server, str(exporter.memory()["run_id"]))
    experiments = mlflow_server.ask("experiments/search", {"max_results": 1000})["experiments"]
    (experiment,) = [e["name"] for e in experiments if e["experiment_id"] == seen.info.experiment_id]
    assert (len(seen.info.run_name), len(experiment)) == (limits.RUN_NAME_CHARS, limits.EXPERIMENT_NAME_CHARS)
    assert (seen.info.run_name == name, experiment == project) == (not beyond, not beyond)
    if beyond:
        assert (seen.data.tags["tracelet.run.name"], seen.data.tags["tracelet.project"]) == (name, project)
    again = opened_exporter(mlflow_server.uri, run)
    assert again.memory() == exporter.memory()


def test_an_artifacts_path_may_have_parts_of_255_bytes() -> None:
    from tracelet.exporters.mlflow.artifacts import unsafe

    assert unsafe("a/" + "n" * limits.ARTIFACT_PATH_BYTES + "/b") is None
    assert unsafe("a/" + "n" * (limits.ARTIFACT_PATH_BYTES + 1) + "/b") is not None
    assert unsafe("é" * 128) is not None
