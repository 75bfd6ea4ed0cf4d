"""Dead letters: what each line holds, what a batch of them is, and which lines an answer marks."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.otlp_batches import MS, START, opened
from tests.shipping import add_attempt, end, open_writer, put, ship, shipment
from tracelet.exporters.base import Refusal
from tracelet.records import Again, ArtifactLogged, AttemptEnded, Batch, ParamsLogged, RunInfo, SpansReceived, TagsSet
from tracelet.shipper.deadletter import DeadLetters
from tracelet.shipper.reship import Reship, why_not
from tracelet.spool.cursor import Journal, Progress
from tracelet.testing import Delivered, InMemoryExporter, MemoryStore, Rejected

RUN = RunInfo("run", "project", "experiment", "a run")
ARTIFACT = ArtifactLogged(START, "a/b.pt", "/data/b.pt", "artifacts/1", 5, "ab" * 32, "text/plain", 7, 8, None)


def point(name: str, value: float, iteration: int, time: int = START, **more: Any) -> dict[str, Any]:
    told = value if math.isfinite(value) else str(value)
    return {"name": name, "value": told, "iteration": iteration, "time_unix_nano": time, **more}


def written(folder: Path, *refusals: Refusal, batch: int = 1) -> DeadLetters:
    letters = DeadLetters(folder, "a")
    openings = {f"w{rank}": opened(rank, f"instance-{rank}") for rank in range(2)}
    placed = [dataclasses.replace(one, writer=one.writer or "w0") for one in refusals]
    letters.write(batch, placed, time_unix_nano=START, openings=openings)
    return letters


def batch_of(letters: DeadLetters, number: int = 7) -> Batch:
    made = Reship(DeadLetters(letters.path.parent, "a"), wanted=True).next(RUN, "/folder", number, 10_000)
    assert made is not None
    return made.batch


values = st.floats(allow_nan=True, allow_infinity=True)
rows = st.tuples(st.text(min_size=1), values, st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**64 - 1))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["w0", "w1"]), rows, st.booleans()), min_size=1, max_size=30))
def test_points_come_back_as_they_were_whatever_their_names_values_and_times(
    tmp_path_factory: pytest.TempPathFactory, logged: list[tuple[str, tuple[str, float, int, int], bool]]
) -> None:
    letters = written(
        tmp_path_factory.mktemp("letters"),
        *(
            Refusal("point", "no", point(*row, **({"dense": True} if dense else {})), writer)
            for writer, row, dense in logged
        ),
    )
    got = [
        (part.writer_id, (part.points.names[m], v, n, t), i in part.points.dense)
        for part in batch_of(letters).parts
        for i, (m, v, n, t) in enumerate(
            zip(
                part.points.metric_ids,
                part.points.values,
                part.points.iterations,
                part.points.time_unix_nano,
                strict=True,
            )
        )
    ]
    in_parts = sorted(logged, key=lambda one: [writer for writer, _, _ in logged].index(one[0]))
    assert repr(got) == repr(in_parts)  # NaN is not equal to itself


def test_other_records_come_back_as_they_were(tmp_path: Path) -> None:
    spans = base64.b64encode(b"\x0a\x00").decode()
    span = {"signal": "traces", "scope": "tracelet", "message": {"name": "epoch", "spanId": "0102030405060708"}}
    text = {"path": "tracelet/params/x", "text": "long"}
    ends = {"status": "FAILED", "start_unix_nano": 1, "end_unix_nano": 2}
    letters = written(
        tmp_path,
        Refusal("param", "no", {"key": "lr", "value": 0.1, "time_unix_nano": 5}),
        Refusal("tag", "no", {"key": "team", "value": "ml"}),
        Refusal("artifact", "no", dataclasses.asdict(ARTIFACT)),
        Refusal("artifact", "no", text),
        Refusal("span", "no", {"name": "x", "resource_spans": spans}),
        Refusal("span", "no", span),
        Refusal("event", "no", ends),
    )
    (part,) = batch_of(letters).parts
    assert part.opened == opened(0, "instance-0")
    assert part.records == (
        ParamsLogged(5, {"lr": 0.1}),
        TagsSet(START, {"team": "ml"}),
        ARTIFACT,
        Again("artifact", text),
        SpansReceived(START, spans),
        Again("span", span),
        AttemptEnded("FAILED", 1, 2, True, None, {}, {}, (), {}),
    )
    assert batch_of(letters).again


BROKEN: list[tuple[str, dict[str, Any]]] = [
    ("damage", {"segment": 1}),
    ("frame", {"kind": 99}),
    ("point", {"metric_id": 1, "value": 1.0, "iteration": 1, "time_unix_nano": 1}),
    ("point", point("x", 1.0, 2**63)),
    ("point", point("x", 1.0, 1, -1)),
    ("point", point("", 1.0, 1)),
    ("point", {"signal": "metrics", "scope": "s", "message": {"nonsense": 1}}),
    ("point", {"signal": "metrics", "scope": "s", "message": {"gauge": {"dataPoints": 3}}}),
    ("span", {"signal": "smell", "message": {}}),
    ("span", {"signal": "traces", "scope": "s", "message": {"spanId": "not hex"}}),
    ("param", {"key": "x"}),
    ("param", {"key": "x", "value": None}),
    ("artifact", {"path": "x"}),
    ("event", {"status": "FAILED"}),
    ("event", {"status": "FAILED", "start_unix_nano": 1, "end_unix_nano": 2**64}),
    ("smell", {}),
]


@pytest.mark.parametrize(("what", "facts"), BROKEN)
def test_what_says_too_little_is_never_sent_and_keeps_nothing_else_back(
    tmp_path: Path, what: str, facts: dict[str, Any]
) -> None:
    letters = written(tmp_path, Refusal(what, "no", facts), Refusal("point", "no", point("fine", 1.0, 1)))
    bad, good = letters.waiting()
    assert why_not(bad, letters.openings())
    assert why_not(good, letters.openings()) is None
    (part,) = batch_of(letters).parts
    assert (len(part.points), part.records) == (1, ())


def settled(letters: DeadLetters, refused: list[Refusal]) -> list[str]:
    """What waits after this answer to all of the letters."""
    reship = Reship(letters, wanted=True)
    made = reship.next(RUN, "/folder", 1, 10_000)
    assert made is not None
    assert made.extra is not None
    reship.settle(made.extra, refused)
    return [str(x.line["reason"]) for x in letters.waiting()]


def test_a_line_stays_exactly_if_its_thing_is_refused_again(tmp_path: Path) -> None:
    points = [Refusal("point", f"p{i}", point("loss", float(i), i, START + i * MS)) for i in range(5)]
    points.append(Refusal("point", "nan", point("loss", math.nan, 9)))
    letters = written(tmp_path, *points)
    assert settled(letters, [points[3], points[5]]) == ["p3", "nan"]
    assert settled(letters, []) == []


def test_one_of_several_keeps_all_lines_that_may_mean_it(tmp_path: Path) -> None:
    items = [point("loss", float(i), i) for i in range(10)]
    one_of = Refusal("point", "some of ten", {"count": 2, "of": 10, "items": items})
    alone = Refusal("point", "alone", point("loss", 4.0, 4))
    letters = written(tmp_path, one_of, alone, Refusal("point", "other", point("acc", 1.0, 1)))
    assert [letter.count for letter in letters.waiting()] == [2, 1, 1]
    assert settled(letters, [Refusal("point", "no", items[4])]) == ["some of ten", "alone"]


def test_a_refusal_in_unknown_words_keeps_every_line_of_its_kind(tmp_path: Path) -> None:
    letters = written(
        tmp_path, Refusal("point", "p", point("loss", 1.0, 1)), Refusal("tag", "t", {"key": "a", "value": "b"})
    )
    assert settled(letters, [Refusal("point", "no", {"something": "else"})]) == ["p"]


def test_an_opening_stands_once_in_a_file_and_is_found_after_a_restart(tmp_path: Path) -> None:
    letters = written(tmp_path, Refusal("tag", "no", {"key": "a", "value": "b"}), Refusal("tag", "no", {"key": "c"}))
    written(tmp_path, Refusal("tag", "no", {"key": "d"}), Refusal("tag", "no", {"key": "e"}, "w1"), batch=2)
    lines = [json.loads(line) for line in letters.path.read_text().splitlines()]
    assert ["opened" in line for line in lines] == [True, False, False, True]
    assert letters.openings() == {"w0": opened(0, "instance-0"), "w1": opened(1, "instance-1")}


def test_what_an_end_tells_once_more_stands_once_and_its_last_value_stands_last(tmp_path: Path) -> None:
    def tag(value: str, writer: str = "w0") -> Refusal:
        return Refusal("tag", f"no {value}", {"key": "team", "value": value, "time_unix_nano": START}, writer)

    text = Refusal("artifact", "no", {"path": "tracelet/params/x", "text": "long"})
    letters = written(tmp_path, tag("a"), tag("b"), text)
    written(tmp_path, tag("b"), text, batch=2)
    written(tmp_path, tag("a"), batch=3)
    written(tmp_path, tag("a"), Refusal("param", "no", {"key": "team", "value": "a"}), batch=4)
    assert [(x.what, x.line["batch"], x.facts.get("value")) for x in letters.waiting()] == [
        ("tag", 1, "a"),
        ("tag", 1, "b"),
        ("artifact", 1, None),
        ("tag", 3, "a"),
        ("param", 4, "a"),
    ]
    letters.mark(letters.waiting())
    written(tmp_path, tag("a"), batch=5)
    assert [x.line["batch"] for x in letters.waiting()] == [5], "one that was taken stands no more"


def test_lines_of_a_batch_are_counted_alike_before_and_after_a_crash(tmp_path: Path) -> None:
    tags = [Refusal("tag", "no", {"key": key, "value": "x"}) for key in ("team", "team", "mood")]
    letters = written(tmp_path, *tags)
    openings = {"w0": opened(0, "instance-0")}
    repeated = [dataclasses.replace(tag, writer="w0", reason="no, again") for tag in tags]
    assert letters.write(1, repeated[1:], time_unix_nano=START, repeat=True, openings=openings) == 2
    assert letters.write(2, repeated[2:], time_unix_nano=START, openings=openings) == 0


@pytest.mark.parametrize("tail", [b'{"torn', b'{"version": 1, "what": "tag", "by": "an editor"}'])
def test_what_a_crash_left_of_a_line_goes_and_what_an_editor_left_stays(tmp_path: Path, tail: bytes) -> None:
    letters = written(tmp_path, Refusal("tag", "no", {"key": "a"}))
    with open(letters.path, "ab") as file:
        file.write(tail)
    written(tmp_path, Refusal("tag", "no", {"key": "b"}), batch=2)
    lines = [json.loads(line) for line in letters.path.read_text().splitlines()]
    assert [line.get("by") for line in lines] == ([None, None] if tail == b'{"torn' else [None, "an editor", None])


# ---- through a lane ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run whose three params its destination refused, and whose points it took."""
    made = tmp_path / "run" / "host-boot"
    attempt = add_attempt(made, "a")
    writer = open_writer(made, attempt)
    for i in range(3):
        put(writer, ParamsLogged(i, {f"p{i}": i}))
        writer.log("loss", float(i), i)
    end(writer)
    refused = Rejected(tuple(Refusal("param", "no", {"key": f"p{i}", "value": i}) for i in range(3)))
    outcome = ship(made, {"a": InMemoryExporter(answers=[refused])})
    assert (outcome.complete, outcome.refused) == (True, {"memory-a": 3})
    return made


