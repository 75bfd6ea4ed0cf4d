"""Every trouble of a network, made on real sockets: what was logged arrives once it is over, or is kept with reasons.

Pattern: a folder with one writer, one destination's lane stepped on a clock that a test moves (so ten minutes of outage
take seconds), and a real receiver behind a wire that can be cut. Limit: 20 s of real time for each wait.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from email.utils import formatdate
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo

from tests.otlp_batches import otlp_spec
from tests.servers import MlflowServer, rows_of
from tests.shipping import Alive, add_attempt, destination, open_writer, shipment, start, until
from tests.sinks import GrpcSink, HttpSink, Received, Say, Sink
from tests.wire import FAULTS, Wire
from tracelet.exporters.base import Exporter
from tracelet.exporters.mlflow.exporter import MLflowExporter
from tracelet.exporters.otlp import OTLPExporter
from tracelet.exporters.prometheus import PrometheusExporter
from tracelet.guard import guard
from tracelet.ids import new_run_id
from tracelet.shipper.deaths import Deaths
from tracelet.shipper.loop import Lane
from tracelet.shipper.retry import BackOff
from tracelet.shipper.site import Site
from tracelet.spool import store
from tracelet.testing import ManualClock

KINDS = ("http", "grpc", "prometheus")
PATIENCE_S = 20.0
FAULTY_S = 600.0 if os.environ.get("TRACELET_SOAK") == "1" else 4.0  # read here: no test sees a variable of ours


class Line:
    """A run's folder, a receiver of one kind behind a wire, and the lane between them."""

    def __init__(self, folder: Path, kind: str, stack: ExitStack) -> None:
        self.kind = kind
        self.folder = folder
        self.secrets: dict[str, Any] = {}
        self.sink: Sink = stack.enter_context(self._sink())
        port = self.sink.server.server_port if isinstance(self.sink, HttpSink) else self.sink.port  # type: ignore[attr-defined]
        self.wire = stack.enter_context(Wire(port))
        self.port = self.wire.port
        self.clock = ManualClock(time.time_ns())
        self.attempt = add_attempt(folder, "a", run_id=folder.parent.name)
        self.writer = open_writer(folder, self.attempt)
        start(self.writer)
        self.waits: list[float] = []  # how long it wanted to be left alone, each time
        self.troubles: list[str] = []
        self.lane = self.new_lane()
        stack.callback(lambda: self.lane.close())

    def _sink(self) -> Any:
        return GrpcSink() if self.kind == "grpc" else HttpSink()

    def exporter(self, **more: Any) -> Exporter:
        at = f"http://127.0.0.1:{self.port}"
        if self.kind == "prometheus":
            spec = {"url": f"{at}/v1/metrics", "prefix": "ml.", "window_age_s": 1e6, "window_ahead_s": 1e6} | more
            return PrometheusExporter({"timeout_s": 0.5} | spec, self.secrets, os.environ)
        protocol = "grpc" if self.kind == "grpc" else "http/protobuf"
        spec = otlp_spec(**({"endpoint": at, "protocol": protocol, "timeout_s": 0.5} | more))
        return OTLPExporter(spec, self.secrets, os.environ)

    def new_lane(self, **more: Any) -> Lane:
        manifest = store.read_manifest(self.folder)
        assert manifest is not None
        deaths = Deaths(self.folder, is_alive=Alive(), every_s=0.0, clock=self.clock.monotonic)
        self.site = Site(self.folder, manifest, deaths, clock=self.clock)
        build = lambda: self.exporter(**more)  # noqa: E731
        return Lane(self.site, destination("a"), build, clock=self.clock, backoff=BackOff(random=lambda: 1.0))

    def log(self, count: int = 300) -> None:
        for i in range(count):
            self.writer.log("loss", i + 0.5, i)

    def step(self) -> None:
        self.site.look()
        delay = self.lane.step()
        if self.lane.trouble is not None and delay > 0:
            assert not re.match(r"\w*(Error|Exception): ", self.lane.trouble), "a fault of ours is no answer"
            self.waits.append(delay)
            self.troubles.append(self.lane.trouble)
            threading.Event().wait(0.005)  # gRPC connects in the background, by real time
        self.clock.advance(delay)

    def run_until(self, done: Callable[[], bool]) -> None:
        limit = time.monotonic() + PATIENCE_S
        while not done():
            assert time.monotonic() < limit, f"not in time; last trouble: {self.lane.trouble}"
            self.step()

    def run_for(self, seconds: float) -> None:
        """Let this much time pass on the lane's clock."""
        over = self.clock.monotonic() + seconds
        self.run_until(lambda: self.clock.monotonic() >= over)

    def values(self) -> list[float]:
        """The values that the receiver has stored, each once."""
        found = {
            point.as_double
            for _, scope, metric in self.sink.metrics()
            if scope == "tracelet" and metric.name in ("loss", "ml.loss")
            for point in metric.gauge.data_points
            if not point.flags
        }
        return sorted(found)

    def has_all(self, count: int = 300) -> Callable[[], bool]:
        return lambda: self.lane.trouble is None and len(self.values()) == count and self.lane.counts[0] == count

    def has_all_but(self, one: int, count: int = 300) -> Callable[[], bool]:
        """All are taken note of, and stored but for the value of iteration `one`."""
        rest = [i + 0.5 for i in range(count) if i != one]
        return lambda: self.lane.trouble is None and self.lane.counts[0] >= count - 1 and self.values() == rest

    def say(self, status: int, code: str, headers: dict[str, str] | None = None, **more: Any) -> Say:
        """One answer, in the receiver's own language."""
        return Say(status, headers=headers or {}, code=grpc.StatusCode[code], **more)

    def letters(self) -> list[dict[str, Any]]:
        path = self.folder / "rejected-memory-a.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def line(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    monkeypatch.setattr(guard, "_logged_at", {})  # each test hears what is said once a minute
    with ExitStack() as stack:
        yield Line(tmp_path / "run" / "host-boot", request.param, stack)


