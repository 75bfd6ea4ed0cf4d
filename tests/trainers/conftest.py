"""Where the programs of these tests deliver to."""

from __future__ import annotations

import pytest

from tests.sinks import HttpSink


@pytest.fixture
def sink(otlp_sink: HttpSink, monkeypatch: pytest.MonkeyPatch) -> HttpSink:
    """An OTLP receiver, named by the environment that a test's programs inherit."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", otlp_sink.url)
    return otlp_sink
