"""What strangers' requests do to the inside: whatever they hold, it is stored or refused, and others go on."""

from __future__ import annotations

import random
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.arrivals import ANYBODY, Memory, arrival, started, take
from tests.shipping import START_NS, until
from tests.unit.otlp.test_decode import DECODERS, golden_bodies
from tracelet.errors import Malformed
from tracelet.gateway.callers import Forbidden, Full
from tracelet.otlp.arrival import AttemptEnd
from tracelet.otlp.decode import Piece, parse
from tracelet.records import ParamsLogged, PointBatch, RunStarted, SpansReceived, TagsSet


def good_run_goes_on(intake: Any, memory: Memory, run_id: str = "good") -> None:
    take(intake, arrival(run_id, points=[("loss", 0.5, 1)]))
    until(lambda: memory.points(run_id) == [("loss", 0.5, 1, START_NS)])


def test_times_names_and_values_at_their_limits_are_stored(tmp_path: Path) -> None:
    memory = Memory()
    points = PointBatch(
        {0: "x" * 100_000, 5: "\0", 7: "损失/🔥"},
        array("Q", [0, 2**64 - 1, 1]),
        array("d", [float("inf"), -0.0, 5e-324]),
        array("q", [-(2**63), 2**63 - 1, 0]),
        array("I", [0, 5, 7]),
    )
    records = (
        ParamsLogged(2**64 - 1, {"": "", "a\0b": float("nan"), "x" * 10**6: 1}),
        TagsSet(0, {"": ""}),
        RunStarted(0, "", {}, {}),
        SpansReceived(0, ""),
        SpansReceived(2**64 - 1, "not base64!"),
    )
    end = AttemptEnd("FINISHED", 2**64 - 1, None, "status")
    odd = replace(
        arrival("odd"),
        points=points,
        records=records,
        first_unix_nano=1,
        started_unix_nano=2**63 - 1,
        ended=end,
        items=8,
    )
    with started(tmp_path, memory) as intake:
        take(intake, odd)
        until(lambda: len(memory.points("odd")) == 3)
        good_run_goes_on(intake, memory)
    assert memory.points("odd") == [
        ("x" * 100_000, float("inf"), -(2**63), 0),
        ("\0", -0.0, 2**63 - 1, 2**64 - 1),
        ("损失/🔥", 5e-324, 0, 1),
    ]


def test_runs_named_like_what_lies_in_a_gateways_folder_are_runs_like_others(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    with started(tmp_path / "before", Memory()) as intake:
        take(intake, arrival("a-run", points=[("loss", 0.5, 1)]))
    made = {path.name for path in (tmp_path / "before").rglob("*")}
    names = {name for name in made if name[0].isalnum()} | {name.lstrip(".") for name in made}
    names |= {"gateway.lock", "gateway", "unknown", "artifacts", "delivered", "a.", "a..", "x.part", "a" * 128}
    memory = Memory()
    with started(tmp_path / "runs", memory) as intake:
        for name in sorted(names):
            good_run_goes_on(intake, memory, name)
    again = Memory()
    with started(tmp_path / "runs", again) as intake:
        assert intake.run_info().runs == len(names)
        for name in sorted(names):
            take(intake, arrival(name, points=[("loss", 0.25, 2)]))
        until(lambda: all(again.points(name) for name in names))


def test_a_request_of_five_hundred_instances_and_attempts_is_taken(tmp_path: Path) -> None:
    memory = Memory()
    one = arrival("many", points=[("a", 1.0, 1)])
    with started(tmp_path, memory) as intake:
        taken = take(
            intake,
            *(replace(one, instance_id=f"i{i}", resource={**one.resource, "n": i}) for i in range(250)),
            *(replace(one, attempt_key=f"k{i}") for i in range(250)),
        )
        assert taken.points == 500
        good_run_goes_on(intake, memory)


def test_a_hundred_thousand_names_in_one_request_are_stored(tmp_path: Path) -> None:
    memory = Memory()
    with started(tmp_path, memory) as intake:
        assert take(intake, arrival("names", points=[(f"m{i}", 1.0, i) for i in range(100_000)])).points == 100_000
        good_run_goes_on(intake, memory)


def test_pieces_that_contradict_each_other_make_no_value_and_no_fault(tmp_path: Path) -> None:
    memory = Memory()
    pieces = [
        Piece("tracelet.params", "tracelet.param.x", index, count, digest * 64, "text", START_NS, "")
        for digest in "0f"
        for count in (1, 2, 3)
        for index in range(1, count + 1)
    ]
    with started(tmp_path, memory) as intake:
        take(intake, arrival("odd", pieces=pieces))
        take(intake, arrival("odd", pieces=pieces[::-1]))
        good_run_goes_on(intake, memory)
    assert memory.records("odd", ParamsLogged) == []


@pytest.mark.parametrize("seed", range(3))
def test_damaged_requests_are_stored_or_refused_and_others_go_on(tmp_path: Path, seed: int) -> None:
    chance, memory = random.Random(seed), Memory()
    bodies = [(signal, body) for signal in sorted(DECODERS) for body in golden_bodies(signal)]
    decoded = 0
    with started(tmp_path, memory) as intake:
        for _ in range(500):
            signal, whole = chance.choice(bodies)
            body = bytearray(whole)
            for _ in range(chance.randrange(1, 8)):
                body[chance.randrange(len(body))] = chance.randrange(256)
            try:
                message = parse(signal, bytes(body), "application/x-protobuf")
            except Malformed:
                continue
            decoded += 1
            try:
                intake.take(DECODERS[signal](message), ANYBODY)
            except (Full, Forbidden):
                pytest.fail("nobody's quota, nobody's token: it has to be taken")
        good_run_goes_on(intake, memory)
    assert decoded > 20
