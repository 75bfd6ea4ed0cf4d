"""What every exporter promises the shipper, asked of each of them with a real destination behind it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from itertools import pairwise

import pytest

from tests.contract.worlds import MS, START, WORLDS, World
from tracelet.exporters.base import Delivered, RetryLater
from tracelet.records import (
    ArtifactLogged,
    AttemptEnded,
    FlushAsked,
    Heartbeat,
    ParamsLogged,
    RunStarted,
    SpanEnded,
    SpansReceived,
    SpanStarted,
    StateNoted,
    TagsSet,
    WriterEnded,
)

ROWS = [("loss", 1.0, 0), ("acc", 0.25, 0), ("loss", 0.5, 1), ("acc", 0.5, 1), ("loss", 0.25, 1)]
STARTED = RunStarted(START, "bold-hawk", {"process.pid": 4711}, {})


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    for made in WORLDS[request.param](request):
        yield made
        for exporter in made.exporters:
            exporter.close()


def plain(world: World) -> list[tuple[str, float, int]]:
    return [(point.name, point.value, point.iteration) for point in world.points()]


def by_name(rows: list[tuple[str, float, int]]) -> list[tuple[str, float, int]]:
    return sorted(rows, key=lambda row: row[0])  # stable: within a name the order stays


def test_points_arrive_once_in_order_with_their_iteration(world: World) -> None:
    exporter = world.opened()
    assert exporter.begin(world.batch(ROWS, [STARTED])).attempt() == Delivered()
    more = [("loss", 0.125, 2), ("loss", 0.0625, -3)]
    assert exporter.begin(world.batch(more, number=2, after_ms=10)).attempt() == Delivered()
    assert plain(world) == by_name(ROWS + more)


def test_a_repeat_after_a_restart_has_no_effect(world: World) -> None:
    if world.repeats_show:
        pytest.skip("a console shows a repeat to its reader")
    first = world.opened()
    one = world.batch(ROWS, [STARTED, ParamsLogged(START, {"lr": 0.1})])
    delivery = first.begin(one)
    note = json.loads(json.dumps(dict(delivery.note)))
    assert delivery.attempt() == Delivered()
    memory = json.loads(json.dumps(dict(first.memory())))
    for kept in (memory, {}):  # killed after its memory was kept, or before
        second = world.opened(kept)
        assert second.begin(one, note).attempt() == Delivered()
        assert plain(world) == by_name(ROWS)


def test_a_batch_that_never_left_is_delivered_by_its_note(world: World) -> None:
    first = world.opened()
    one = world.batch(ROWS, [STARTED])
    note = json.loads(json.dumps(dict(first.begin(one).note)))
    first.close()
    second = world.opened()
    assert second.begin(one, note).attempt() == Delivered()
    assert plain(world) == by_name(ROWS)


def test_trouble_is_an_answer_and_the_same_delivery_goes_on_after_it(world: World) -> None:
    if not world.can_be_away:
        pytest.skip(f"{world.name} is always there")
    exporter = world.opened()
    assert exporter.begin(world.batch([("loss", 2.0, 0)], [STARTED])).attempt() == Delivered()
    delivery = exporter.begin(world.batch(ROWS, [ParamsLogged(START, {"lr": 0.1})], number=2, after_ms=10))
    with world.trouble():
        answers = [delivery.attempt() for _ in range(2)]
        exporter.beat(world.batch(), Heartbeat(START + MS, "RUNNING", None, {}))
    assert all(isinstance(answer, RetryLater) and answer.reason for answer in answers)
    assert delivery.attempt() == Delivered()
    assert plain(world) == by_name([("loss", 2.0, 0), *ROWS])


def test_params_and_the_end_arrive(world: World) -> None:
    exporter = world.opened()
    params = {"lr": 0.1, "optimizer": "adam", "layers": 3}
    first = world.batch(ROWS, [STARTED, ParamsLogged(START, params), TagsSet(START, {"team": "ml"})])
    assert exporter.begin(first).attempt() == Delivered()
    ended = AttemptEnded(
        "FAILED", START, START + 1000 * MS, True, None, params, {"team": "ml"}, (), {"0" * 16: (("loss", START),)}
    )
    assert exporter.begin(world.batch((), [ended], number=2)).attempt() == Delivered()
    if world.metrics_only:
        return
    assert world.params() == {"lr": "0.1", "optimizer": "adam", "layers": "3"}
    assert world.state() == "FAILED"


def test_every_record_is_taken_and_an_empty_batch_too(world: World) -> None:
    exporter = world.opened()
    records = [
        STARTED,
        SpanStarted("1" * 16, "2" * 16, "epoch", START, {"n": 1}),
        SpanEnded("1" * 16, START + MS),
        SpanEnded("9" * 16, START + MS),  # its start was lost
        FlushAsked(START),
        SpansReceived(START, base64.b64encode(bytes.fromhex("0a00")).decode()),  # one Resource, no span
        StateNoted(START, "LOST"),
        StateNoted(START, "RUNNING"),
        ArtifactLogged(START, "m.pt", "", None, 3, "0" * 64, "text/plain", uri="file:///elsewhere/m.pt"),
        WriterEnded(START, "FINISHED", "stop"),
    ]
    assert exporter.begin(world.batch((), records)).attempt() == Delivered()
    assert exporter.begin(world.batch((), (), number=2)).attempt() == Delivered()


def test_a_full_batch_is_delivered_whole(world: World) -> None:
    exporter = world.opened()
    rows = [(f"m{i % 10}", i / 8, i // 10) for i in range(exporter.max_points)]
    assert exporter.begin(world.batch(rows, [STARTED])).attempt() == Delivered()
    found = plain(world)
    assert found == by_name(rows)


def test_closing_twice_is_harmless_and_limits_are_sane(world: World) -> None:
    exporter = world.opened()
    exporter.close()
    exporter.close()
    assert exporter.max_points >= 1
    assert exporter.linger_s >= 0
    assert exporter.rising_limit_s is None or exporter.rising_limit_s >= 0


def test_times_keep_their_milliseconds(world: World) -> None:
    exporter = world.opened()
    exporter.begin(world.batch([("loss", i / 8, i) for i in range(20)], [STARTED])).attempt()
    times = [point.time_unix_nano for point in world.points()]
    if any(times):
        assert times[0] == START
        assert all(b - a == MS for a, b in pairwise(times))
