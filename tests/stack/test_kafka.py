"""Kafka between two collectors: what the edge acknowledged is in MLflow and in Prometheus, point for point."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stack.arrived import all_in_both, count_in_prometheus
from tests.stack.harness import Stack, text_of, wait_until
from tests.stack.training import train, trainings

RUNS = ("kafka-a", "kafka-b", "kafka-c")
POINTS = 33_334  # a run: 100,002 in all


@pytest.fixture(scope="module")
def through_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Edge collector, broker, core collector, and the usual backends."""
    with Stack(tmp_path_factory.mktemp("kafka"), extras=["kafka"]) as running:
        yield running


def test_a_hundred_thousand_points_of_three_runs_arrive_through_kafka(through_kafka: Stack, tmp_path: Path) -> None:
    train(tmp_path, RUNS, POINTS, through_kafka.otlp_http)
    for run_id in RUNS:
        all_in_both(through_kafka, run_id, POINTS)


def test_a_broker_that_is_killed_and_a_core_that_is_away_cost_nothing(through_kafka: Stack, tmp_path: Path) -> None:
    """Training goes on meanwhile: the edge's queue, then Kafka, hold what comes."""
    with trainings(tmp_path, ["kafka-away"], 20_000, through_kafka.otlp_http) as running:
        through_kafka.kill("kafka")
        through_kafka.stop("collector-core")
        said, _ = running[0].communicate(timeout=120)  # ends: nobody waited for the broker
        assert running[0].returncode == 0, said
        through_kafka.start("kafka")
        through_kafka.start("collector-core")
    all_in_both(through_kafka, "kafka-away", 20_000)


def test_kafka_holds_what_comes_while_the_core_is_away(through_kafka: Stack, tmp_path: Path) -> None:
    through_kafka.stop("collector-core")
    train(tmp_path, ["kafka-holds"], 20_000, through_kafka.otlp_http)
    # Nothing waits at the edge, and nothing is in a backend: Kafka has it.
    queue = re.compile(r"^otelcol_exporter_queue_size\{.*\} (\S+)$", re.MULTILINE)
    wait_until(
        lambda: sum(map(float, queue.findall(text_of(through_kafka.collector_metrics)))) == 0,
        60,
        lambda: text_of(through_kafka.collector_metrics),
    )
    assert len(queue.findall(text_of(through_kafka.collector_metrics))) == 3
    assert count_in_prometheus(through_kafka, "kafka-holds") == 0
    through_kafka.start("collector-core")
    all_in_both(through_kafka, "kafka-holds", 20_000)