def again(folder: Path, exporter: InMemoryExporter) -> Any:
    return ship(folder, {"a": exporter}, again=True)


def waiting(folder: Path) -> list[str]:
    return [str(letter.facts["key"]) for letter in DeadLetters(folder, "memory-a").waiting()]


def refuses(*keys: str) -> Callable[[Batch], Any]:
    def answer(batch: Batch) -> Any:
        got = [record.params for part in batch.parts for record in part.records if isinstance(record, ParamsLogged)]
        items = [Refusal("param", "again", {"key": k, "value": v}) for one in got for k, v in one.items() if k in keys]
        return Rejected(tuple(items)) if items else Delivered()

    return answer


def test_taken_letters_count_as_no_refusal_any_more_and_a_later_shipper_sends_nothing(folder: Path) -> None:
    first = InMemoryExporter(answers=[refuses("p1")])
    assert again(folder, first).complete
    assert waiting(folder) == ["p1"]
    progress = Progress(folder)
    progress.refresh()
    assert (progress.destinations["memory-a"].delivered, progress.destinations["memory-a"].refused) == (3, 1)
    second = InMemoryExporter()
    assert again(folder, second).complete
    assert [record for record in second.store.records() if record.params != {"p1": 1}] == []  # type: ignore[union-attr]
    assert second.attempts == 1
    assert waiting(folder) == []
    third = InMemoryExporter()
    assert again(folder, third).complete
    assert third.attempts == 0


