"""The console exporter: a line for everything, and no harm from a broken stream."""

from __future__ import annotations

import io

import pytest

from tests.otlp_batches import MS, RUN, START, batch
from tracelet.exporters.base import Delivered
from tracelet.exporters.console import ConsoleExporter
from tracelet.guard import guard
from tracelet.records import (
    ArtifactLogged,
    AttemptEnded,
    ErrorInfo,
    ParamsLogged,
    RunStarted,
    SpanEnded,
    SpanStarted,
    TagsSet,
)


def test_every_record_is_a_line() -> None:
    stream = io.StringIO()
    exporter = ConsoleExporter({}, {}, {}, stream=stream)
    exporter.open(RUN, {})
    records = [
        RunStarted(START, RUN.run_name, {}, {}),
        ParamsLogged(START, {"lr": 0.1, "name": "adam"}),
        TagsSet(START, {"team": "ml"}),
        SpanStarted("1" * 16, "2" * 16, "validate", START),
        SpanEnded("1" * 16, START + 1500 * MS),
        ArtifactLogged(START, "model.pth", "/tmp/model.pth", None, 12345, None, "application/octet-stream"),
        AttemptEnded("FAILED", START, START, True, ErrorInfo("ValueError", "no", ""), {}, {}, (), {}),
    ]
    delivery = exporter.begin(batch([("loss", 0.125, 7)], records))
    assert delivery.attempt() == Delivered()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 8
    assert all(line.startswith("bold-hawk  ") for line in lines)
    said = "\n".join(lines)
    for text in (
        "run bold-hawk started",
        "params  lr=0.1, name=adam",
        "tags  team=ml",
        "validate began",
        "validate ended after 1.500 s",
        "artifact  model.pth  (12,345 bytes)",
        "run FAILED  ValueError: no",
        "loss = 0.125  (iteration 7)",
    ):
        assert text in said


def test_lines_are_in_order_of_time_whatever_they_are() -> None:
    stream = io.StringIO()
    exporter = ConsoleExporter({}, {}, {}, stream=stream)
    records = [SpanStarted("1" * 16, "2" * 16, "epoch", START + MS), TagsSet(START + 10 * MS, {"a": "b"})]
    exporter.begin(batch([("loss", i, i) for i in range(3)], records)).attempt()
    said = [line.split("  ", 2)[2].split()[0] for line in stream.getvalue().splitlines()]
    assert said == ["loss", "epoch", "loss", "loss", "tags"]


def test_the_stream_is_the_standard_error_of_the_moment(capsys: pytest.CaptureFixture[str]) -> None:
    exporter = ConsoleExporter({}, {}, {})
    exporter.open(RUN, {})
    exporter.begin(batch([("loss", 0.5, 1)])).attempt()
    captured = capsys.readouterr()
    assert "loss = 0.5" in captured.err
    assert captured.out == ""


def test_a_closed_stream_does_not_hold_the_run_up() -> None:
    stream = io.StringIO()
    stream.close()
    before = guard.counts.get("console", 0)
    assert ConsoleExporter({}, {}, {}, stream=stream).begin(batch([("loss", 0.5, 1)])).attempt() == Delivered()
    assert guard.counts["console"] == before + 1
