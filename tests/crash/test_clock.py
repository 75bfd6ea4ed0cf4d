"""Clocks that jump between two attempts of one run: the newest attempt is the one that started last, not latest.

Pattern: real programs whose clock is moved before tracelet is imported; real shippers. Limit: two minutes each.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.programs import finished
from tests.servers import MlflowServer, rows_of, run_of
from tests.spooled import read
from tracelet.records import WriterOpened
from tracelet.spool import store

ATTEMPT = """
import sys, time
real, days, status = time.time_ns, int(sys.argv[1]), sys.argv[2]
time.time_ns = lambda: real() + days * 86_400 * 10**9
import tracelet
exp = tracelet.start_logging(exp_name=sys.argv[4], project="clock", backend=sys.argv[3], run_id=sys.argv[4])
exp.log_metric("loss", days, iteration=days)
exp.stop(status)
if sys.argv[3] == "mlflow":
    exp.flush(timeout=60)
"""


@pytest.mark.parametrize("days", [-1, 1])
def test_a_clock_that_jumped_a_day_between_two_attempts_lets_the_last_one_stand(
    tmp_path: Path, mlflow_server: MlflowServer, days: int
) -> None:
    run_id = f"clock{days}"
    for shift, status in ((0, "FAILED"), (days, "FINISHED")):
        done = finished(
            tmp_path, ATTEMPT, shift, status, "mlflow", run_id, limit_s=120, MLFLOW_TRACKING_URI=mlflow_server.uri
        )
        assert done.returncode == 0, done.stderr
    run = run_of(mlflow_server, run_id, project="clock", status="FINISHED", within_s=60)
    assert sorted(row.step for row in rows_of(mlflow_server, run.info.run_id, "loss")) == sorted([0, days])


def test_attempts_are_counted_over_a_restart_of_the_machine_and_other_hosts_that_share_the_folder(
    tmp_path: Path, clean_environment: Path
) -> None:
    before = clean_environment / "shared" / "other-host-0123456789ab"
    old = store.Manifest("shared", "p", "e", "r", host="other-host", boot_id="0123456789ab")
    for number in (0, 0, 2):  # two of a release that did not count
        key = f"{len(old.attempts):016x}"
        old = old.with_attempt(store.Attempt(key, time.time_ns(), 1, 0, number=number))
    store.update_manifest(before, lambda _: old)
    done = finished(tmp_path, ATTEMPT, -1, "FINISHED", "file", "shared", TRACELET_SHIPPER="off")
    assert done.returncode == 0, done.stderr
    (mine,) = [folder for folder in (clean_environment / "shared").iterdir() if folder != before]
    manifest = store.read_manifest(mine)
    assert manifest is not None
    assert [attempt.number for attempt in manifest.attempts] == [4]
    (order,) = [attempt.order for attempt in manifest.attempts]
    assert order == max(attempt.order for attempt in old.attempts) + 1  # whose clock says a day later
    assert [one.resource["tracelet.run.attempt.order"] for one in read(mine).of(WriterOpened)] == [order]
