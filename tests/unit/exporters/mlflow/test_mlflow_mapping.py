"""What a batch means in MLflow's terms: rows, their witness, params and tags."""

from __future__ import annotations

import dataclasses
import math

import pytest

from tests.mlflow_batches import START_NS, batch, ended, opened, points, run_info, started
from tracelet.exporters.mlflow.mapping import (
    attempt_mark,
    comparable,
    highest,
    is_newer,
    is_older,
    marker_row,
    metric_rows,
    plan_of,
    witness_of,
)
from tracelet.exporters.mlflow.rest import metrics_json
from tracelet.records import Batch, ErrorInfo, ParamsLogged, Part, StateNoted, TagsSet, WriterOpened

RUN = run_info("r")
MS = START_NS // 1_000_000


def test_rows_carry_the_stamped_milliseconds_and_the_iteration() -> None:
    assert metric_rows(batch(RUN, rows=[("b", 1.5, -3, 7), ("a", 2.0, 2**63 - 1, 8)])) == [
        ("b", 1.5, MS + 7, -3),
        ("a", 2.0, MS + 8, 2**63 - 1),
    ]


def test_equal_rows_of_two_writers_are_kept_apart_the_same_way_each_time() -> None:
    same = [("m", math.nan, 1, 1), ("m", 1.0, 1, 1)]
    parts = tuple(Part(f"{n:016x}", opened(rank=n), (), points(same)) for n in range(3))
    both = Batch(1, RUN, "/f", parts)
    rows = metric_rows(both)
    assert len({(key, ms, step, repr(value)) for key, value, ms, step in rows}) == 6
    assert repr(metric_rows(both)) == repr(rows)


def test_the_witness_is_a_row_that_raises_its_keys_latest_value() -> None:
    rows = [("old", 1.0, 10, 5), ("m", 1.0, 10, 5), ("m", 2.0, 12, 5), ("m", 3.0, 11, 4)]
    assert witness_of(rows, {"old": (6, 0, 0.0)}) == ("m", 2.0, 12, 5)
    assert witness_of(rows, {"old": (5, 10, 0.0), "m": (5, 12, -1e9)}) is None  # only a higher value: no proof
    assert witness_of(rows, {}) == ("old", 1.0, 10, 5)
    assert witness_of([], {}) is None


def test_the_latest_value_is_decided_as_mlflow_does() -> None:
    nan_after_five = [("m", 5.0, 1, 1), ("m", math.nan, 1, 1)]
    assert highest(nan_after_five)["m"][0] == (1, 1, 5.0)
    assert highest([("m", -1.0, 1, 1), ("m", math.nan, 1, 1)])["m"][0] == (1, 1, 0.0)
    assert [comparable(v) for v in (math.inf, -math.inf)] == [1.7976931348623157e308, -1.7976931348623157e308]


def test_a_marker_rises_with_the_batch_and_differs_with_the_folder() -> None:
    one, two = (batch(RUN, number=n, folder="/spool/r/host-boot") for n in (1, 2))
    rows = [("m", 1.0, 5, 1)]
    assert marker_row(one, rows)[0] == marker_row(two, rows)[0]
    assert marker_row(one, rows)[0].startswith("system/")
    assert marker_row(one, rows)[1:] == (1.0, 5, 1)
    assert marker_row(two, rows)[3] == 2
    assert marker_row(batch(RUN, number=1, folder="/spool/r/other-boot"), rows)[0] != marker_row(one, rows)[0]


def test_what_the_run_has_already_is_not_sent_again() -> None:
    records = (started(tags={"mlflow.user": "x"}), ParamsLogged(1, {"a": 1, "b": 2}), TagsSet(1, {"t": "1", "u": "2"}))
    plan = plan_of(batch(RUN, *records), [], {"a": "1"}, {"t": "1", "mlflow.user": "first"})
    assert (plan.params, plan.tags) == ({"b": "2"}, {"u": "2"})
    complete = ended(params={"a": 1, "b": 2}, tags={"t": "1", "u": "2"})
    plan = plan_of(batch(RUN, complete), [], {"a": "1", "b": "2"}, {"t": "1", "u": "2"})
    assert (plan.params, plan.tags, plan.ended) == ({}, {}, complete)


def test_the_last_value_of_a_tag_stands_even_if_the_run_has_it_already() -> None:
    plan = plan_of(batch(RUN, TagsSet(1, {"t": "new"}), TagsSet(2, {"t": "old"})), [], {}, {"t": "old"})
    assert plan.tags == {}
    plan = plan_of(batch(RUN, TagsSet(1, {"t": "a"}), TagsSet(2, {"t": "b"})), [], {}, {"t": "a"})
    assert plan.tags == {"t": "b"}


