"""Folders that can't be written: at the start a SpoolError, under the run a count, never a signal or an exception.

Pattern: real file systems (read-only, full, one that turns read-only after an error), real limits (RLIMIT_FSIZE), a
process without the rights of root. Limit: 60 s a program; the file some 20 s.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash.disks import ext, fill, tmpfs
from tests.crash.test_disk_full import check, run, settled
from tests.spooled import folder_of, read
from tracelet.records import ParamsLogged, WriterEnded
from tracelet.spool.lease import shipper_alive
from tracelet.spool.store import read_manifest

START = """
import sys, tracelet
try:
    tracelet.start_logging(exp_name="refused", project="p", backend="file", shipper="off", dir=sys.argv[1])
except tracelet.SpoolError as error:
    print(type(error).__name__, "|", error)
else:
    print("started")
"""

UNPRIVILEGED = ("setpriv", "--inh-caps=-all", "--bounding-set=-all")
"""Still uid 0, so the interpreter can be run wherever it lies, but bound by modes like anybody else."""


def started(folder: Path, *prefix: str) -> str:
    command = [*prefix, sys.executable, "-c", START, str(folder)]
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_start_on_a_read_only_disk_is_a_spool_error(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert started(disk / "spool").startswith("SpoolError | the spool folder")


def test_a_start_on_a_full_disk_is_a_spool_error(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "1m") as disk:
        (disk / "spool").mkdir()
        fill(disk / "ballast")
        assert started(disk / "spool").startswith("SpoolFull | ")


@pytest.mark.parametrize("where", ["/proc/spool", "file/spool"])
def test_a_start_where_no_folder_can_be_is_a_spool_error(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-c", START, where]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("SpoolError | the spool folder"), done.stderr


def test_a_start_without_permission_is_a_spool_error(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir(mode=0o500)
    assert started(tmp_path / "spool", *without_privileges()).startswith("SpoolError | ")


def without_privileges() -> tuple[str, ...]:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv, to give root's rights away")
    return UNPRIVILEGED


UNDER_WAY = """
import json, os, pathlib, sys, tracelet
from tracelet.spool.store import usage
exp = tracelet.start_logging(exp_name="refused", project="p", backend="file", shipper="off")
exp.log_params({"before": 1})
for i in range(1000):
    exp.log_metric("loss", float(i), iteration=i)
folder = exp._run.folder
how = sys.argv[1]
if how == "mode":
    os.chmod(folder, 0o500)
elif how == "error":
    os.sync()
    pathlib.Path(sys.argv[2]).write_text("made by a test")
for i in range(1000, 100_000):
    exp.log_metric("loss", float(i), iteration=i)
exp.log_metric("new", 1.0, iteration=1)
exp.log_params({"after": 1})
points_refused = exp.stats.refused - exp._run.refused_records
print(json.dumps([exp.stats.logged, points_refused]), flush=True)
exp.stop()
"""


def under_way(tmp_path: Path, spool: Path, *arguments: str, prefix: tuple[str, ...] = ()) -> tuple[int, int, str]:
    command = [*prefix, sys.executable, "-c", UNDER_WAY, *arguments]
    environ = {**os.environ, "TRACELET_DIR": str(spool)}
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    logged, refused = json.loads(done.stdout)
    return logged, refused, done.stderr


def test_a_folder_that_loses_its_permission_costs_what_needs_a_new_file(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    logged, refused, said = under_way(tmp_path, spool, "mode", prefix=without_privileges())
    folder = folder_of(spool)
    os.chmod(folder, 0o700)
    found = read(folder)
    assert len(found.points) == logged
    assert logged + refused == 100_001
    assert logged > 30_000  # to the segment's end
    assert "can't be written (Permission denied)" in said
    assert found.of(WriterEnded)[0].status == "FINISHED"  # its room was there all the time


def test_a_file_system_that_turns_read_only_neither_kills_training_nor_takes_what_was_logged(tmp_path: Path) -> None:
    with ext(tmp_path / "disk", "ext4", 64) as disk:
        device = os.stat(disk).st_dev
        name = os.path.basename(os.readlink(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"))
        trigger = Path(f"/sys/fs/ext4/{name}/trigger_fs_error")
        if not trigger.exists():
            pytest.skip("this kernel makes no ext4 error to order")
        subprocess.run(["mount", "-o", "remount,errors=remount-ro", str(disk)], check=True)
        logged, refused, said = under_way(tmp_path, disk / "spool", "error", str(trigger))
        assert "ead-only file system" in said
        assert logged + refused == 100_001
        shutil.copytree(disk / "spool", tmp_path / "rescued")  # what `tracelet ship` can be pointed at
    found = read(folder_of(tmp_path / "rescued"))
    assert len(found.points) == logged
    assert [set(record.params) for record in found.of(ParamsLogged)] == [{"before"}]


def test_a_limit_on_file_sizes_costs_nothing_where_a_segment_fits(tmp_path: Path, clean_environment: Path) -> None:
    counted, said = run(tmp_path, clean_environment, "never", prefix=("prlimit", "--fsize=1200000"))
    assert counted[2] == counted[3] == 0
    # The shipper inherited the limit, and its destination is a longer file: it waits. Another one delivers the rest.
    shipper = shipper_alive(folder_of(clean_environment))
    assert shipper is not None
    os.kill(shipper, signal.SIGKILL)
    assert settled(clean_environment)["status"] == "FINISHED"
    check(tmp_path, counted, said)


def test_a_limit_on_file_sizes_under_a_segments_is_counted_and_said(tmp_path: Path, clean_environment: Path) -> None:
    counted, said = run(
        tmp_path, clean_environment, "never", prefix=("prlimit", "--fsize=200000"), TRACELET_SHIPPER="off"
    )
    assert counted[1] == 0
    assert counted[2] - counted[3] == counted[0] + 1
    assert "has no room (File too large)" in said
    assert read_manifest(folder_of(clean_environment)) is not None
