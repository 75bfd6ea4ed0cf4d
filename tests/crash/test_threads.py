"""16 threads that log, register names, roll segments and convert slowly, all at once, under the eyes of live readers.

Pattern: one Writer with small segments; beside its threads two readers (one as on a machine whose stores may become
visible in another order) and a whole shipment. Then an experiment, with its own shipper. Limit: 4 s of logging a case;
5 min with TRACELET_SOAK=1.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tracelet
from tests.shipping import Alive, add_attempt, end, open_writer, put, shipment, start, until
from tests.sinks import HttpSink, attributes
from tracelet import codec
from tracelet.records import MetricNamed, ParamsLogged
from tracelet.spool.points import SLOT
from tracelet.spool.reader import START, SpoolReader
from tracelet.spool.writer import Writer
from tracelet.testing import InMemoryExporter, MemoryStore

SECONDS = 300.0 if os.environ.get("TRACELET_SOAK") else 4.0
THREADS = 16
NAMES = 1500  # of each thread


class Slow:
    """A value whose conversion takes 20 ms, as a tensor's on a busy device does."""

    def __init__(self, value: float) -> None:
        self._value = value

    def __float__(self) -> float:
        time.sleep(0.02)  # the subject, not a wait
        return self._value


class Raises:
    """A value that can't be converted, and notices late."""

    def __float__(self) -> float:
        time.sleep(0.001)
        raise RuntimeError("device lost")


def value_of(thread: int, iteration: int) -> float:
    return thread * 1e9 + iteration


@dataclass(frozen=True)
class Calls:
    """What the threads call: a Writer's own, or an experiment's."""

    log: Callable[[str, Any, int], None]
    log_many: Callable[[dict[str, Any], int], None]
    log_params: Callable[[dict[str, Any]], None]


def of_writer(writer: Writer) -> Calls:
    return Calls(writer.log, writer.log_many, lambda params: put(writer, ParamsLogged(time.time_ns(), params)))


class Logging:
    """The threads, and how far each has come."""

    def __init__(self, calls: Calls, seconds: float) -> None:
        self.calls = calls
        self.until = time.monotonic() + seconds
        self.logged = [0] * THREADS
        self.params = [0] * THREADS
        self.faults: list[BaseException] = []
        self.threads = [threading.Thread(target=self._work, args=(number,)) for number in range(THREADS)]

    def _work(self, number: int) -> None:
        try:
            first = 0
            while time.monotonic() < self.until:
                for i in range(first, first + 100):
                    value: Any = value_of(number, i)
                    if number == 0 and i % 50 == 0:
                        value = Slow(value)
                    self.calls.log(f"t{number}", value, i)
                    self.logged[number] = i + 1
                first = i + 1
                name = f"t{number}.{min(i // 100, NAMES)}"
                self.calls.log_many({name: value_of(number, i), f"{name}.b": value_of(number, i)}, i)
                if number == 1:
                    with pytest.raises(RuntimeError, match="device lost"):
                        self.calls.log("never", Raises(), i)
                if number % 4 == 2:
                    self.calls.log_params({f"p{number}": i})
                    self.params[number] += 1
        except Exception as error:  # noqa: BLE001 - told by the test's own thread
            self.faults.append(error)