def test_of_two_states_that_were_noted_the_later_one_counts_wherever_it_stands() -> None:
    back, lost = StateNoted(START_NS + 2, "RUNNING"), StateNoted(START_NS + 1, "LOST")
    for records in ((back, lost), (lost, back)):
        assert plan_of(batch(RUN, *records), [], {}, {}).state == back


def test_a_param_that_went_back_to_its_first_value_is_told_so() -> None:
    changed = plan_of(batch(RUN, ParamsLogged(1, {"a": 2})), [], {"a": "1"}, {})
    assert (changed.params, changed.tags) == ({}, {"tracelet.param.a": "2"})
    back = plan_of(batch(RUN, ParamsLogged(1, {"a": 1})), [], {"a": "1"}, {"tracelet.param.a": "2"})
    assert back.tags == {"tracelet.param.a": "1"}


def test_a_long_params_change_is_seen_although_the_kept_prefix_is_equal() -> None:
    first = plan_of(batch(RUN, ParamsLogged(1, {"a": "x" * 7000})), [], {}, {})
    second = plan_of(batch(RUN, ParamsLogged(1, {"a": "x" * 6999 + "y"})), [], first.params, {})
    assert second.tags["tracelet.param.a"] != first.params["a"]
    assert list(first.texts.values()) == ["x" * 7000]


def test_the_error_of_an_attempt_that_comes_late_is_not_the_runs() -> None:
    late = batch(RUN, ended("FAILED", ErrorInfo("E", "why", "")), by=opened("a" * 16, 1))
    assert not [tag for tag in plan_of(late, [], {}, {"tracelet.run.attempt": f"2-{'b' * 16}"}).tags if "error" in tag]
    assert [tag for tag in plan_of(late, [], {}, {"tracelet.run.attempt": f"1-{'a' * 16}"}).tags if "error" in tag]


def test_the_error_of_a_rank_that_does_not_speak_for_the_run_is_not_the_runs() -> None:
    over = ended("FAILED", ErrorInfo("E", "why", "trace"))
    silent = dataclasses.replace(over, speaks=False)
    assert [tag for tag in plan_of(batch(RUN, over), [], {}, {}).tags if "error" in tag]
    assert not [tag for tag in plan_of(batch(RUN, silent), [], {}, {}).tags if "error" in tag]


def test_an_error_becomes_tags_and_a_long_stacktrace_an_artifact() -> None:
    plan = plan_of(batch(RUN, ended("FAILED", ErrorInfo("E", "why", "trace\n" * 5000))), [], {}, {})
    assert plan.tags["tracelet.error.message"] == "why"
    assert len(plan.tags["tracelet.error.stacktrace"]) == 8000
    assert list(plan.texts.values()) == ["trace\n" * 5000]


def ordered(key: str, start: int, order: object) -> WriterOpened:
    return opened(key * 16, start, resource={"tracelet.run.attempt.order": order})


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        (opened("a" * 16, 1), opened("b" * 16, 2)),
        (ordered("a", 1, 1), ordered("b", 2, 2)),
        (ordered("a", 2, 2), ordered("b", 1, 3)),  # the clock was set back in between
        (ordered("a", 1, 7), opened("b" * 16, 8)),  # a program that made its own Resource
        (ordered("a", 1, "99"), ordered("b", 2, 0)),  # what came over the wire may be anything
        (opened("a-b", 1), ordered("b", 2, 2)),
    ],
)
def test_the_newest_attempt_is_told_by_its_order_and_where_nobody_gave_one_by_its_start(
    earlier: WriterOpened, later: WriterOpened
) -> None:
    assert is_older(attempt_mark(earlier), later)
    assert is_newer(attempt_mark(later), earlier)
    for one in (earlier, later):
        assert not is_older(attempt_mark(one), one)
        assert not is_newer(attempt_mark(one), one)


@pytest.mark.parametrize("mark", [None, "", "somebody's own tag"])
def test_a_mark_nobody_knows_is_older_than_any_attempt(mark: str | None) -> None:
    assert is_older(mark, opened())
    assert not is_newer(mark, opened())


def test_a_request_quotes_keys_and_writes_doubles_exactly() -> None:
    rows = [('a"é', 0.1, 1, -1), ("m", math.nan, 2, 2), ("m", -math.inf, 3, 3), ("m", 5e-324, 4, 4)]
    assert metrics_json("r", rows).decode() == (
        '{"run_id":"r","metrics":['
        '{"key":"a\\"é","value":0.1,"timestamp":1,"step":-1},'
        '{"key":"m","value":"NaN","timestamp":2,"step":2},'
        '{"key":"m","value":"-Infinity","timestamp":3,"step":3},'
        '{"key":"m","value":5e-324,"timestamp":4,"step":4}]}'
    )
