"""Columns line up, numbers and times read at a glance, and nothing in a name reaches the terminal as a command."""

from __future__ import annotations

import pytest

from tracelet.cli.text import age, number, plain, size, table


def test_columns_are_as_wide_as_their_widest_cell_and_lines_end_without_blanks() -> None:
    text = table([["a", "1,000", "x"], ["longer", "2", ""]], header=["NAME", "N", "END"], right="lr")
    assert text.splitlines() == ["NAME        N  END", "a       1,000  x", "longer      2"]


def test_no_rows_are_no_text() -> None:
    assert table([]) == ""


@pytest.mark.parametrize(
    ("given", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_999, "1.0 MB"), (5e15, "5000.0 TB")]
)
def test_sizes_have_a_unit(given: float, text: str) -> None:
    assert size(given) == text


@pytest.mark.parametrize(
    ("given", "text"),
    [(-3, "0 s"), (59.9, "59 s"), (3600, "1 h"), (3601, "1 h"), (90061, "1 d 1 h"), (7 * 86400, "7 d")],
)
def test_ages_have_at_most_two_units(given: float, text: str) -> None:
    assert age(given) == text


@pytest.mark.parametrize(
    ("given", "text"),
    [(float("inf"), "inf"), (float("nan"), "nan"), (0.0, "0"), (1e-9, "1e-09"), (-1234567.5, "-1234568")],
)
def test_numbers_are_short(given: float, text: str) -> None:
    assert number(given) == text


def test_a_name_with_an_escape_sequence_does_not_reach_the_terminal_as_one() -> None:
    assert "\x1b" not in plain("loss\x1b]0;owned\x07")
    assert plain("损失\nloss") == "损失 loss"
