"""What an END, an exit code and a death make of an attempt, and what its records add up to."""

from __future__ import annotations

import json
import signal

import pytest

from tracelet.records import ErrorInfo, ParamsLogged, SpanEnded, SpanStarted, TagsSet, WriterEnded
from tracelet.shipper.status import Fold, Verdict, decide

END = WriterEnded(5, "FINISHED", "stop")


def test_no_end_is_killed_at_the_time_of_notice() -> None:
    assert decide(None, exit_code=None, gone_unix_nano=7) == Verdict("KILLED", 7, "death")


def test_an_end_by_stop_is_believed_whatever_the_process_did_later() -> None:
    assert decide(END, exit_code=3, gone_unix_nano=7).status == "FINISHED"


@pytest.mark.parametrize(
    ("status", "seen_by", "exit_code", "expected"),
    [
        ("FINISHED", "exit", None, "FINISHED"),  # nobody told
        ("FINISHED", "exit", 0, "FINISHED"),
        ("FINISHED", "exit", 3, "FAILED"),
        ("FINISHED", "exit", -signal.SIGSEGV, "FAILED"),
        ("FINISHED", "exit", -signal.SIGKILL, "KILLED"),
        ("FAILED", "exit", 1, "FAILED"),
        ("KILLED", "exit", -signal.SIGINT, "KILLED"),
        ("FAILED", "exit-code", 0, "FINISHED"),  # sys.exit(3), caught by somebody
        ("FAILED", "exit-code", 3, "FAILED"),
        ("FINISHED", "exit-final", 3, "FINISHED"),
    ],
)
def test_the_exit_code_has_the_last_word_on_an_end_at_exit(
    status: str, seen_by: str, exit_code: int | None, expected: str
) -> None:
    verdict = decide(WriterEnded(5, status, seen_by), exit_code=exit_code, gone_unix_nano=7)
    assert (verdict.status, verdict.end_unix_nano) == (expected, 5)


def test_a_verdict_survives_the_manifest() -> None:
    verdict = Verdict("FAILED", 5, "exit", ErrorInfo("ValueError", "no", "trace"), 1)
    assert Verdict.from_json(json.loads(json.dumps({**verdict.to_json(), "newer": 1}))) == verdict


def test_the_last_param_and_tag_stand_and_ended_spans_are_gone() -> None:
    fold = Fold()
    fold.take(
        "w",
        [
            ParamsLogged(1, {"a": 1, "b": 2}),
            TagsSet(1, {"t": "x"}),
            SpanStarted("s1", "r", "train", 1),
            SpanStarted("s2", "s1", "validate", 2),
            None,
            SpanEnded("s2", 3),
            ParamsLogged(2, {"a": 3}),
            TagsSet(2, {"t": "y"}),
        ],
    )
    assert fold.params == {"a": 3, "b": 2}
    assert fold.tags == {"t": "y"}
    assert list(fold.open_spans) == ["s1"]
