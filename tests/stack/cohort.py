"""Runs of every fate into a running stack: resumed, spread over hosts, killed, sent later, running, slow, lost, silent.

What the library's own shipper would send of them, made by its own encoder, with times of their own: nobody has to wait
until a run is silent.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tests.otlp_batches import points
from tests.stack.collectors import now_ns, send
from tests.stack.harness import Stack, wait_until
from tracelet import ids
from tracelet.otlp import semconv
from tracelet.otlp.plan import Ledger, heartbeat_load, plan
from tracelet.records import (
    LOST,
    AttemptEnded,
    Batch,
    Heartbeat,
    ParamsLogged,
    Part,
    Record,
    RunInfo,
    RunStarted,
    Scalar,
    StateNoted,
    WriterOpened,
)

S = 1_000_000_000
PROJECT = "cohort"
RESUMED_AGE_S = 20 * 3600
LIVING = {"running": 5.0, "slow": 10.0, "stalled": 1200.0}  # seconds since the last iteration
Row = tuple[str, float, int]


@dataclass(frozen=True)
class Rank:
    """One process of an attempt: where it ran, since when, under which number."""

    name: str
    host: str = "node-1"
    rank: int = 0
    attempt: str = "1" * 16
    started_s: float = 300.0  # ago
    more: Mapping[str, Scalar] = field(default_factory=dict)
    run_id: str = ""

    @property
    def run(self) -> RunInfo:
        return RunInfo(self.run_id, PROJECT, "sweep", self.name)

    def part(self, *records: Record, rows: Sequence[Row] = (), ago_s: float = 0.0, step_s: int = 1) -> Part:
        """Records and points of this process, the points `step_s` apart until `ago_s` before now."""
        started = now_ns(round(self.started_s * S))
        resource: dict[str, Scalar] = {
            "service.name": PROJECT,
            "service.namespace": "tracelet",
            semconv.SERVICE_INSTANCE_ID: ids.instance_id(self.run_id, self.attempt, self.rank),
            semconv.HOST_NAME: self.host,
            semconv.PROJECT: PROJECT,
            semconv.EXPERIMENT_NAME: "sweep",
            semconv.RUN_ID: self.run_id,
            semconv.RUN_NAME: self.name,
            semconv.RUN_ATTEMPT: self.attempt,
            semconv.RANK: self.rank,
            semconv.RESOURCE_WIRE_VERSION: semconv.WIRE_VERSION,
            **self.more,
        }
        opened = WriterOpened(started, "first", 1, self.rank, self.attempt, started, resource)
        first = now_ns(round((ago_s + step_s * len(rows)) * S))
        return Part(f"{self.rank:016x}", opened, records, points(rows, start=first, step=step_s * S))


@dataclass
class Sent:
    """The ids of the runs by name, and when the resumed one began, in seconds."""

    runs: dict[str, str]
    resumed_began: float
    living: dict[str, Rank] = field(default_factory=dict)


class Way:
    """To the collector: what a shipper sends of a batch, and the heartbeats in between."""

    def __init__(self, stack: Stack) -> None:
        self._address = str(stack.otlp_http)

    def send(self, who: Rank, part: Part, ledger: Ledger) -> None:
        """The requests of one batch."""
        for load in plan(Batch(1, who.run, "/nowhere", (part,)), ledger).loads:
            assert send(self._address, [load.encode()], signal=load.signal) == [200]

    def beat(self, who: Rank, ago_s: float = 0.0, iterated_s: float = 0.0) -> Ledger:
        """A heartbeat `ago_s` before now; the last iteration was `iterated_s` before now."""
        beat = Heartbeat(now_ns(round(ago_s * S)), "RUNNING", now_ns(round(iterated_s * S)), {})
        load = heartbeat_load(Batch(0, who.run, "/nowhere", (who.part(),)), beat, Ledger())
        assert send(self._address, [load.encode()]) == [200]
        ledger = Ledger()
        ledger.beaten(beat)
        return ledger

    def whole(
        self,
        who: Rank,
        status: str,
        rows: Sequence[Row],
        params: Mapping[str, Scalar],
        ended_s: float,
        *,
        beats: bool = True,
    ) -> None:
        """A process from its start to its end, `ended_s` before now; one that is sent later has no heartbeat."""
        end = now_ns(round(ended_s * S))
        said = [ParamsLogged(end - 19 * S, params)] if params else []
        part = who.part(RunStarted(end - 20 * S, who.name, {}, {}), *said, rows=rows, ago_s=ended_s + 1)
        self.send(who, part, Ledger())
        ledger = self.beat(who, ended_s + 1, ended_s + 1) if beats else Ledger()
        started = part.opened.attempt_started_unix_nano
        series = {part.writer_id: tuple((name, end - S) for name in {name for name, _, _ in rows})}
        over = AttemptEnded(status, started, end, True, None, params, {}, (), series)
        self.send(who, who.part(over), ledger)


def losses(first: float, count: int, start: int = 0) -> list[Row]:
    """A falling loss, and beside it an accuracy that rises."""
    return [
        row
        for i in range(count)
        for row in (("train/loss", first - 0.01 * i, start + i), ("val/accuracy", 0.5 + 0.01 * i, start + i))
    ]


def pod(name: str) -> dict[str, Scalar]:
    """What a platform adds to a Resource, another in each pod."""
    return {"k8s.pod.name": f"train-{name}", "k8s.node.name": f"machine-{name}", "cloud.region": "here", "team": name}


def say_alive(stack: Stack, sent: Sent) -> None:
    """A heartbeat now of those that live: 5 minutes later they would be silent too."""
    for name, who in sent.living.items():
        Way(stack).beat(who, 0, LIVING[name])


def send_cohort(stack: Stack) -> Sent:
    """One run of each fate; returns when all that was sent can be asked for."""
    way = Way(stack)
    names = ("resumed", "spread", "killed", "late", "running", "slow", "stalled", "lost", "silent")
    sent = Sent({name: ids.new_run_id() for name in names}, time.time() - RESUMED_AGE_S)
    # Resumed on another host and in another pod: lower values, earlier iterations, the same params.
    resumed = Rank("resumed", run_id=sent.runs["resumed"], started_s=RESUMED_AGE_S, more=pod("a"))
    params = {"learning_rate": 0.3, "optimizer": "adam"}
    way.whole(resumed, "KILLED", [*losses(0.9, 20, start=100), ("val/best", 7.0, 119)], params, 200)
    again = replace(resumed, host="node-2", attempt="2" * 16, started_s=150, more=pod("b"))
    way.whole(again, "FINISHED", losses(0.4, 20, start=60), params, 100)
    # On several hosts, each with a word of its own. Only ranks 2 and 10 know `extra`: by their texts 10 would be less.
    for rank, host, status, loss, extra in (
        (0, "node-1", "FAILED", 0.3, None),
        (2, "node-2", "KILLED", 0.8, 1.0),
        (10, "node-3", "KILLED", 0.1, 5.0),
    ):
        who = Rank("spread", host, rank, run_id=sent.runs["spread"])
        rows = losses(loss, 10, start=10 * rank) + ([] if extra is None else [("extra", extra, 5)])
        way.whole(who, status, rows, {"learning_rate": 0.2} if rank == 0 else {}, 110)
    way.whole(Rank("killed", run_id=sent.runs["killed"]), "KILLED", losses(0.7, 5), {"learning_rate": 0.1}, 120)
    way.whole(Rank("late", run_id=sent.runs["late"]), "FINISHED", losses(0.6, 5), {"epochs": 3}, 130, beats=False)
    for name in ("running", "slow", "stalled", "lost", "silent"):
        who = Rank(name, run_id=sent.runs[name], started_s=1500)
        rows = [("val/loss", 0.5, i) for i in range(5)] if name == "slow" else losses(0.5, 5)
        way.send(who, who.part(rows=rows, ago_s=10, step_s=200 if name == "slow" else 1), Ledger())
        told = way.beat(who, 0 if name in LIVING else 400, LIVING.get(name, 400))
        if name == "lost":  # as whoever ships it from elsewhere says
            way.send(who, who.part(StateNoted(now_ns(380 * S), LOST)), told)
        if name in LIVING:
            sent.living[name] = who
    # The last that was sent, on a way that keeps the order.
    last = f'tracelet_run_heartbeat_seconds{{tracelet_run_id="{sent.runs[name]}"}}[1h]'
    wait_until(lambda: bool(stack.query(f"last_over_time({last})")), 60, lambda: "the cohort isn't in Prometheus")
    return sent
