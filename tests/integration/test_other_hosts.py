"""Folders of another host, or of another user: what `tracelet ship`, `runs` and a shipper make of them.

The other host is a copy of the folder under another host's name and boot: files that change no lock here can show
anything of, which is what a shared file system without locks looks like.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.test_cli_ship import tracelet, train, training
from tests.programs import said_until
from tests.shipping import until
from tests.sinks import HttpSink, attributes
from tests.stack.harness import is_running
from tests.system import place, system_program
from tracelet.cli import ship
from tracelet.cli.main import main
from tracelet.spool import home, store

OTHER = "0123456789ab"


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def as_of_another_host(spool: Path, run_id: str, to: Path) -> Path:
    """The run's folder as another host would have written it; its locks stay behind."""
    (source,) = (spool / run_id).iterdir()
    target = to / run_id / f"node7-{OTHER}"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("shipper.l*", home.LEASE))
    os.chmod(to, 0o700)
    store.update_manifest(target, lambda one: dataclasses.replace(one, host="node7", boot_id=OTHER))  # type: ignore[type-var]
    return target


def state(to: Path) -> str:
    done = tracelet("runs", "--json", "--dir", str(to))
    (run,) = json.loads(done.stdout)
    return str(run["state"])


def has_ended_as(sink: HttpSink, run_id: str, status: str) -> bool:
    """Whether the destination has heard of one end, and of the root span that is one: both say this status."""
    roots = [span for span in sink.spans() if span.name == "run digits"]
    told = [(attributes(root)["tracelet.run.state"], root.status.code) for root in roots]
    return sink.ends(run_id) == [status] and told == [(status, 0 if status == "FINISHED" else 2)]


@pytest.fixture
def shared(tmp_path: Path, clean_environment: Path, otlp_sink: HttpSink) -> Iterator[Path]:
    """A spool in which another host's program goes on, or so it looks from here: it has written no END."""
    with training("far", 1000, TRACELET_SHIPPER="off", OTEL_EXPORTER_OTLP_ENDPOINT=otlp_sink.url):
        as_of_another_host(clean_environment, "far", tmp_path / "shared")
        yield tmp_path / "shared"


def test_a_run_that_may_go_on_elsewhere_is_delivered_and_not_ended(shared: Path, otlp_sink: HttpSink) -> None:
    assert state(shared) == "RUNNING"
    done = tracelet("ship", "far", "--dir", str(shared))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "node7 wrote it, and nothing tells from here whether it goes on" in done.stdout
    assert len([p for p in otlp_sink.points() if p.name == "loss"]) == 1000
    assert not list(otlp_sink.spans())  # the root span is the end
    assert state(shared) == "RUNNING"


def test_whoever_knows_that_it_is_dead_ends_it_with_assume_dead(shared: Path, otlp_sink: HttpSink) -> None:
    done = tracelet("ship", "far", "--assume-dead", "--dir", str(shared))
    assert done.returncode == 0, done.stdout + done.stderr
    assert state(shared) == "KILLED"
    assert has_ended_as(otlp_sink, "far", "KILLED")
    assert len([p for p in otlp_sink.points() if p.name == "loss"]) == 1000


def test_assume_dead_wants_a_name_and_ends_nobody_who_is_seen_alive(
    otlp_sink: HttpSink, clean_environment: Path
) -> None:
    assert tracelet("ship", "--assume-dead").returncode == 2
    with training("near", 10, TRACELET_SHIPPER="off", OTEL_EXPORTER_OTLP_ENDPOINT=otlp_sink.url):
        done = tracelet("ship", "near", "--assume-dead")
        assert "it goes on" in done.stdout
        assert state(clean_environment) == "RUNNING"