every_kind = pytest.mark.parametrize("line", KINDS, indirect=True)


def holds(iteration: int) -> Callable[[Received], bool]:
    """Whether a request has the point of this value."""

    def look(received: Received) -> bool:
        return received.signal == "metrics" and any(
            point.as_double == iteration + 0.5
            for resource in received.message.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name in ("loss", "ml.loss")
            for point in metric.gauge.data_points
        )

    return look


# ---- the line -------------------------------------------------------------------------------------------------------


@every_kind
def test_ten_minutes_without_a_destination_lose_nothing(line: Line) -> None:
    line.log(100)
    line.run_until(line.has_all(100))
    line.wire.spoil("refusing")
    for i in range(100, 300):
        line.writer.log("loss", i + 0.5, i)
        if i % 20 == 0:
            line.run_for(60.0)
    assert line.lane.trouble is not None
    assert 10 <= len(line.waits) <= 30, "it asks neither all the time nor once in a blue moon"
    line.wire.mend()
    line.run_until(line.has_all())
    assert line.letters() == []


@every_kind
@pytest.mark.parametrize("fault", ["refusing", "hanging", "closing", "resetting", "garbage"])
def test_a_line_with_a_fault_is_tried_again_until_it_has_none(line: Line, fault: str) -> None:
    line.wire.spoil(fault)
    line.log()
    line.run_until(lambda: len(line.waits) >= 3)
    assert line.values() == []
    assert line.waits[:3] == [0.5, 1.0, 2.0]
    line.wire.mend()
    line.run_until(line.has_all())
    assert line.letters() == []


@every_kind
def test_what_arrived_without_an_answer_is_sent_again_byte_for_byte(line: Line) -> None:
    has_points = holds(7)
    line.wire.spoil("cut", arrived=lambda: any(has_points(received) for received in line.sink.stored))
    line.log()
    line.run_until(lambda: bool(line.waits))
    line.wire.mend()
    line.run_until(line.has_all())
    bodies = [received.body for received in line.sink.requests if has_points(received)]
    assert len(bodies) >= 2
    assert len(set(bodies)) == 1
    assert line.letters() == []


# ---- answers --------------------------------------------------------------------------------------------------------


MENDED_BY_A_PERSON = {301, 302, 307, 308, 401, 403, 404, 405, 409} | {
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
    "NOT_FOUND",
    "UNIMPLEMENTED",
}


