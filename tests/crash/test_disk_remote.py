"""A spool on a file system over a network: what was logged arrives, by whichever machine, or is counted.

Pattern: real programs over sshfs, with an SFTP server behind a pipe: names, sizes and pages cached for seconds, no
locks of other machines, a write that is only promised until the flush. Another machine is a namespace with its own
name and boot id, and a mount of its own. Limit: a minute a program; the file some 40 s.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.disks import Sshfs, after_a_reboot, as_another_machine, disk, fill, overlay, sshfs, tmpfs
from tests.crash.test_kills import points_of
from tests.programs import finished, said, started
from tests.shipping import until
from tests.spooled import folder_of
from tracelet.spool.lease import shipper_alive
from tracelet.spool.store import read_manifest

LIVE = """
import sys, tracelet
exp = tracelet.start_logging(exp_name="remote", project="p", backend=tracelet.File(sys.argv[1]), run_id="remote")
exp.log_params({"lr": 0.1})
for i in range(2000):
    exp.log_metric("loss", i, iteration=i)
print(exp.flush(50), flush=True)
for i in range(2000, 2500):
    exp.log_metric("loss", i, iteration=i)
exp.stop()
"""


def status_of(folder: Path) -> str:
    manifest = read_manifest(folder)
    assert manifest is not None
    (attempt,) = manifest.attempts
    assert attempt.ended is not None
    return str(attempt.ended["status"])


def test_a_run_over_a_network_is_delivered_while_it_goes_on(tmp_path: Path) -> None:
    file, server = tmp_path / "out.jsonl", tmp_path / "server"
    server.mkdir()
    with sshfs(tmp_path / "mount", server) as mounted:
        done = finished(tmp_path, LIVE, file, TRACELET_DIR=str(mounted.at / "spool"))
        assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
        folder = folder_of(mounted.at / "spool")
        until(lambda: shipper_alive(folder) is None, 60)
        assert status_of(folder) == "FINISHED"
    assert points_of(file)["remote"] == Counter(range(2500))


FAR = """
import sys, tracelet
exp = tracelet.start_logging(exp_name="remote", project="p", backend=tracelet.File(sys.argv[1]), run_id="remote",
                             shipper="off")
i = 0
while sys.stdin.readline() == "go\\n":
    for i in range(i, i + 50):  # less than a page: a reader has met each of them half empty
        exp.log_metric("loss", i, iteration=i)
    i += 1
    exp.set_tags({"at": str(i)})
    print(i, flush=True)
exp.stop()
"""


def arrived(file: Path) -> Counter[int]:
    """How often each iteration stands in the destination so far."""
    return points_of(file).get("remote", Counter()) if file.exists() else Counter()


def test_another_machine_that_follows_over_a_mount_of_its_own_sees_all_of_it_and_the_end(tmp_path: Path) -> None:
    file, server, log = tmp_path / "out.jsonl", tmp_path / "server", tmp_path / "follow.log"
    (server / "spool").mkdir(parents=True, mode=0o700)
    with sshfs(tmp_path / "node", server) as node, sshfs(tmp_path / "login", server) as login:
        command = [sys.executable, "-m", "tracelet", "ship", "--follow", "--dir", str(login.at / "spool")]
        with (
            open(log, "w") as output,
            started(tmp_path, FAR, file, TRACELET_DIR=str(node.at / "spool")) as program,
            subprocess.Popen(as_another_machine(tmp_path, "login", *command), stdout=output, stderr=output) as follower,
        ):
            assert program.stdin is not None
            try:
                for _ in range(3):  # what was logged is seen, while the program waits and writes nothing more
                    program.stdin.write("go\n")
                    program.stdin.flush()
                    logged = int(said(program))
                    until(lambda logged=logged: len(arrived(file)) == logged, 60)
                program.stdin.close()
                assert program.wait(60) == 0
                until(lambda: "over, and delivered" in log.read_text(), 60)
            finally:
                follower.send_signal(signal.SIGTERM)
                follower.wait(60)
        assert status_of(folder_of(server / "spool")) == "FINISHED"
    assert arrived(file) == Counter(range(150))


COUNTED = """
import json, sys, time, tracelet
exp = tracelet.start_logging(exp_name="remote", project="p", backend=tracelet.File(sys.argv[1]), run_id="remote",
                             shipper="off")
