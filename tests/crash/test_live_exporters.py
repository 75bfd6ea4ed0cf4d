"""Exporter objects of the program as `backend=`: what they get, and what becomes of it when the program ends.

Pattern: real programs with the SDK's own exporters, in memory or over real receivers; some are killed, some fork.
Limit: a minute a test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import processes_of
from tests.shipping import until
from tests.sinks import GrpcSink, HttpSink, Say, Sink, attributes

LIMIT_S = 60.0

BEGIN = """
import json, multiprocessing, os, signal, sys, time, tracelet
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

class InMemoryMetrics(MetricExporter):
    "The SDK has a reader in memory, and no exporter."
    def __init__(self):
        super().__init__()
        self.points = []
    def export(self, data, timeout_millis=10_000, **more):
        for resource in data.resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    if scope.scope.name == "tracelet":
                        self.points += [
                            (metric.name, p.attributes["tracelet.iteration"], p.value) for p in metric.data.data_points
                        ]
        return MetricExportResult.SUCCESS
    def force_flush(self, timeout_millis=0): return True
    def shutdown(self, timeout_millis=0, **more): pass

spans, logs, metrics = InMemorySpanExporter(), InMemoryLogRecordExporter(), InMemoryMetrics()

def begin(backend, **more):
    exp = tracelet.start_logging(exp_name="job", project="live", run_id="run", backend=backend, **more)
    exp.log_params({"lr": 0.1})
    return exp

def say(**facts):
    print(json.dumps(facts), flush=True)
"""

OTLP_OBJECTS = """
if os.environ["HOW"] == "grpc":
    from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
else:
    from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
backend = [OTLPMetricExporter(), OTLPSpanExporter(), OTLPLogExporter()]
"""


def run(
    code: str, tmp_path: Path, *, returned: int = 0, **variables: str
) -> tuple[list[dict[str, Any]], subprocess.CompletedProcess[str]]:
    """What the program said, a line of JSON each, and how it ended."""
    script = tmp_path / "train.py"
    script.write_text(BEGIN + code)
    environ = {**os.environ, "OTEL_EXPORTER_OTLP_INSECURE": "true", **variables}
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == returned, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')], done


def points(sink: Sink, name: str = "loss") -> list[int]:
    return [point.iteration for point in sink.points("run") if point.name == name]


def test_objects_in_memory_have_everything_when_stop_returns(tmp_path: Path) -> None:
    code = """
exp = begin([spans, logs, metrics, "file"])
for i in range(10_000):
    exp.log_metric("loss", 1 / (i + 1), iteration=i)
with exp.span("epoch"):
    pass
tracelet.stop_logging()
say(points=metrics.points == [("loss", i, 1 / (i + 1)) for i in range(10_000)],
    spans=[s.name for s in spans.get_finished_spans()],
    lr=spans.get_finished_spans()[-1].attributes["tracelet.param.lr"],
    events=[one.log_record.event_name for one in logs.get_finished_logs()])
"""
    (said,), _ = run(code, tmp_path)
    assert said["points"]
    assert said["spans"] == ["epoch", "run job"]
    assert said["lr"] == 0.1
    assert said["events"] == ["tracelet.run.started", "tracelet.params", "tracelet.run.ended"]
    assert (tmp_path / "tracelet.otlp.jsonl").exists()  # what stands beside it in the list


def test_an_exporter_of_one_signal_gets_that_alone(tmp_path: Path) -> None:
    code = """
exp = begin(logs)
exp.log_metric("loss", 0.5, iteration=1)
tracelet.stop_logging()
say(kinds=sorted({type(one).__name__ for one in logs.get_finished_logs()}), shipped=exp.stats.shipped)
"""
    (said,), _ = run(code, tmp_path)
    assert said == {"kinds": ["ReadableLogRecord"], "shipped": 1}


def test_a_console_exporter_prints_the_run_also_where_the_program_just_ends(tmp_path: Path) -> None:
    _, done = run("begin(ConsoleSpanExporter())\nsys.exit(3)", tmp_path, returned=3)
    (span,) = [json.loads(done.stdout)]
    assert span["name"] == "run job"
    assert span["attributes"]["tracelet.run.state"] == "FAILED"


@pytest.mark.parametrize("how", ["http", "grpc"])
def test_the_sdks_own_otlp_exporters_deliver_points_spans_and_events(how: str, tmp_path: Path) -> None:
    code = f"""
{OTLP_OBJECTS}
exp = begin(backend)
for i in range(10_000):
    exp.log_metric("loss", 1 / (i + 1), iteration=i)
