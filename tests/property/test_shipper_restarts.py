"""However often a shipper dies, wherever: what a destination holds is what was logged, once and in order."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.shipping import Alive, add_attempt, destination, end, open_writer, put
from tracelet.records import Batch, ParamsLogged
from tracelet.shipper.deaths import Deaths
from tracelet.shipper.loop import Lane
from tracelet.shipper.retry import BackOff
from tracelet.shipper.site import Site
from tracelet.spool import store
from tracelet.spool.cursor import Journal
from tracelet.testing import Delivered, InMemoryExporter, ManualClock, MemoryStore, RetryLater


class Died(BaseException):
    """The shipper is killed here."""


class Mortal(InMemoryExporter):
    """A destination under which the shipper dies: before a batch arrives, or after, before anybody hears of it."""

    def __init__(self, memory: MemoryStore, fate: Callable[[], str]) -> None:
        super().__init__(memory, max_points=7)
        self._fate = fate

    def answer(self, batch: Batch) -> Any:
        match self._fate():
            case "die before":
                raise Died
            case "die after":
                self.store.put(batch)
                raise Died
            case "later":
                return RetryLater("not now")
            case "unclear":
                self.store.put(batch)
                return RetryLater("unclear")
        self.store.put(batch)
        return Delivered()


fates = st.lists(st.sampled_from(["ok", "die before", "die after", "die at ack", "later", "unclear"]), max_size=30)
logged = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["loss", "acc", "param"])), max_size=60)


@settings(max_examples=60, deadline=None)
@given(what=logged, script=fates, cuts=st.sets(st.integers(0, 60), max_size=8))
def test_nothing_is_lost_doubled_or_changed_by_any_death(
    what: list[tuple[str, str]], script: list[str], cuts: set[int]
) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "run" / "host-boot"
        attempt = add_attempt(folder, "a")
        writers = {"a": open_writer(folder, attempt), "b": open_writer(folder, attempt, "child")}
        put(writers["a"], ParamsLogged(0, {"first": 0}))
        memory, clock, fate = MemoryStore(), ManualClock(), iter(script)
        ship = _Shipper(folder, memory, clock, lambda: next(fate, "ok"))
        for number, (writer, name) in enumerate(what):
            if name == "param":
                put(writers[writer], ParamsLogged(number, {f"p{number}": number}))
            else:
                writers[writer].log(name, float(number), number)
            if number in cuts:
                ship.some()
        end(writers["a"])
        end(writers["b"], None)
        ship.all()
        expected = {
            (writer, name): [float(i) for i, (w, n) in enumerate(what) if (w, n) == (writer, name)]
            for writer in "ab"
            for name in ("loss", "acc")
        }
        ids = {writers[key].writer_id: key for key in "ab" if writers[key].writer_id}
        got: dict[tuple[str, str], list[float]] = {key: [] for key in expected}
        stamps: dict[str, list[int]] = {"loss": [], "acc": []}
        for batch in memory.in_order():
            for part in batch.parts:
                columns = zip(part.points.metric_ids, part.points.values, part.points.time_unix_nano, strict=True)
                for metric_id, value, time in columns:
                    name = part.points.names[metric_id]
                    got[ids[part.writer_id], name].append(value)
                    stamps[name].append(time // 1_000_000)
        assert got == expected
        assert memory.unequal == []
        # Both writers are of one rank, so a name is one series over both.
        assert all(times == sorted(set(times)) for times in stamps.values())
        (ended,) = memory.ends()
        assert len(ended.params) == 1 + sum(name == "param" for _, name in what)
        assert memory.records()[-1] == ended


class _Shipper:
    def __init__(self, folder: Path, memory: MemoryStore, clock: ManualClock, fate: Callable[[], str]) -> None:
        self._folder, self._memory, self._clock = folder, memory, clock
        self._dies_at_ack = False
        self._fate = fate
        self._lane: Lane | None = None

    def _next_fate(self) -> str:
        fate = self._fate()
        self._dies_at_ack = fate == "die at ack"
        return fate

    def _start(self) -> Lane:
        manifest = store.read_manifest(self._folder)
        assert manifest is not None
        deaths = Deaths(self._folder, is_alive=Alive(), every_s=0.0, clock=self._clock.monotonic)
        self._site = Site(self._folder, manifest, deaths, clock=self._clock)
        exporter = Mortal(self._memory, self._next_fate)
        return Lane(
            self._site, destination("a"), lambda: exporter, clock=self._clock, backoff=BackOff(random=lambda: 1.0)
        )

    def _step(self) -> float:
        if self._lane is None:
            self._lane = self._start()
        self._site.look()
        acknowledge = Journal.ack

        def ack(journal: Journal, *args: Any, **facts: Any) -> None:
            if self._dies_at_ack:
                raise Died
            acknowledge(journal, *args, **facts)

        Journal.ack = ack  # type: ignore[method-assign]
        try:
            return self._lane.step()
        except Died:
            self._lane.close()
            self._lane = None
            self._dies_at_ack = False
            return 0.0
        finally:
            Journal.ack = acknowledge  # type: ignore[method-assign]

    def some(self) -> None:
        for _ in range(3):
            self._clock.advance(self._step())

    def all(self) -> None:
        for _ in range(2000):
            self._clock.advance(self._step())
            if self._lane is not None and self._lane.finished_of == self._site.state:
                self._lane.close()
                return
        raise AssertionError("it never got done")
