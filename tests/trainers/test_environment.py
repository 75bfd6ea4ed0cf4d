"""The environment with PyTorch and Ray: what stands in for CUDA's libraries, and what is said where there is none.

Pattern: such a library is loaded by a real linker, and scripts/trainers.py asked over an empty cache. Limit: a minute.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stack.harness import REPOSITORY, environment


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="the stand-ins are files of x86-64 Linux"
)
def test_a_stand_in_is_loaded_under_its_name_and_has_its_variables_and_nothing_else(tmp_path: Path) -> None:
    code = f"""
import ctypes, sys
sys.path.insert(0, {str(REPOSITORY / "scripts")!r})
from pathlib import Path
import stand_in_libraries
here = Path({str(tmp_path)!r})
stand_in_libraries.write(here / "libempty.so.1")
stand_in_libraries.write(here / "libsome.so.2", ("one_word", "another"))
ctypes.CDLL(str(here / "libempty.so.1"))
some = ctypes.CDLL(str(here / "libsome.so.2"))
again = ctypes.CDLL("libsome.so.2")  # by the name inside it, since it is loaded
words = [ctypes.c_uint64.in_dll(some, name) for name in ("one_word", "another")]
words[0].value = 2**64 - 1
print(*(word.value for word in words), ctypes.c_uint64.in_dll(again, "one_word").value, hasattr(some, "third"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [str(2**64 - 1), "0", str(2**64 - 1), "False"]


def test_where_nothing_is_installed_that_is_said_with_what_to_type(tmp_path: Path) -> None:
    asked = subprocess.run(
        [sys.executable, "-S", str(REPOSITORY / "scripts" / "trainers.py"), "where"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**environment(), "TRACELET_STACK_CACHE": str(tmp_path)},
    )
    assert (asked.returncode, asked.stdout) == (1, "")
    assert "make trainers" in asked.stderr
    assert str(tmp_path) in asked.stderr
