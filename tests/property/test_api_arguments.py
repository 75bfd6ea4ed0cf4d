"""Whatever is passed to the API is either in the spool as it was meant, or a TraceletError at once."""

from __future__ import annotations

import datetime
import decimal
import fractions
import math
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.spooled import folder_of, read
from tracelet import Experiment, ExperimentConfig
from tracelet.errors import TraceletError
from tracelet.records import ParamsLogged, TagsSet

TEXT = st.one_of(
    st.text(st.characters(codec=None), max_size=30),
    st.sampled_from(
        ["", " ", ".", "..", "../../etc/passwd", "a/b", "a\0b", "\ud800", "损失", "🔥", "%", "tracelet.run", "x" * 3001]
    ),
)
NUMBERS = st.one_of(
    st.floats(),
    st.integers(),
    st.integers(min_value=-(2**70), max_value=2**70),
    st.booleans(),
    st.decimals(allow_nan=False),  # a signalling NaN raises by itself, and what a value raises passes through
    st.fractions(),
    st.complex_numbers(),
)
ANYTHING = st.one_of(
    st.none(),
    NUMBERS,
    TEXT,
    st.binary(max_size=10),
    st.dates(),
    st.just(object()),
    st.just(int),
    st.just(math.sin),
    st.lists(st.integers(), max_size=3),
)
TREES = st.recursive(
    ANYTHING,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(TEXT, st.integers()), inner, max_size=3)
    ),
    max_leaves=8,
)


def tried(call: Any, *arguments: Any, **named: Any) -> bool:
    """Whether the call took it; a TraceletError is the only other way out."""
    try:
        call(*arguments, **named)
    except TraceletError:
        return False
    return True


@settings(
    deadline=None,
    max_examples=40,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(
        st.tuples(st.one_of(TEXT, ANYTHING), st.one_of(NUMBERS, ANYTHING), st.one_of(st.none(), NUMBERS)), max_size=8
    ),
    st.lists(TREES, max_size=4),
    st.lists(TREES, max_size=4),
)
def test_an_argument_is_taken_as_it_was_meant_or_refused_at_once(
    metrics: list[tuple[Any, Any, Any]], params: list[Any], tags: list[Any]
) -> None:
    with tempfile.TemporaryDirectory() as made:
        config = ExperimentConfig(project="p", dir=Path(made), shipper="off")
        exp = Experiment("arguments", config, backend="file").start()
        taken = [
            (name, float(value), iteration)
            for name, value, iteration in metrics
            if tried(exp.log_metric, name, value, iteration=iteration)
        ]
        count = sum(tried(exp.log_params, tree) for tree in params)
        tagged = sum(tried(exp.set_tags, tree) for tree in tags)
        for name, _, _ in metrics:
            tried(exp.log_artifact, __file__, name)
        exp.stop()
        found = read(folder_of(Path(made)))
        logged = [(point.name, point.value) for point in found.points]
        assert len(logged) == len(taken)
        for (name, value), (given_name, given_value, iteration) in zip(logged, taken, strict=True):
            assert name == given_name
            assert value == given_value or (math.isnan(value) and math.isnan(given_value))
            assert iteration is None or isinstance(iteration, int)
        assert exp.stats.refused == 0
        assert len(found.of(ParamsLogged)) <= count
        assert len(found.of(TagsSet)) <= tagged + 1
        assert not [path for path in Path(made).parent.iterdir() if path.name == "etc"]


def test_kinds_of_numbers_are_told_apart() -> None:
    """What the strategies above are meant to reach: a number of another library, and what only looks like one."""
    with tempfile.TemporaryDirectory() as made:
        exp = Experiment("kinds", ExperimentConfig(project="p", dir=Path(made), shipper="off"), backend="file").start()
        assert tried(exp.log_metric, "a", decimal.Decimal("0.5"))
        assert tried(exp.log_metric, "a", fractions.Fraction(1, 4))
        assert not tried(exp.log_metric, "a", "0.5")
        assert not tried(exp.log_metric, "a", 1j)
        assert not tried(exp.log_metric, "a", datetime.date(2026, 1, 1))
        assert not tried(exp.log_metric, "a", 1.0, iteration=1.5)
        exp.stop()
        assert [point.value for point in read(folder_of(Path(made))).points] == [0.5, 0.25]
