"""A real SLURM for tests: munged, slurmctld and two slurmd on this machine, with all that they need in one folder.

Jobs are an ordinary user's, the daemons root's, as on a cluster. What is not as there: both nodes are this machine, and
nothing is accounted. A job's processes are held together by a cgroup where this machine has the freezer of cgroups'
first version (the second one's plugin wants systemd), else by their parents, which a shipper of an ended program slips.
"""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import stop
from tests.sinks import until
from tests.system import Place, free_ports, place, system_program

__all__ = ["LIMIT_S", "Cluster", "cluster"]

LIMIT_S = 120.0
"""How long anything may take: a scheduler looks every few seconds, and at time limits every 30 s."""

USER = "nobody"  # is on every system, and owns nothing
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "scancel", "sinfo", "setpriv", "unshare")
FREEZER = Path("/sys/fs/cgroup/freezer")
_OVER = ("CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", "BOOT_FAIL", "DEADLINE")

CONFIGURATION = """
ClusterName=cluster
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/slurmd-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
Epilog={folder}/epilog
ProctrackType=proctrack/{track}
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
NodeName={nodes[0]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=64 RealMemory=1000
NodeName={nodes[1]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=64 RealMemory=1000
PartitionName=main Nodes={nodes[0]},{nodes[1]} Default=YES State=UP
"""