tracelet.stop_logging()
"""
    with GrpcSink() if how == "grpc" else HttpSink() as sink:
        run(code, tmp_path, HOW=how, OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint)
        assert points(sink) == list(range(10_000))
        assert [attributes(span)["tracelet.run.state"] for span in sink.spans()] == ["FINISHED"]
        assert [event.event_name for event in sink.events()][-1] == "tracelet.run.ended"


def test_forked_and_spawned_workers_records_go_through_the_first_processs_object(tmp_path: Path) -> None:
    """The exporter's connection is the parent's alone: a child only writes its spool files."""
    code = f"""
{OTLP_OBJECTS}
def work(exp, number):
    for i in range(1000):
        exp.log_metric(f"worker{{number}}", float(i), iteration=i)

if __name__ == "__main__":
    exp = begin(backend)
    for number, method in enumerate(["fork", "spawn"]):
        worker = multiprocessing.get_context(method).Process(target=work, args=(exp, number))
        worker.start()
        worker.join()
        assert worker.exitcode == 0, method
    tracelet.stop_logging()
"""
    with HttpSink() as sink:
        run(code, tmp_path, HOW="http", OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint, PYTHONWARNINGS="ignore")
        for number in range(2):
            assert points(sink, f"worker{number}") == list(range(1000))
        assert [attributes(span)["tracelet.run.state"] for span in sink.spans()] == ["FINISHED"]


def test_a_refusing_object_is_asked_again_and_delays_nobody(tmp_path: Path) -> None:
    code = """
class Moody(SpanExporter):
    answers = [ValueError("not now"), SpanExportResult.FAILURE]
    seen = []
    def export(self, given):
        if self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer
        self.seen += [span.name for span in given]
        return SpanExportResult.SUCCESS
exp = begin([Moody(), metrics])
with exp.span("epoch"):
    exp.log_metric("loss", 1.0, iteration=1)
assert exp.flush(timeout=30)
say(seen=Moody.seen, points=metrics.points)
tracelet.stop_logging()
say(seen=Moody.seen)
"""
    said, _ = run(code, tmp_path)
    assert said == [{"seen": ["epoch"], "points": [["loss", 1, 1.0]]}, {"seen": ["epoch", "run job"]}]


REFUSES = """
from tracelet.core import delivery
delivery.STALLED_S = 1.0
class Refuses(SpanExporter):
    refuses = True
    seen = []
    def export(self, given):
        if self.refuses:
            return SpanExportResult.FAILURE
        self.seen += [(s.name, s.attributes["tracelet.run.state"]) for s in given]
        return SpanExportResult.SUCCESS
"""


def test_what_an_object_had_not_taken_goes_to_it_at_the_next_start(tmp_path: Path) -> None:
    """It dies with the program, the spool doesn't: the program says so, and the same run and exporter find it."""
    told, done = run(REFUSES + "exp = begin(Refuses())\ntracelet.stop_logging()\nsay(stopped=True)", tmp_path)
    assert told == [{"stopped": True}]
    assert "not delivered to Refuses, which ends with this program" in done.stderr
    assert "run_id='run'" in done.stderr
    code = REFUSES + "Refuses.refuses = False\nbegin(Refuses())\ntracelet.stop_logging()\nsay(seen=Refuses.seen)"
    (said,), done = run(code, tmp_path)
    assert said["seen"] == [["run job", "FINISHED"], ["run job", "FINISHED"]]
    assert "not delivered" not in done.stderr


