"""A run's folder deleted under it: what is lost is counted and said, and what is logged from then on arrives.

Pattern: a real program with a real shipper whose folder goes away by `rm -rf` at a moment of the run.
Limit: 60 s a program; the file some 15 s.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash.test_disk_full import delivered
from tests.shipping import until
from tests.spooled import folder_of, read
from tracelet.records import ParamsLogged
from tracelet.spool.lease import shipper_alive
from tracelet.spool.store import read_manifest

PROGRAM = """
import json, os, pathlib, shutil, sys
import tracelet
out, moment, what = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
step = 0

def log(count):
    global step
    for _ in range(count):
        step += 1
        exp.log_metric("loss", float(step), iteration=step)

def at(now):
    if moment != now:
        return
    shutil.rmtree(folder if what == "run" else os.environ["TRACELET_DIR"])

exp = tracelet.start_logging(exp_name="deleted", project="p", backend=tracelet.File(str(out)))
log(5000)
assert exp.flush(20)
assert exp.stats.shipped == 5000
folder = exp._run.folder
from tracelet.spool.lease import shipper_alive
print(shipper_alive(folder))
at("between flush and roll")
log(55_000)
at("in a later segment")
log(1000)
exp.log_params({"lr": 0.1})
seen = exp.stats
log(1000)
at("before stop")
exp.stop()
counts = exp.stats
print(json.dumps([step, counts.logged, counts.refused, counts.waiting, seen.refused]))
"""


@pytest.mark.parametrize("what", ["run", "everything"])
@pytest.mark.parametrize("moment", ["between flush and roll", "in a later segment", "before stop"])
def test_a_folder_deleted_under_the_run_is_counted_said_and_made_anew(
    tmp_path: Path, clean_environment: Path, moment: str, what: str
) -> None:
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-c", PROGRAM, str(out), moment, what]
    environ = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    old, told = done.stdout.splitlines()
    try:
        step, logged, refused, waiting, seen = json.loads(told)
        assert logged + refused == step
        assert "was deleted under the run" in done.stderr
        if moment != "before stop":
            assert seen > 0
        folder = folder_of(clean_environment)
        until(lambda: shipper_alive(folder) is None, 30)
        arrived = [iteration for _, iteration in delivered(out)]
        assert len(set(arrived)) == len(arrived)
        assert len(arrived) >= logged  # what the old shipper still read of the deleted files is a gift
        assert arrived[:5000] == list(range(1, 5001))
        if moment != "before stop":
            assert arrived[-1] == step
        assert waiting == 0 or "goes on in the background" in done.stderr
        manifest = read_manifest(folder)
        assert manifest is not None
        assert [one.ended and one.ended["status"] for one in manifest.attempts] == ["FINISHED"]
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has seen that its folder is gone, and left
            os.kill(int(old), 9)


WORKERS = """
import json, os, shutil, tracelet
exp = tracelet.start_logging(exp_name="deleted", project="p", backend="file", shipper="off")
exp.log_metric("loss", 1.0, iteration=1)

def worker():
    if os.fork() == 0:
        for i in range(10):
            exp.log_metric("worker", float(i), iteration=i)
        print(json.dumps([exp.stats.logged, exp.stats.refused]), flush=True)
        os._exit(0)
    os.wait()

shutil.rmtree(exp._run.folder)
worker()
exp.log_params({"lr": 0.1})
worker()
exp.stop()
print(json.dumps([exp.stats.logged, exp.stats.refused]))
"""


def test_a_worker_process_leaves_a_deleted_folder_to_the_runs_own_to_make_anew(
    tmp_path: Path, clean_environment: Path
) -> None:
    command = [sys.executable, "-c", WORKERS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[0, 10], [10, 0], [0, 1]]
    found = read(folder_of(clean_environment))
    assert sorted(found.roles()) == ["child", "first"]
    assert found.values("worker") == [(i, float(i)) for i in range(10)]
    assert found.of(ParamsLogged)[0].params == {"lr": 0.1}