@every_kind
@pytest.mark.parametrize(
    ("status", "code"),
    [
        (301, "CANCELLED"),
        (302, "UNIMPLEMENTED"),
        (307, "OUT_OF_RANGE"),
        (308, "DATA_LOSS"),
        (405, "UNIMPLEMENTED"),
        (409, "UNKNOWN"),  # no rule of OTLP covers it
        (408, "DEADLINE_EXCEEDED"),
        (429, "RESOURCE_EXHAUSTED"),
        (500, "INTERNAL"),
        (502, "UNKNOWN"),
        (503, "UNAVAILABLE"),
        (504, "ABORTED"),
        (401, "UNAUTHENTICATED"),
        (403, "PERMISSION_DENIED"),
        (404, "NOT_FOUND"),
    ],
)
def test_an_answer_that_is_no_refusal_is_waited_out_and_said_at_once_where_a_person_has_to_mend_it(
    line: Line, status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    line.sink.rule = lambda _: line.say(status, code, {"Location": "http://127.0.0.1:1/"})
    line.log()
    line.run_until(lambda: len(line.waits) >= 1)
    for_a_person = code in MENDED_BY_A_PERSON if line.kind == "grpc" else status in MENDED_BY_A_PERSON
    assert any("asked again in" in record.message for record in caplog.records) == for_a_person
    line.run_until(lambda: len(line.waits) >= 3)
    line.sink.rule = None
    line.run_until(line.has_all())
    assert line.letters() == []


WISHES: dict[str, tuple[str | None, int | None]] = {  # as HTTP has it, and as gRPC
    "nothing": (None, None),
    "no time": ("0", 0),
    "a past date": (formatdate(time.time() - 60, usegmt=True), -60),
    "half a minute": ("30", 30),
    "a year": ("31536000", 31_536_000),
    "more than a number": ("9" * 400, 10**11),
}


def retry_info(seconds: int) -> tuple[tuple[str, bytes], ...]:
    return (("google.rpc.retryinfo-bin", RetryInfo(retry_delay=Duration(seconds=seconds)).SerializeToString()),)


@every_kind
@pytest.mark.parametrize("wish", WISHES)
def test_a_wish_to_be_left_alone_makes_neither_a_storm_nor_a_silence(line: Line, wish: str) -> None:
    header, seconds = WISHES[wish]
    headers = {} if header is None else {"Retry-After": header}
    trailers = () if seconds is None else retry_info(seconds)
    line.sink.rule = lambda _: line.say(503, "UNAVAILABLE", headers, trailers=trailers)
    line.log()
    line.run_for(1800.0)
    if wish == "half a minute":
        assert set(line.waits) == {30.0}
    elif wish in ("a year", "more than a number"):
        assert set(line.waits) == {3600.0}
    else:
        assert line.waits[:8] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0]
    assert 1 <= len(line.sink.requests) <= 65
    line.sink.rule = None
    line.run_until(line.has_all())


@pytest.mark.parametrize("line", ["http", "grpc"], indirect=True)
def test_no_wish_ends_the_thread_of_a_destination(line: Line) -> None:
    line.sink.rule = lambda _: line.say(503, "UNAVAILABLE", {"Retry-After": "9" * 400}, trailers=retry_info(10**11))
    line.log()
    made = shipment(line.folder, {"a": line.exporter})
    made.tick()
    until(lambda: line.sink.requests)
    until(lambda: made.lanes["memory-a"].trouble)
    (thread,) = made._threads.values()
    thread.join(0.1)
    assert thread.is_alive()
    made.close()