class Cluster:
    """A running cluster; `work` is its user's folder, `spool` where the runs of its jobs wait."""

    def __init__(self, at: Place) -> None:
        self.place, self.folder = at, at.folder
        self.user = pwd.getpwnam(USER)
        self.work = at.owned("work", self.user)
        self.spool = at.owned("scratch", self.user) / "tracelet"  # as /scratch/$USER/tracelet
        self.conf = at.folder / "slurm.conf"
        ports = free_ports(3)
        self.nodes = [f"node-{port}" for port in ports[1:]]  # cgroups are called by them, in the whole machine
        self.holds_jobs = os.access(FREEZER, os.W_OK)
        (at.folder / "state").mkdir()
        for node in self.nodes:
            (at.folder / f"slurmd-{node}").mkdir()
        track = "cgroup" if self.holds_jobs else "linuxproc"
        self.conf.write_text(CONFIGURATION.format(folder=at.folder, ports=ports, nodes=self.nodes, track=track))
        cgroups = f"CgroupMountpoint={FREEZER.parent}\nCgroupAutomount=no\nCgroupPlugin=cgroup/v1\n"
        (at.folder / "cgroup.conf").write_text(cgroups)
        # On a node the user has a home.
        users = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith(f"{USER}:")]
        passwd = at.folder / "passwd"
        passwd.write_text(
            "\n".join([*users, f"{USER}:x:{self.user.pw_uid}:{self.user.pw_gid}::{self.work}:/bin/sh", ""])
        )
        passwd.chmod(0o644)
        at.stands_at(Path("/etc/passwd"), passwd)
        epilog, self._wait = at.folder / "epilog", at.folder / "epilog-waits"
        # What a site writes into its copy of the file.
        epilog.write_text(
            f"#!/bin/sh\nwhile [ -e '{self._wait}' ]; do sleep 0.1; done\n"
            f"export SPOOL='{self.spool}' PROGRAMS='{at.programs}:/usr/bin:/bin'\n"
            f"exec /bin/bash '{at.folder}/project/examples/slurm/epilog.sh' >>'{at.folder}/epilog.log' 2>&1\n"
        )
        epilog.chmod(0o755)
        key = at.folder / "munge.key"
        key.touch(mode=0o400)
        key.write_bytes(os.urandom(1024))
        self._started: list[subprocess.Popen[bytes]] = []
        self._numbered = 0

    # ---- the daemons

    def start(self) -> None:
        named = {name: f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")}
        self._daemon("munged", "--foreground", f"--socket={self.folder}/munge.socket", *named.values())
        self._comes(lambda: (self.folder / "munge.socket").exists())
        self._daemon("slurmctld", "-D", "-c")
        for node in self.nodes:
            self._daemon("slurmd", "-D", "-N", node, inside=True)
        self._comes(lambda: self._run("sinfo", "-h", "-N", "-o", "%T", check=False).split() == ["idle", "idle"])

    def _comes(self, condition: Callable[[], bool]) -> None:
        try:
            until(condition, LIMIT_S)
        except AssertionError:
            raise AssertionError((self.folder / "daemons.log").read_text()) from None

    def _daemon(self, name: str, *words: str, inside: bool = False) -> None:
        command = [system_program(name), *words]
        with (self.folder / "daemons.log").open("ab") as log:
            self._started.append(
                subprocess.Popen(
                    self.place.inside(*command) if inside else command,
                    env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "SLURM_CONF": str(self.conf)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            )

    def stop(self) -> None:
        self.epilog_goes_on()
        if self._started:
            self._run("scancel", "--full", "--signal=KILL", "--user", USER, check=False)
            self._run("scancel", "--user", USER, check=False)
        for daemon in reversed(self._started):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        stop(self.processes())
        if self.holds_jobs:
            for node in self.nodes:
                self._remove(FREEZER / f"slurm_{node}")

    def _remove(self, cgroup: Path) -> None:
        """A cgroup with those below it; empty, since nothing is left of the jobs."""
        if cgroup.exists():
            for below in filter(Path.is_dir, cgroup.iterdir()):
                self._remove(below)
            until(lambda: _rmdir(cgroup), LIMIT_S)

    def processes(self) -> list[int]:
        """All that jobs have left: whatever has this cluster's configuration in its environment."""
        mark = os.fsencode(f"SLURM_CONF={self.conf}")
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "environ").read_bytes().split(b"\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except (OSError, IndexError):
                continue
            if mark in words and state != "Z" and int(entry.name) not in {one.pid for one in self._started}:
                found.append(int(entry.name))
        return found

    # ---- what a user does

    def submit(self, script: Path | str, *words: str, options: tuple[str, ...] = (), **variables: str) -> str:
        """The id of a job that the user submits, in a folder of its own (`at`)."""
        self._numbered += 1
        folder = self.place.owned(f"work/{self._numbered}", self.user)
        path = folder / "job.sh"
        path.write_text(script.read_text() if isinstance(script, Path) else f"#!/bin/bash\n{script}")
        for each in self.work.glob("*.py"):
            (folder / each.name).symlink_to(each)
        job = self._run(
            "sbatch", "--parsable", "--output=out", *options, str(path), *words, folder=folder, variables=variables
        ).strip()
        (self.work / f"job-{job}").symlink_to(folder)
        return job

    def at(self, job: str) -> Path:
        """Where a job runs."""
        return (self.work / f"job-{job}").resolve()

    def output(self, job: str) -> str:
        """What it has printed."""
        out = self.at(job) / "out"
        return out.read_text() if out.exists() else ""

    def facts(self, job: str) -> dict[str, str]:
        """What SLURM says of a job, by SLURM's own names."""
        words = self._run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def until(self, job: str, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds; a job that is over before that, or too slow, is shown with SLURM's log."""
        late = time.monotonic() + LIMIT_S
        while not condition():
            over = self.facts(job)["JobState"] in _OVER
            if not (over and not condition()) and time.monotonic() < late:
                time.sleep(0.1)
                continue
            raise AssertionError(self._state(job, job))

    def ended(self, job: str, of: str | None = None) -> dict[str, str]:
        """The facts of a job that is over, its epilog too; of a task of the array `of`."""
        try:
            until(lambda: self.facts(job)["JobState"] in _OVER, LIMIT_S)
        except AssertionError:
            raise AssertionError(self._state(job, of or job)) from None
        return self.facts(job)

    def _state(self, job: str, of: str) -> str:
        log = (self.folder / "slurmctld.log").read_text().splitlines()[-20:]
        return "\n".join([str(self.facts(job)), self.output(of), *log])

    # ---- what its operator does

    def epilog_waits(self) -> None:
        """Let the epilogs of jobs that end wait."""
        self._wait.touch()

    def epilog_goes_on(self) -> None:
        self._wait.unlink(missing_ok=True)

    def epilog_said(self) -> str:
        return (self.folder / "epilog.log").read_text()

    def scontrol(self, *words: str) -> None:
        self._run("scontrol", *words)

    def scancel(self, *words: str) -> None:
        self._run("scancel", *words, as_user=True)

    def _run(
        self,
        program: str,
        *words: str,
        folder: Path | None = None,
        variables: Mapping[str, str] | None = None,
        check: bool = True,
        as_user: bool = False,
    ) -> str:
        """A command of SLURM: root's, or the user's if it has variables."""
        command = [system_program(program), *words]
        if variables is not None or as_user:
            ids = (f"--reuid={self.user.pw_uid}", f"--regid={self.user.pw_gid}", "--clear-groups")
            command = [system_program("setpriv"), *ids, *command]
        done = subprocess.run(
            command,
            cwd=folder or self.folder,
            env={
                "PATH": f"{self.place.programs}:/usr/bin:/bin",
                "HOME": str(self.work),
                "USER": USER,
                "SLURM_CONF": str(self.conf),
                "TRACELET_DIR": str(self.spool),
                **(variables or {}),
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_S,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout


def _rmdir(cgroup: Path) -> bool:
    try:
        cgroup.rmdir()
    except OSError:
        return False  # the kernel is not done with a process yet
    return True


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster with two idle nodes; skips the test where its programs are not there."""
    for name in PROGRAMS:
        system_program(name)
    with place() as at:
        made = Cluster(at)
        try:
            made.start()
            yield made
        finally:
            made.stop()