for i in range(500):
    exp.log_metric("loss", i, iteration=i)
print("ready", flush=True)
sys.stdin.readline()
until = time.monotonic() + 3  # what was only promised is asked for once a second
while time.monotonic() < until:
    for _ in range(20):
        i += 1
        exp.log_metric("loss", i, iteration=i)
    time.sleep(0.002)
failed = ""
try:
    exp.flush(0)
except tracelet.SpoolError as error:
    failed = str(error)
exp.stop()
print(json.dumps([i + 1, exp.stats.logged, exp.stats.refused - exp._run.refused_records, failed]), flush=True)
"""


def counted(tmp_path: Path, file: Path, mounted: Sshfs, fault: Callable[[], object]) -> tuple[int, int, int, str]:
    """What the program counted when this happened to its disk."""
    with started(tmp_path, COUNTED, file, TRACELET_DIR=str(mounted.at / "spool")) as program:
        assert said(program) == "ready"
        fault()
        assert program.stdin is not None
        program.stdin.write("go\n")
        program.stdin.flush()
        steps, logged, refused, failed = json.loads(said(program))
        assert program.wait(60) == 0
    return steps, logged, refused, failed


def test_a_disk_that_is_said_to_be_full_only_at_the_flush_costs_what_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    with tmpfs(tmp_path / "server", "1m") as server, sshfs(tmp_path / "mount", server) as mounted:
        steps, logged, refused, failed = counted(tmp_path, file, mounted, lambda: fill(server / "ballast"))
        assert "could not be flushed to the disk" in failed
        assert logged + refused >= steps  # an upper bound: of what is in doubt some may be there, and some is no point
        assert refused > 0
        shutil.copytree(server / "spool", tmp_path / "rescued")
    done = after_a_reboot(tmp_path, "ship", "--dir", str(tmp_path / "rescued"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(arrived(file).values()) == {1}
    assert len(arrived(file)) >= logged


def test_a_run_whose_disk_is_unmounted_under_it_counts_what_was_there_and_goes_on_in_what_is_left(
    tmp_path: Path,
) -> None:
    file, server = tmp_path / "out.jsonl", tmp_path / "server"
    server.mkdir()
    with sshfs(tmp_path / "mount", server) as mounted:
        steps, logged, refused, _ = counted(tmp_path, file, mounted, mounted.lose_connection)
        assert logged + refused == steps
        assert refused >= 500
        left = mounted.at / "spool"
        if left.exists():  # sshfs has left its folder behind, in which the run went on
            done = after_a_reboot(tmp_path, "ship", "--dir", str(left))
            assert done.returncode == 0, done.stdout + done.stderr
            assert set(arrived(file).values()) == {1}
        assert len(arrived(file)) == logged


@pytest.mark.parametrize("kind", ["btrfs", "xfs", "overlay"])
def test_a_whole_run_on_any_file_system_arrives(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "out.jsonl"
    with overlay(tmp_path / "disk") if kind == "overlay" else disk(tmp_path / "disk", kind) as there:
        spool = Path(getattr(there, "at", there)) / "spool"
        done = finished(
            tmp_path, LIVE.replace("2000", "40_000").replace("2500", "80_000"), file, TRACELET_DIR=str(spool)
        )
        assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
        folder = folder_of(spool)
        until(lambda: shipper_alive(folder) is None, 60)
        assert status_of(folder) == "FINISHED"
    assert arrived(file) == Counter(range(80_000))