@every_kind
def test_a_success_that_is_no_otlp_is_said_and_nothing_counts_as_delivered(
    line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    if isinstance(line.sink, GrpcSink):
        line.sink.garbage = b"\xff\xfe\x00garbage"
    line.sink.rule = lambda _: Say(200, body=b"Please log in", headers={"Content-Type": "text/plain"})
    line.log()
    line.run_until(lambda: len(line.waits) >= 3)
    assert line.lane.counts[0] == 0
    assert "is no OTLP receiver" in caplog.text
    if isinstance(line.sink, GrpcSink):
        line.sink.garbage = None
    line.sink.rule = None
    line.run_until(line.has_all())


@every_kind
def test_one_bad_point_is_found_and_kept_with_the_reason_and_all_others_arrive(line: Line) -> None:
    bad = holds(123)
    line.sink.rule = lambda received: line.say(400, "INVALID_ARGUMENT", message="too old") if bad(received) else None
    line.log()
    line.run_until(line.has_all_but(123))
    (letter,) = line.letters()
    assert letter["what"] == "point"
    assert "too old" in letter["reason"]
    assert "123.5" in json.dumps(letter["facts"])


@every_kind
def test_a_fault_over_one_request_is_pinned_on_its_point_while_others_pass(line: Line) -> None:
    bad = holds(123)
    line.log(100)
    line.run_until(line.has_all(100))
    line.sink.rule = lambda received: line.say(500, "INTERNAL", message="no letter") if bad(received) else None
    for i in range(100, 300):
        line.writer.log("loss", i + 0.5, i)
    line.run_until(line.has_all_but(123))
    (letter,) = line.letters()
    assert "no letter" in letter["reason"]
    assert "123.5" in json.dumps(letter["facts"])


@every_kind
def test_what_is_too_large_is_split_until_it_passes(line: Line) -> None:
    line.sink.rule = lambda received: (
        line.say(413, "RESOURCE_EXHAUSTED", message="Received message larger than max (9 vs. 8)")
        if len(received.body) > 4_000
        else None
    )
    line.log()
    line.run_until(line.has_all())
    assert line.letters() == []
    assert any(len(received.body) > 4_000 for received in line.sink.requests)


@every_kind
@pytest.mark.parametrize("located", [True, False])
def test_what_a_partial_success_leaves_out_is_kept_with_its_values(line: Line, located: bool) -> None:
    bad = holds(123)
    seen: list[Received] = []

    def rule(received: Received) -> Say | None:
        if not bad(received) or (seen and not located):
            return None
        seen.append(received)
        return Say(rejected=1, message="duplicate")

    line.sink.rule = rule
    line.log()
    line.run_until(lambda: line.lane.trouble is None and line.lane.counts[0] >= 299)
    (letter,) = line.letters()
    assert "duplicate" in letter["reason"]
    if located:
        assert (letter["facts"]["iteration"], letter["facts"]["value"]) == (123, 123.5)
    else:
        assert 123.5 in [item["value"] for item in letter["facts"]["items"]]
        assert (letter["facts"]["count"], letter["facts"]["of"]) == (1, 300)
    assert line.lane.counts[1] == 1


# ---- MLflow ---------------------------------------------------------------------------------------------------------


class MlflowLine(Line):
    """The same to a real MLflow server."""

    def __init__(self, folder: Path, server: MlflowServer, stack: ExitStack) -> None:
        self.server = server
        super().__init__(folder, "mlflow", stack)

    def _sink(self) -> Any:
        return contextlib.nullcontext(self.server)

    def exporter(self, **more: Any) -> Exporter:
        environ = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "1"}
        return MLflowExporter({"tracking_uri": f"http://127.0.0.1:{self.port}"}, {}, environ)

    def values(self) -> list[float]:
        run_id = self.lane.memory.get("run_id")
        return sorted(row.value for row in rows_of(self.server, run_id) if row.key == "loss") if run_id else []


