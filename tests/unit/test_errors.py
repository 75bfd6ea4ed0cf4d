"""The exceptions: one root, facts as attributes, whole after pickling, and the tree that the pages show."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

from tracelet import errors
from tracelet.errors import ConfigError, FileMissing, InvalidValue, SpoolFull, TraceletError

KINDS = [getattr(errors, name) for name in errors.__all__]


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_a_traceleterror_with_its_facts_as_attributes(kind: type[TraceletError]) -> None:
    error = kind("it went wrong", run_id="r1", count=3)
    assert isinstance(error, TraceletError)
    assert str(error) == "it went wrong"
    assert (error.run_id, error.count) == ("r1", 3)  # type: ignore[attr-defined]
    assert error.facts == {"run_id": "r1", "count": 3}


@pytest.mark.parametrize("kind", KINDS)
def test_each_comes_whole_out_of_another_process(kind: type[TraceletError]) -> None:
    error = kind("it went wrong", name="loss", type="str")
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is kind
        assert (str(other), other.facts) == (str(error), error.facts)


@pytest.mark.parametrize(
    ("kind", "python"), [(InvalidValue, ValueError), (FileMissing, FileNotFoundError), (FileMissing, ValueError)]
)
def test_what_python_raises_in_such_a_case_catches_it_too(kind: type[TraceletError], python: type[Exception]) -> None:
    with pytest.raises(python):
        raise kind("it went wrong")


def test_a_full_spool_is_a_spool_error_and_a_setting_is_none() -> None:
    assert issubclass(SpoolFull, errors.SpoolError)
    assert not issubclass(ConfigError, errors.SpoolError)


@pytest.mark.parametrize("page", ["tracelet/errors.py", "docs/reference/errors.md"])
def test_the_tree_on_the_pages_is_the_tree_of_the_classes(page: str) -> None:
    text = (Path(__file__).parents[2] / page).read_text()
    lines = text[text.index("TraceletError\n") :].split("\n\n")[0].split("```")[0].splitlines()
    branch: list[str] = []
    drawn = {}
    start = len(lines[1]) - len(lines[1].lstrip(" "))
    for line in lines[1:]:
        if not line.strip():
            continue
        marks, _, rest = line[start:].partition("── ")
        depth = len(marks) // 4
        name = rest.split()[0]
        branch[depth:] = [name]
        drawn[name] = branch[depth - 1] if depth else "TraceletError"
    real = {kind.__name__: kind.__bases__[0].__name__ for kind in KINDS if kind is not TraceletError}
    assert drawn == real
