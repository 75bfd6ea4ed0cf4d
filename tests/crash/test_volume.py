"""Many points without a destination, and many names: nothing lost, memory flat, the spool as large as it says.

Pattern: a real program whose resident memory is read from /proc as it goes. Limit: 60 s a program (10 min in the soak);
1 million points and 10,000 names, with TRACELET_SOAK=1 10 million and 100,000.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.crash.test_disk_full import delivered
from tests.shipping import until
from tests.spooled import folder_of
from tracelet.spool.lease import shipper_alive
from tracelet.spool.reader import Position, SpoolReader
from tracelet.spool.store import usage

SOAK = bool(os.environ.get("TRACELET_SOAK"))
POINTS = 10_000_000 if SOAK else 1_000_000
NAMES = 100_000 if SOAK else 10_000
LIMIT_S = 600 if SOAK else 60

MEMORY = """
def resident(pid="self"):
    for line in open(f"/proc/{pid}/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
"""

PLENTY = (
    MEMORY
    + """
import importlib.util, json, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "mlflow" else find(name, *more)  # as without MLflow
import tracelet
count = int(sys.argv[1])
exp = tracelet.start_logging(exp_name="plenty", project="p")
assert exp._run.ticket.destinations == ()
log = exp.log_metric
samples = []
for i in range(count):
    log("loss", i / 2, i)
    if i % (count // 20) == count // 20 - 1:
        samples.append(resident())
print(json.dumps([exp.stats.logged, exp.stats.refused, samples]))
exp.stop()
"""
)

NAMED = (
    MEMORY
    + """
import json, pathlib, sys, tracelet
from tracelet.spool.lease import shipper_alive
count = int(sys.argv[1])
exp = tracelet.start_logging(exp_name="named", project="p", backend=tracelet.File(sys.argv[2]))
samples = []
for turn in range(12):
    for i in range(count):
        exp.log_metric(f"metric/{i}", float(turn), iteration=turn)
    assert exp.flush(300)
    samples.append([resident(), resident(shipper_alive(exp._run.folder))])
print(json.dumps([exp.stats.logged, exp.stats.shipped, samples]))
exp.stop()
"""
)


def run(program: str, *arguments: str, cwd: Path) -> list[object]:
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    found: list[object] = json.loads(done.stdout)
    return found


def test_points_without_a_destination_are_all_there_and_take_no_memory(tmp_path: Path, clean_environment: Path) -> None:
    logged, refused, samples = run(PLENTY, str(POINTS), cwd=tmp_path)
    assert (logged, refused) == (POINTS, 0)
    assert isinstance(samples, list)
    assert max(samples[5:]) - samples[4] < 4_000_000  # mapped segments that are full are given back
    folder = folder_of(clean_environment)
    assert usage(folder) < 32 * POINTS * 1.1 + 2_000_000
    assert count(folder) == POINTS


def count(folder: Path) -> int:
    """The points in a folder, each iteration being one more than the one before."""
    reader = SpoolReader(folder)
    (writer,) = reader.writers()
    position, total = Position(), 0
    while True:
        ranges, position = reader.poll(writer, position, 100_000, dead=True)
        if not ranges:
            reader.close()
            return total
        for piece in ranges:
            records = reader.read(piece).records
            iterations = memoryview(records).cast("q")[2::4].tolist()
            assert iterations == list(range(total, total + len(iterations)))
            total += len(iterations)


def test_very_many_names_arrive_and_memory_stays_where_it_is(tmp_path: Path, clean_environment: Path) -> None:
    out = tmp_path / "out.jsonl"
    logged, shipped, samples = run(NAMED, str(NAMES), str(out), cwd=tmp_path)
    assert logged == shipped == 12 * NAMES
    assert isinstance(samples, list)
    for which in (0, 1):  # training, and the shipper
        assert samples[-1][which] - samples[4][which] < 3_000_000 + 100 * NAMES  # flat from the fourth turn on
    folder = folder_of(clean_environment)
    until(lambda: shipper_alive(folder) is None, 60)
    arrived = delivered(out)
    assert len(arrived) == len(set(arrived)) == 12 * NAMES
