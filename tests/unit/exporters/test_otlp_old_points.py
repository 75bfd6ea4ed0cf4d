"""Points that are too old for a Prometheus behind an OTLP receiver: sent all the same, counted, said once."""

from __future__ import annotations

import logging
import os
import time

import pytest

from tests.otlp_batches import MS, RUN, batch, otlp_spec
from tests.sinks import HttpSink
from tracelet.exporters.base import Delivered
from tracelet.exporters.otlp import OTLPExporter

HOUR = 3_600_000 * MS


@pytest.mark.parametrize(("hours", "said"), [(144, True), (142, False)])
def test_old_points_go_out_and_are_said_once_as_information(
    hours: int, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tracelet")
    with HttpSink() as sink:
        exporter = OTLPExporter(otlp_spec(sink.endpoint, window_age_s=143 * 3600.0), {}, os.environ)
        exporter.open(RUN, {})
        start = time.time_ns() - hours * HOUR
        for number in (1, 2):
            rows = [("loss", 1.0, 1), ("loss", 2.0, 2)]
            assert exporter.begin(batch(rows, number=number, start=start)).attempt() == Delivered()
        exporter.close()
        exporter.close()
        assert len(sink.points()) == 4
    lines = [record.getMessage() for record in caplog.records if "older than" in record.getMessage()]
    assert len(lines) == said
    if said:
        assert lines[0].startswith("4 points of run run-1 were older than 143 h")
        assert "tracelet export --format openmetrics run-1" in lines[0]