class Follower(threading.Thread):
    """Reads along, and keeps what it sees of each series."""

    def __init__(self, folder: Path, writer: str, *, strong_order: bool) -> None:
        super().__init__()
        self._reader = SpoolReader(folder, strong_order=strong_order)
        self._writer = writer
        self.stop = threading.Event()
        self.points: dict[str, list[int]] = defaultdict(list)
        self.params = 0
        self.wrong: list[object] = []

    def run(self) -> None:
        names: dict[int, str] = {}
        position, last_look = START, 0
        while last_look < 3:  # without strong order a slot counts at the second look
            last_look = last_look + 1 if self.stop.is_set() else 0
            ranges, position = self._reader.poll(self._writer, position, 5000, dead=False)
            for piece in ranges:
                last_look = 0
                taken = self._reader.read(piece)
                self.wrong += taken.damaged
                for _, kind, payload in taken.frames:
                    record = codec.decode(kind, payload)
                    if isinstance(record, MetricNamed):
                        names[record.metric_id] = record.name
                    self.params += isinstance(record, ParamsLogged)
                for _, value, iteration, metric_id, _ in SLOT.iter_unpack(taken.records):
                    name = names[metric_id]
                    self.points[name].append(iteration)
                    if value != value_of(int(name[1:].split(".")[0]), iteration):
                        self.wrong.append((name, value, iteration))
        self._reader.close()


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "appended"])
def test_16_threads_with_names_rolls_and_slow_values_lose_and_mix_nothing(
    tmp_path: Path, mapped: bool, record_property: Callable[[str, object], None]
) -> None:
    folder = tmp_path / "run" / "host"
    attempt = add_attempt(folder, "a")
    writer = open_writer(folder, attempt, slots_per_segment=700, mapped=mapped)
    start(writer)
    store = MemoryStore()
    alive = Alive()
    shipped = shipment(folder, {"a": InMemoryExporter(store)}, alive)
    stop = threading.Event()
    shipper = threading.Thread(target=shipped.run, kwargs={"follow": True, "stop": stop})
    followers = [Follower(folder, str(writer.writer_id), strong_order=strong) for strong in (True, False)]
    logging = Logging(of_writer(writer), SECONDS)
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # 50 times as many changes of thread as usual
    try:
        for thread in (*followers, *logging.threads, shipper):
            thread.start()
        for thread in logging.threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
        end(writer)
        alive.dead.add(str(writer.writer_id))
        for follower in followers:
            follower.stop.set()
            follower.join()
    assert logging.faults == []
    shipper.join(120)
    assert not shipper.is_alive()
    shipped.close()
    assert sum(logging.logged) > 10_000
    for follower in followers:
        assert follower.wrong == []
        assert follower.params == sum(logging.params)
        assert "never" not in follower.points
        for number in range(THREADS):
            assert follower.points[f"t{number}"] == list(range(logging.logged[number]))
    total = sum(len(one) for one in followers[0].points.values())
    assert total == writer.counts().points
    record_property("points", total)
    record_property("names", len(followers[0].points))
    assert writer.counts().refused == 0
    arrived: dict[str, list[int]] = defaultdict(list)
    for batch in store.in_order():
        for part in batch.parts:
            for metric_id, iteration in zip(part.points.metric_ids, part.points.iterations, strict=True):
                arrived[part.points.names[metric_id]].append(iteration)
    assert arrived == followers[0].points == followers[1].points


def test_16_threads_of_an_experiment_with_names_rolls_and_slow_values_are_delivered_whole(
    otlp_sink: HttpSink, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    """The same work by the calls that training has, under the eyes of the run's own shipper."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", otlp_sink.url)
    monkeypatch.setitem(Writer.__init__.__kwdefaults__, "slots_per_segment", 700)
    exp = tracelet.Experiment("threads", project="threads", backend="otlp")
    # By its name at each call: the first ones find no run yet, and the start gives it another function.
    calls = Calls(lambda *one: exp.log_metric(*one), exp.log_metrics, exp.log_params)
    logging = Logging(calls, min(SECONDS / 4, 4.0))  # the receiver keeps it all in memory
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        for thread in logging.threads:
            thread.start()
        for thread in logging.threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
        exp.stop()
    assert logging.faults == []
    assert exp.stats.refused == 0
    until(lambda: otlp_sink.ends(str(exp.id)), 120)
    arrived: dict[str, list[int]] = defaultdict(list)
    for point in otlp_sink.points(exp.id):
        assert point.value == value_of(int(point.name[1:].split(".")[0]), point.iteration)
        arrived[point.name].append(point.iteration)
    assert "never" not in arrived
    for number in range(THREADS):
        assert arrived[f"t{number}"] == list(range(logging.logged[number]))
        last = {f"t{number}.{min(i // 100, NAMES)}": None for i in range(99, logging.logged[number], 100)}
        assert set(last) == {name for name in arrived if name.startswith(f"t{number}.") and not name.endswith(".b")}
    total = sum(len(one) for one in arrived.values())
    assert total == exp.stats.logged > 5 * 700
    params = attributes(next(span for span in otlp_sink.spans() if span.name == "run threads"))
    for number in range(2, THREADS, 4):
        assert params[f"tracelet.param.p{number}"] == logging.logged[number] - 1
    record_property("points of an experiment", total)
