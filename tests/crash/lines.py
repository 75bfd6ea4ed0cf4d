"""A fault at a line of ours, by default death: at every one a program comes by, or at some, drawn anew each time."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any


class Lines:
    """The lines of some files, and the one whose turn it is; `watch` is for `sys.settrace`, in a child for each turn.

    The first child has no turn and meets no fault: what it has `met` is what there is.
    """

    def __init__(
        self, where: str | tuple[str, ...], *, every: int, seed: int, fault: Callable[[], object] | None = None
    ) -> None:
        self._where = where
        self._every = every
        self._fault = _die if fault is None else fault
        self._chance = random.Random(seed)
        self.met: Counter[str] = Counter()
        self.last = ""
        self.time = 0

    def watch(self, frame: FrameType, event: str, arg: object) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.startswith(self._where):
            return None
        if event == "line":
            line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            self.met[line] += 1
            if self.met[line] == self.time and line == self.last:
                self._fault()
        return self.watch

    def turns(self, met: Mapping[str, int]) -> Iterator[int]:
        """Each `every`th line in turn, by number; of what a line does many times over, any time may be the one."""
        for number, line in enumerate(sorted(met)[self._chance.randrange(self._every) :: self._every]):
            self.last, self.time = line, 1 + self._chance.randrange(met[line])
            yield number


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