def once(folder: Path, exporter: InMemoryExporter, **options: Any) -> None:
    """Ship what a run that goes on has so far."""
    made = shipment(folder, {"a": exporter}, **options)
    made.run(follow=False, stop=threading.Event(), timeout_s=20.0)
    made.close()


def test_an_old_value_of_a_tag_is_not_sent_over_a_newer_one_that_was_taken(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "host-boot"
    writer = open_writer(folder, add_attempt(folder, "a"))
    put(writer, TagsSet(1, {"state": "old", "kept": "yes"}))
    refused = [Refusal("tag", "no", {"key": key, "value": value}) for key, value in (("state", "old"), ("kept", "yes"))]
    once(folder, InMemoryExporter(answers=[Rejected(tuple(refused))]))
    assert waiting(folder) == ["state", "kept"]
    put(writer, TagsSet(2, {"state": "new"}))
    once(folder, InMemoryExporter())
    assert waiting(folder) == ["kept"]
    progress = Progress(folder)
    progress.refresh()
    assert progress.destinations["memory-a"].refused == 1
    exporter = InMemoryExporter()
    once(folder, exporter, again=True)
    assert [record.tags for record in exporter.store.records() if isinstance(record, TagsSet)] == [{"kept": "yes"}]


def test_without_the_wish_no_letter_leaves(folder: Path) -> None:
    exporter = InMemoryExporter()
    assert ship(folder, {"a": exporter}).complete
    assert exporter.attempts == 0
    assert waiting(folder) == ["p0", "p1", "p2"]


@pytest.mark.parametrize("where", ["mark", "ack"])
def test_a_death_at_the_mark_or_the_acknowledgement_repeats_the_same_batch_once(
    folder: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = MemoryStore()

    def die(*_: object, **__: object) -> None:
        raise OSError("the power went")

    with monkeypatch.context() as broken:
        broken.setattr(*((DeadLetters, "mark") if where == "mark" else (Journal, "ack")), die)
        dying = shipment(folder, {"a": InMemoryExporter(memory)}, again=True)
        dying.run(follow=True, stop=threading.Event(), timeout_s=0.5)
        dying.close()
    assert waiting(folder) == (["p0", "p1", "p2"] if where == "mark" else [])
    resumed = InMemoryExporter(memory)
    assert ship(folder, {"a": resumed}).complete, "what was under way is finished by any shipper"
    assert memory.arrivals == [memory.arrivals[0]] * 2
    assert memory.unequal == []
    assert waiting(folder) == []
    progress = Progress(folder)
    progress.refresh()
    assert progress.destinations["memory-a"].refused == 0