def test_three_missed_leases_end_a_run_and_a_kept_one_does_not(
    shared: Path, otlp_sink: HttpSink, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(home, "MISSED_S", 1.0)
    monkeypatch.setattr(ship, "GIVE_UP_S", 60.0)
    folder = shared / "far" / f"node7-{OTHER}"
    now = [0.0]
    beat = home.Beat(folder, clock=lambda: now[0])
    beat.renew()
    assert state(shared) == "RUNNING"
    real = home.Watch.is_missed
    looks = []

    def missed(watch: home.Watch) -> bool:
        looks.append(watch.lease)
        if len(looks) < 30:  # it is renewed for a while
            now[0] += home.RENEW_S
            beat.renew()
        return real(watch)

    monkeypatch.setattr(home.Watch, "is_missed", missed)
    assert main(["ship", "far", "--dir", str(shared)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"the shipper on \S+ gave a sign of life .* ago; watching for the next", said)
    assert len({lease.beat for lease in looks if lease is not None}) > 5
    assert state(shared) == "KILLED"
    assert has_ended_as(otlp_sink, "far", "KILLED")
    assert len([p for p in otlp_sink.points() if p.name == "loss"]) == 1000


def test_an_end_that_was_written_elsewhere_is_an_end_here(
    tmp_path: Path, clean_environment: Path, otlp_sink: HttpSink
) -> None:
    """A cluster without outgoing network: the job has ended on its node, the login node ships."""
    train("done", 2000, OTEL_EXPORTER_OTLP_ENDPOINT=otlp_sink.url)
    as_of_another_host(clean_environment, "done", tmp_path / "shared")
    assert state(tmp_path / "shared") == "ended, not delivered"
    done = tracelet("ship", "--dir", str(tmp_path / "shared"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert state(tmp_path / "shared") == "FINISHED"
    assert has_ended_as(otlp_sink, "done", "FINISHED")
    assert len([p for p in otlp_sink.points() if p.name == "loss"]) == 2000


def test_a_run_of_this_host_before_its_last_start_is_dead(
    tmp_path: Path, clean_environment: Path, otlp_sink: HttpSink
) -> None:
    with training("before", 100, TRACELET_SHIPPER="off", OTEL_EXPORTER_OTLP_ENDPOINT=otlp_sink.url):
        target = as_of_another_host(clean_environment, "before", tmp_path / "shared")
    store.update_manifest(target, lambda one: dataclasses.replace(one, host=store.host_name()))  # type: ignore[type-var]
    done = tracelet("ship", "before", "--dir", str(tmp_path / "shared"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert state(tmp_path / "shared") == "KILLED"
    assert has_ended_as(otlp_sink, "before", "KILLED")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_is_told_whose_the_folder_is(tmp_path: Path, clean_environment: Path, otlp_sink: HttpSink) -> None:
    """Root ships what belongs to uid 12345: refused by name, before it writes anything the owner could not read."""
    train("theirs", 10, OTEL_EXPORTER_OTLP_ENDPOINT=otlp_sink.url)
    (folder,) = (clean_environment / "theirs").iterdir()
    for path in (clean_environment, *clean_environment.rglob("*")):
        os.chown(path, 12345, 12345)
    before = sorted(path.name for path in folder.iterdir())
    done = tracelet("ship")
    assert done.returncode == 1
    assert "belongs to user 12345, and this process runs as user 0 (root)" in done.stdout + done.stderr
    assert "under one user id" in done.stdout + done.stderr
    assert sorted(path.name for path in folder.iterdir()) == before
    with subprocess.Popen(
        [sys.executable, "-m", "tracelet", "ship", "--follow"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as followed:
        limit = threading.Timer(60.0, followed.kill)
        limit.start()
        assert followed.stdout is not None
        said_until(followed, "under one user id")
        followed.send_signal(signal.SIGTERM)
        followed.stdout.read()
    limit.cancel()
    assert followed.returncode == 1


@pytest.mark.parametrize("closed", ["spool", "run"])
def test_a_user_who_may_not_even_look_into_anothers_folder_is_told_whose_it_is(
    clean_environment: Path, otlp_sink: HttpSink, closed: str
) -> None:
    """Two containers of a pod under two uids: one's folders are 0700, and the other one is nobody special."""
    with place() as at:
        spool = at.folder / "spool"
        train("theirs", 10, OTEL_EXPORTER_OTLP_ENDPOINT=otlp_sink.url, TRACELET_DIR=str(spool))
        for path in (spool, *spool.rglob("*")):
            os.chown(path, 12345, 12345)
        if closed == "run":
            spool.chmod(0o777)  # a volume that is everybody's
        else:
            assert spool.stat().st_mode & 0o777 == 0o700
        other = [system_program("setpriv"), "--reuid=12346", "--regid=12346", "--clear-groups"]
        command = at.inside(*other, str(at.programs / "tracelet"))
        # The working folder is root's, and closed to it as well.
        environ = {"TRACELET_DIR": str(spool), "HOME": str(at.folder)}
        for words in (["ship"], ["ship", "--follow"]):  # which has nothing to follow, and leaves by itself
            done = subprocess.run(
                [*command, *words],
                env={**os.environ, **environ}, capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            assert "belongs to user 12345, and this process runs as user 12346" in done.stderr
            assert "under one user id" in done.stderr
            assert "Traceback" not in done.stderr
            assert done.returncode == 1
        assert otlp_sink.requests == []


def test_a_shipper_whose_folder_is_deleted_says_so_and_leaves(
    tmp_path: Path, clean_environment: Path, otlp_sink: HttpSink
) -> None:
    with training("gone", 1000, OTEL_EXPORTER_OTLP_ENDPOINT=otlp_sink.url):
        folder = until(lambda: next((clean_environment / "gone").iterdir(), None))
        until(lambda: len([p for p in otlp_sink.points() if p.name == "loss"]) == 1000)
        pid = until(lambda: _shipper_pid(folder))
        log = os.open(folder / "shipper.log", os.O_RDONLY)
        shutil.rmtree(clean_environment / "gone")
        until(lambda: not is_running(pid), 30)
        assert b"was deleted while its run was being shipped" in os.read(log, 1 << 20)
        os.close(log)
        assert not (clean_environment / "gone" / folder.name / "delivered").exists()


def _shipper_pid(folder: Path) -> int | None:
    from tracelet.spool.lease import shipper_alive

    return shipper_alive(folder)
