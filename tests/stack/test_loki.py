"""What the shipped file of Loki promises: queries over all that is kept, and events that come late."""

from __future__ import annotations

import re
import time
from pathlib import Path

from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord

from tests.sinks import until
from tests.stack.collectors import CONFIG, HOUR, Collector, Sender, now_ns, send
from tests.stack.loki_server import Loki
from tracelet.otlp.encode import EventsLoad, resource_bytes


def event(run: Sender, at: int, text: str) -> bytes:
    return EventsLoad(
        resource_bytes(run.resource), (LogRecord(time_unix_nano=at, body=AnyValue(string_value=text)),)
    ).encode()


def test_a_query_may_span_all_that_is_kept(loki: Loki) -> None:
    (kept_h,) = re.findall(r"LOKI_RETENTION:-(\d+)h", (CONFIG / "loki" / "loki.yaml").read_text())
    run = Sender("kept")
    run.resource["service.name"] = "kept"
    assert send(loki.at, [event(run, now_ns(), "new")], signal="logs", prefix="/otlp") == [204]
    end = time.time_ns() + HOUR
    asked = {"query": '{service_name="kept"}', "start": str(end - int(kept_h) * HOUR), "end": str(end)}
    until(lambda: len(loki.ask("query_range", **asked)) == 1)


def test_an_event_of_30_hours_ago_is_taken_after_another_run_of_the_service_has_written(
    tmp_path: Path, loki: Loki
) -> None:
    """`service.instance.id` keeps runs apart: each is a stream of its own, late or not."""
    late, lively = Sender("late"), Sender("lively")
    assert late.resource["service.name"] == lively.resource["service.name"]
    refused = "otelcol_exporter_send_failed_log_records"

    def stored(run: Sender) -> int:
        return loki.count(f'{{service_name="vision"}} | tracelet_run_id="{run.run_id}"', "48h")

    with Collector(tmp_path / "collector", loki=f"{loki.at}/otlp") as collector:
        for run, ago in ((lively, 0), (late, 30 * HOUR)):
            assert send(collector.http, [event(run, now_ns(ago), "event")], signal="logs") == [200]
            until(lambda run=run: stored(run) == 1)  # type: ignore[misc]
        assert not collector.numbers(refused)
        # What it is for: of senders whose Resources are one stream, the late one is refused.
        for run, ago in ((lively, 0), (late, 30 * HOUR)):
            del run.resource["service.instance.id"]
            assert send(collector.http, [event(run, now_ns(ago), "again")], signal="logs") == [200]
        until(lambda: collector.number(refused, "otlp_http/loki") == 1)
        assert stored(late) == 1
