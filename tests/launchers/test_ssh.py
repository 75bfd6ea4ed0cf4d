"""Training started over ssh: the session ends with it, the shipper outlives both, a lost connection loses no data.

Pattern: a real sshd on a free port of the loopback, with keys and configuration of its own, and OpenSSH's client. The
destination refuses until the session is over, so that the shipper has to outlive it. Limit: a minute a wait.
"""

from __future__ import annotations

import os
import pwd
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import command_of, is_alive, processes_of, stop
from tests.programs import written
from tests.shipping import until
from tests.sinks import HttpSink, Say
from tests.system import free_ports, system_program
from tracelet.spool.lease import shipper_alive

LIMIT_S = 60.0

TRAIN = """
import os, pathlib, sys, time, tracelet
exp = tracelet.start_logging(exp_name="job", project="ssh", run_id="run")
for i in range(1000):
    exp.log_metric("loss", 1 / (i + 1), iteration=i)
if sys.argv[1] == "go on":
    pathlib.Path("pid.new").write_text(str(os.getpid()))
    pathlib.Path("pid.new").rename("pid")
    while not pathlib.Path("cut").exists():  # once the connection is gone
        time.sleep(0.01)
    for i in range(1000, 2000):
        exp.log_metric("loss", 1 / (i + 1), iteration=i)
else:
    print("trained", flush=True)
tracelet.stop_logging()
"""

CONFIGURATION = """
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
PrintMotd no
PrintLastLog no
"""


class Server:
    """A running sshd that lets in who has started it."""

    def __init__(self, folder: Path) -> None:
        self._folder, (self.port,) = folder, free_ports(1)
        for name in ("host_key", "key"):
            subprocess.run(
                [system_program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True
            )
        (folder / "sshd_config").write_text(CONFIGURATION.format(port=self.port, folder=folder))
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # compiled in, empty; services make it at their start
        with (folder / "sshd.log").open("wb") as log:
            self.process = subprocess.Popen(
                [system_program("sshd"), "-D", "-e", "-f", str(folder / "sshd_config")],
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        until(self._answers, LIMIT_S)

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.said()
        with socket.socket() as asking:
            return asking.connect_ex(("127.0.0.1", self.port)) == 0

    def said(self) -> str:
        return (self._folder / "sshd.log").read_text()

    def command(self, *remote: str, options: tuple[str, ...] = ()) -> list[str]:
        """ssh with this command, which gets the variables of the test's own environment."""
        own = {
            "BatchMode": "yes",
            "IdentitiesOnly": "yes",
            "IdentityFile": str(self._folder / "key"),
            "UserKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "no",
            "LogLevel": "ERROR",
            "ControlPath": "none",
        }
        words = [word for name, value in own.items() for word in ("-o", f"{name}={value}")]
        login = f"{pwd.getpwuid(os.getuid()).pw_name}@127.0.0.1"
        return [
            system_program("ssh"), "-F", "none", *words, *options, "-p", str(self.port), login, shlex.join(remote)
        ]  # fmt: skip

    def sessions(self) -> list[int]:
        """The processes of sshd that serve its connections."""
        return _below(self.process.pid, "sshd")

    def close(self) -> None:
        stop([*self.sessions(), self.process.pid])
        self.process.wait(LIMIT_S)


def _below(pid: int, name: str) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [
        found
        for child in children
        if command_of(child).startswith(name) and is_alive(child)
        for found in (child, *_below(child, name))
    ]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    for name in ("sshd", "ssh", "ssh-keygen"):
        system_program(name)
    folder = tmp_path / "ssh"
    folder.mkdir()
    running = Server(folder)
    try:
        yield running
    finally:
        running.close()


def remote(tmp_path: Path, sink: HttpSink, *words: str) -> list[str]:
    """Training, as one would start it over ssh."""
    script = written(tmp_path, TRAIN)
    names = ("TRACELET_DIR", "PYTHONPATH", "PATH")
    variables = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    variables.append(f"OTEL_EXPORTER_OTLP_ENDPOINT={sink.url}")
    return ["env", "-C", str(tmp_path), *variables, sys.executable, str(script), *words]


def points(sink: HttpSink) -> list[int]:
    return [point.iteration for point in sink.points("run") if point.name == "loss"]


def shipper(spool: Path) -> int:
    """The run's shipper, once it is there."""
    found: list[int] = []

    def there() -> bool:
        found[:] = [pid for folder in spool.glob("run/*") if (pid := shipper_alive(folder)) is not None]
        return bool(found)

    until(there, LIMIT_S)
    return found[0]


@pytest.mark.parametrize("options", [(), ("-tt",)], ids=["pipes", "terminal"])
def test_a_session_ends_when_training_does_and_the_shipper_outlives_it(
    options: tuple[str, ...], server: Server, tmp_path: Path, clean_environment: Path, otlp_sink: HttpSink
) -> None:
    """`ssh host python train.py`; with a terminal, its end is also a SIGHUP."""
    otlp_sink.rule = lambda _: Say(503)
    done = subprocess.run(
        server.command(*remote(tmp_path, otlp_sink, "end"), options=options),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr + server.said()
    assert "trained" in done.stdout
    until(lambda: not server.sessions(), LIMIT_S)
    pid = shipper(clean_environment)
    assert otlp_sink.stored == []
    otlp_sink.rule = None
    until(lambda: otlp_sink.ends("run") == ["FINISHED"], LIMIT_S)
    assert points(otlp_sink) == list(range(1000))
    until(lambda: not is_alive(pid), LIMIT_S)


@contextmanager
def session(server: Server, command: list[str], *options: str) -> Iterator[subprocess.Popen[bytes]]:
    client = subprocess.Popen(
        server.command(*command, options=options),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield client
    finally:
        client.kill()
        client.wait()
        assert client.stdin is not None
        client.stdin.close()


def cut(server: Server, client: subprocess.Popen[bytes], who: str) -> None:
    """Let the connection be gone: one of its two ends is killed."""
    if who == "client":
        client.kill()
    else:
        for pid in server.sessions():
            os.kill(pid, signal.SIGKILL)
    until(lambda: not server.sessions(), LIMIT_S)
    client.wait(LIMIT_S)


@pytest.mark.parametrize("who", ["client", "server"])
@pytest.mark.parametrize("options", [(), ("-tt",)], ids=["pipes", "terminal"])
def test_a_connection_that_is_lost_while_training_goes_on_loses_no_data(
    options: tuple[str, ...], who: str, server: Server, tmp_path: Path, clean_environment: Path, otlp_sink: HttpSink
) -> None:
    """Without a terminal training goes on to its end. With one SIGHUP ends it, and the run is KILLED."""
    otlp_sink.rule = lambda _: Say(503)
    with session(server, remote(tmp_path, otlp_sink, "go on"), *options) as client:
        until(lambda: (tmp_path / "pid").exists(), LIMIT_S)
        training = int((tmp_path / "pid").read_text())
        pid = shipper(clean_environment)
        cut(server, client, who)
        if options:
            until(lambda: not is_alive(training), LIMIT_S)
        assert is_alive(pid)
        (tmp_path / "cut").touch()
        otlp_sink.rule = None
        until(lambda: otlp_sink.ends("run") == ["KILLED" if options else "FINISHED"], LIMIT_S)
    assert points(otlp_sink) == list(range(1000 if options else 2000))
    until(lambda: not processes_of(str(clean_environment)), LIMIT_S)
