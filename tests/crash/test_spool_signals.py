"""Ten thousand calls interrupted by exceptions out of a signal handler: no open slot is left, none is overwritten.

Pattern: a timer's signal whose handler raises, in the middle of calls. Limit: two minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.unit.spool.pens import Story
from tracelet.spool.reader import START, SpoolReader

# A process of its own: the handler may strike in any frame, and pytest's are not made for that.
CHILD = """
import json, pathlib, signal, sys
from tests.unit.spool.pens import end, pen

class Interrupted(BaseException):
    pass

folder, mapped, wanted = pathlib.Path(sys.argv[1]), sys.argv[2] == "True", int(sys.argv[3])
writer = pen(folder, slots_per_segment=4096, mapped=mapped)
log = writer.log
interrupts, armed, returned, i = 0, False, [], 0

def handler(number, frame):
    global interrupts
    if armed:
        interrupts += 1
        raise Interrupted

signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
while interrupts < wanted:
    try:
        armed = True
        while True:
            i += 1
            # Now and then a new name, so that the slow path is interrupted as well.
            log("a" if i % 50 else f"name {i}", i / 2, i)
            returned.append(i)
    except Interrupted:
        armed = False
signal.setitimer(signal.ITIMER_REAL, 0)
log("last", 0.0, 0)
end(writer)
print(json.dumps({"interrupts": interrupts, "began": i, "returned": returned, "counts": writer.counts()}))
"""


@pytest.mark.parametrize(("mapped", "wanted"), [(True, 10_000), (False, 2_000)], ids=["mapped", "appended"])
def test_interrupts_leave_no_open_slot_and_overwrite_none(tmp_path: Path, mapped: bool, wanted: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), str(mapped), str(wanted)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["interrupts"] >= wanted

    # As a live reader sees it: an open slot would stand in the position.
    reader = SpoolReader(tmp_path)
    (name,) = reader.writers()
    story = Story()
    ranges, story.position = reader.poll(name, START, 10**9, dead=False)
    story.take(reader, ranges)
    assert story.position.open == ()
    assert reader.ended(name)
    assert len(story.slots()) == len(set(story.slots()))
    assert not story.damaged
    seen = Counter(iteration for _, _, iteration in story.points)
    assert max(seen.values()) == 1
    assert set(told["returned"]) <= set(seen)
    assert set(seen) <= set(range(told["began"] + 1))  # interrupted calls: there or not, never half
    assert all(value == iteration / 2 for _, value, iteration in story.points)
