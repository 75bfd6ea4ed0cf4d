"""PyTorch's tensors as values: the tests of tensor_values.py, by an interpreter that has it.

Pattern: pytest in a process of that interpreter. Limit: seven minutes.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from tests.stack.harness import REPOSITORY
from tests.trainers.environment import run, said


def test_tensors_are_values_converted_once_without_holding_on_to_the_graph(tmp_path: Path) -> None:
    # Where this interpreter has a PyTorch of its own (on a machine with a GPU, say), that is the one to be tested.
    own = sys.executable if find_spec("torch") is not None else None
    tests = REPOSITORY / "tests" / "trainers" / "tensor_values.py"
    options = ("-q", "-p", "no:cacheprovider", f"--rootdir={REPOSITORY}", f"--basetemp={tmp_path / 'inner'}")
    run(tmp_path, "-m", "pytest", *options, str(tests), by=own)
    assert " passed" in said(tmp_path)