@pytest.fixture
def mlflow_line(mlflow_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    monkeypatch.setattr(guard, "_logged_at", {})
    with ExitStack() as stack:
        yield MlflowLine(tmp_path / new_run_id() / "host-boot", mlflow_server, stack)


def test_ten_minutes_without_an_mlflow_lose_nothing(mlflow_line: Line) -> None:
    line = mlflow_line
    line.log(100)
    line.run_until(line.has_all(100))
    line.wire.spoil("refusing")
    for i in range(100, 300):
        line.writer.log("loss", i + 0.5, i)
    line.run_for(600.0)
    assert 10 <= len(line.waits) <= 30
    line.wire.mend()
    line.run_until(line.has_all())
    assert line.letters() == []


@pytest.mark.parametrize("fault", ["hanging", "closing", "resetting", "garbage"])
def test_a_line_to_mlflow_with_a_fault_is_tried_again_until_it_has_none(mlflow_line: Line, fault: str) -> None:
    line = mlflow_line
    line.log(100)
    line.run_until(line.has_all(100))
    line.wire.spoil(fault)
    for i in range(100, 300):
        line.writer.log("loss", i + 0.5, i)
    line.run_until(lambda: len(line.waits) >= 2)
    line.wire.mend()
    line.run_until(line.has_all())
    assert line.letters() == []


# ---- beside it ------------------------------------------------------------------------------------------------------


def test_a_destination_that_hangs_or_is_gone_delays_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "host-boot"
    attempt = add_attempt(folder, "hangs", "is-gone", "resets", "is-busy", "lives-http", "lives-grpc")
    writer = open_writer(folder, attempt)
    start(writer)
    with ExitStack() as stack:
        busy, http = stack.enter_context(HttpSink()), stack.enter_context(HttpSink())
        live = stack.enter_context(GrpcSink())
        wires = {fault: stack.enter_context(Wire(1)) for fault in ("hanging", "refusing", "resetting")}
        for fault, wire in wires.items():
            wire.spoil(fault)
        busy.rule = lambda _: Say(503, headers={"Retry-After": "3600"})

        def otlp(endpoint: str, protocol: str = "http/protobuf") -> Callable[[], Exporter]:
            return lambda: OTLPExporter(otlp_spec(endpoint, protocol=protocol, timeout_s=10.0), {}, {})

        made = shipment(
            folder,
            {
                "hangs": otlp(f"http://127.0.0.1:{wires['hanging'].port}"),
                "is-gone": otlp(f"http://127.0.0.1:{wires['refusing'].port}"),
                "resets": otlp(f"http://127.0.0.1:{wires['resetting'].port}"),
                "is-busy": otlp(busy.endpoint),
                "lives-http": otlp(http.endpoint),
                "lives-grpc": otlp(live.endpoint, "grpc"),
            },
        )
        made.tick()
        until(lambda: wires["hanging"].connections)  # its first request waits for ten seconds, from now
        for i in range(5_000):
            writer.log("loss", i + 0.5, i)

        def delivered() -> bool:
            made.tick()
            return all(made.lanes[f"memory-lives-{kind}"].counts[0] == 5_000 for kind in ("http", "grpc"))

        until(delivered)
        for sink in (http, live):
            assert sorted(point.value for point in sink.points()) == [i + 0.5 for i in range(5_000)]
        assert wires["hanging"].connections == 1, "all that was while the first request hung"
        assert made.lanes["memory-hangs"].trouble is None
        wires["hanging"].mend()  # lets it go, so that nobody waits for its ten seconds
        made.close()


@every_kind
def test_a_line_that_fails_in_every_way_again_and_again_loses_nothing(
    line: Line, record_property: Callable[[str, object], None]
) -> None:
    """A shipper's own threads, on the real clock: 4 s, or ten minutes with TRACELET_SOAK=1."""
    chance = random.Random(f"{line.kind} 5")
    over = time.monotonic() + FAULTY_S
    made = shipment(line.folder, {"a": line.exporter})
    logged = 0
    while time.monotonic() < over:
        fault = chance.choice(FAULTS)
        stored = len(line.sink.stored)
        line.wire.spoil(fault, arrived=lambda stored=stored: len(line.sink.stored) > stored)  # type: ignore[misc]
        _pass(made, chance.uniform(0.1, 0.5), line.writer, logged)
        logged += 50
        line.wire.mend()
        _pass(made, chance.uniform(0.1, 1.0), line.writer, logged)
        logged += 50
    record_property("faults", logged // 100)
    record_property("points", logged)

    def all_there() -> bool:
        made.tick()
        return made.lanes["memory-a"].counts[0] == logged

    until(all_there, within_s=90.0)  # the last wait may be a minute
    made.close()
    assert line.values() == [i + 0.5 for i in range(logged)]
    assert line.letters() == []


def _pass(made: Any, seconds: float, writer: Any, first: int) -> None:
    """Let this much time pass while 50 points are logged: the lengths of the faults are the test's input."""
    for i in range(first, first + 50):
        writer.log("loss", i + 0.5, i)
    over = time.monotonic() + seconds
    while time.monotonic() < over:
        made.tick()
        threading.Event().wait(0.02)