def test_the_end_of_the_program_waits_for_an_object_that_takes_its_time(tmp_path: Path) -> None:
    """Longer than for a shipper that goes on by itself: this one ends with the program."""
    code = """
from tracelet.core import delivery
delivery.OUTLIVED_WAIT_S = 0.1
class Slow(InMemoryMetrics):
    def export(self, data, timeout_millis=10_000, **more):
        time.sleep(0.7)
        return super().export(data)
slow = Slow()
exp = begin(slow)
for i in range(12_000):
    exp.log_metric("loss", float(i), iteration=i)
exp.stop()
say(points=len(slow.points))
"""
    (said,), done = run(code, tmp_path)
    assert said["points"] == 12_000
    assert "not delivered" not in done.stderr


def test_a_killed_program_leaves_it_in_the_spool_and_the_shipper_serves_the_rest(tmp_path: Path) -> None:
    """Nor does a shipper that has delivered everything else, and keeps nothing, clear it away; nor does `prune`."""
    code = (
        REFUSES
        + """
exp = begin([Refuses(), "otlp"])
exp.log_metric("loss", 1.0, iteration=1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    )
    with HttpSink() as sink:
        run(code, tmp_path, returned=-9, OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint, TRACELET_KEEP="0s,0MB")
        until(lambda: [attributes(span)["tracelet.run.state"] for span in sink.spans()] == ["KILLED"], LIMIT_S)
        assert points(sink) == [1]
        until(lambda: not processes_of(str(tmp_path)), LIMIT_S)
        pruned = subprocess.run(
            [sys.executable, "-m", "tracelet", "prune", "--keep", "0s,0MB"],
            timeout=LIMIT_S,
            capture_output=True,
            check=False,
        )
        assert pruned.returncode == 0, pruned.stderr
        code = (
            REFUSES
            + """
Refuses.refuses = False
begin([Refuses(), "otlp"])
tracelet.stop_logging()
say(seen=Refuses.seen)
"""
        )
        (said,), _ = run(code, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint)
    assert said["seen"] == [["run job", "KILLED"], ["run job", "FINISHED"]]


@pytest.mark.parametrize("shipper", ["thread", "off"])
def test_with_another_shipper_than_a_process_it_is_served_by_the_thread_or_said_not_to_be(
    shipper: str, tmp_path: Path
) -> None:
    code = "begin(spans)\ntracelet.stop_logging()\nsay(spans=len(spans.get_finished_spans()))"
    (said,), done = run(code, tmp_path, TRACELET_SHIPPER=shipper)
    assert said["spans"] == (1 if shipper == "thread" else 0)
    assert ("exporter object given as backend gets nothing" in done.stderr) == (shipper == "off")


def test_two_programs_in_one_run_have_one_that_serves(tmp_path: Path) -> None:
    """Each names an object of the same class: two readers of one place in the queue would spoil it."""
    code = """
if len(sys.argv) > 1:
    exp = begin(metrics)
    exp.log_metric("theirs", 1.0, iteration=1)
    exp.stop()
    say(theirs=metrics.points)
    sys.exit()
import subprocess
exp = begin(metrics)
for i in range(3):
    exp.log_metric("mine", 1.0, iteration=i)
subprocess.run([sys.executable, __file__, "second"], check=True)
tracelet.stop_logging()
say(mine=sorted(name for name, *_ in metrics.points))
"""
    (second, first), _ = run(code, tmp_path)
    assert second["theirs"] == []
    assert first["mine"] == ["mine", "mine", "mine", "theirs"]


def test_a_dead_receiver_behind_the_sdks_exporter_is_given_up_when_the_timeout_says(tmp_path: Path) -> None:
    """The SDK's exporter is in the middle of its own retries then, in a thread that ends with the program."""
    code = f"{OTLP_OBJECTS}exp = begin(backend[:1])\nexp.log_metric('loss', 1.0)\nexp.stop(timeout=0.5)"
    with HttpSink() as sink:
        sink.rule = lambda _: Say(503)
        _, done = run(code, tmp_path, HOW="http", OTEL_EXPORTER_OTLP_ENDPOINT=sink.endpoint)
    assert "1 points not delivered to OTLPMetricExporter" in done.stderr
