"""Starts programs, waits until each answers, keeps `stack.json`, starts one again when asked, and stops them all.

The programs are children of this process and die with it: by SIGTERM in order, and, on Linux, also when it is killed
(each child asked the kernel for a SIGTERM at its parent's death). One that dies by itself brings down no other.
`restart` runs in another process; it leaves a request in DIR/requests, which is looked at ten times a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stack_programs import StackError, say

POLL_S = 0.1
START_LIMIT_S = 180.0
STOP_LIMIT_S = 15.0
SECRET_WORDS = ("TOKEN", "PASSWORD", "SECRET", "KEY", "CREDENTIAL")
# What a person may have set for other things: a stack is started the same way everywhere.
NOT_INHERITED = ("TRACELET_", "OTEL_", "MLFLOW_", "PG", "KAFKA_", "JAVA_", "GIN_")
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@dataclass(frozen=True)
class Service:
    """One program to run: how, where, what it needs first, and how one sees that it serves."""

    name: str
    argv: Sequence[str]
    folder: Path
    environment: Mapping[str, str]  # on top of what is inherited
    answers: Callable[[], bool]
    needs: tuple[str, ...] = ()
    stop_round: int = 1  # the lower ones are stopped, and gone, first
    stop_signal: int = signal.SIGTERM
    user: tuple[int, int] | None = None  # uid and gid, where it must not run as root


class Stopped(Exception):
    """SIGTERM, SIGINT or SIGHUP came."""


@dataclass
class Supervisor:
    """All programs of one `up`, from the first start to the last stop."""

    folder: Path
    services: Mapping[str, Service]
    addresses: Mapping[str, Any]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    noticed: set[int] = field(default_factory=set)  # pids whose death was told
    stopping: bool = False

    # ---- the life of a stack

    def run(self, on_ready: Callable[[], None]) -> None:
        """Start all, call `on_ready`, serve until SIGTERM, SIGINT or SIGHUP, stop all.

        Raises:
            StackError: another stack runs in the folder, or a program did not come up (all are stopped then).
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # SIGHUP: the terminal went
            signal.signal(number, self._on_signal)
        with locked(self.folder):
            try:
                self._clear_requests()
                self.start_all()
                on_ready()
                while True:
                    self.pause()
                    self._answer_requests()
            except Stopped:
                pass
            finally:
                self.stop_all()

    def _on_signal(self, number: int, frame: object) -> None:
        self.stopping = True

    def pause(self) -> None:
        """Wait a moment and see who died; `Stopped` if we are asked to end."""
        time.sleep(POLL_S)
        for name, process in self.processes.items():
            if process.poll() is not None and process.pid not in self.noticed:
                self.noticed.add(process.pid)
                say(f"{name} (pid {process.pid}) has ended with {process.returncode}; its log: {self.log(name)}")
        if self.stopping:
            raise Stopped

    # ---- starting

    def start_all(self) -> None:
        """Start each as soon as those that it needs answer; return when all do."""
        waiting, ready = dict(self.services), set[str]()
        started: dict[str, float] = {}
        while len(ready) < len(self.services):
            for name, service in list(waiting.items()):
                if ready.issuperset(service.needs):
                    del waiting[name]
                    self.start(name)
                    started[name] = time.monotonic()
            for name, since in started.items():
                if name not in ready and self._is_up(name, since):
                    ready.add(name)
                    say(f"{name} answers ({time.monotonic() - since:.1f} s)")
            self.pause()

    def start(self, name: str) -> None:
        """Start one; returns at once."""
        service = self.services[name]
        service.folder.mkdir(parents=True, exist_ok=True)
        self.log(name).parent.mkdir(parents=True, exist_ok=True)
        owner: dict[str, Any] = {}
        if service.user is not None:
            owner = {"user": service.user[0], "group": service.user[1], "extra_groups": []}
        with self.log(name).open("ab") as log:
            self.processes[name] = subprocess.Popen(  # there is one thread
                service.argv,
                cwd=service.folder,
                env={**inherited(), **service.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us; and whatever it starts goes with it
                preexec_fn=_die_with(os.getpid()),  # noqa: PLW1509  # no threads here
                **owner,
            )
        self.write()

    def _is_up(self, name: str, since: float) -> bool:
        process = self.processes[name]
        if process.poll() is not None:
            raise StackError(f"{name} ended with {process.returncode} at its start:\n{self.last_lines(name)}")
        if self.services[name].answers():
            return True
        if time.monotonic() - since > START_LIMIT_S:
            raise StackError(f"{name} does not answer after {START_LIMIT_S:.0f} s:\n{self.last_lines(name)}")
        return False

    # ---- stopping

    def stop_all(self) -> None:
        """Stop them round by round, and kill what stays; nothing of ours is left then."""
        for number in sorted({service.stop_round for service in self.services.values()}):
            self._stop([name for name in self.processes if self.services[name].stop_round == number])

    def _stop(self, names: Sequence[str]) -> None:
        for name in names:
            self._signal(name, self.services[name].stop_signal)
            self._signal(name, signal.SIGCONT)  # one that is stopped by SIGSTOP hears nothing before
        until = time.monotonic() + STOP_LIMIT_S
        while any(self.processes[name].poll() is None for name in names) and time.monotonic() < until:
            time.sleep(0.02)
        for name in names:
            if self.processes[name].poll() is None:
                say(f"{name} is still there after {STOP_LIMIT_S:.0f} s: killed")
            self._signal(name, signal.SIGKILL)  # its whole group: what it started may have outlived it
            self.processes[name].wait()
            self.noticed.add(self.processes[name].pid)

    def _signal(self, name: str, number: int) -> None:
        # It leads a session of its own, so its pid is its group's number, and stays so while any member lives.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.processes[name].pid, number)

    # ---- what others see

    def log(self, name: str) -> Path:
        """The file that has all it said, over restarts."""
        return self.folder / "logs" / f"{name}.log"

    def last_lines(self, name: str, count: int = 20) -> str:
        """The end of its log, for an error's text."""
        lines = self.log(name).read_text(errors="replace").splitlines()[-count:]
        return "\n".join(f"  {line[:500]}" for line in lines) or "  (it said nothing)"

    def write(self) -> None:
        """Write stack.json, whole or not at all; no secret is in it."""
        commands = {
            name: {
                "argv": list(service.argv),
                "folder": str(service.folder),
                "environment": {k: v for k, v in service.environment.items() if not is_secret(k)},
                "log": str(self.log(name)),
            }
            for name, service in self.services.items()
        }
        pids = {name: process.pid for name, process in self.processes.items()}
        found = {**self.addresses, "pids": pids, "commands": commands, "supervisor": os.getpid()}
        replace(self.folder / "stack.json", found)

    # ---- requests of `restart`

    def _clear_requests(self) -> None:
        for path in (self.folder / "requests").glob("*.json"):
            path.unlink()

    def _answer_requests(self) -> None:
        for path in sorted((self.folder / "requests").glob("*.request.json")):
            name = json.loads(path.read_text())["name"]
            path.unlink()
            answer: dict[str, Any] = {"error": None}
            try:
                self.restart(name)
            except StackError as error:
                answer["error"] = str(error)
            replace(path.with_name(path.name.replace(".request.", ".answer.")), answer)

    def restart(self, name: str) -> None:
        """Stop it if it runs, start it on its old port, wait until it answers."""
        if name not in self.services:
            raise StackError(f"this stack has no {name!r}; it has {', '.join(self.services)}")
        self._stop([name])
        self.start(name)
        since = time.monotonic()
        while not self._is_up(name, since):
            self.pause()
        say(f"{name} answers again ({time.monotonic() - since:.1f} s)")


def request_restart(folder: Path, name: str) -> None:
    """Ask the supervisor of `folder` to start `name` again, and wait until it answers.

    Raises:
        StackError: no stack runs there, or the program did not come up.
    """
    requests = folder / "requests"
    requests.mkdir(parents=True, exist_ok=True)
    key = uuid.uuid4().hex
    question, answer = requests / f"{key}.request.json", requests / f"{key}.answer.json"
    if not is_running(folder):
        raise StackError(f"no stack runs in {folder}: `scripts/stack.py up --dir {folder}` starts one")
    replace(question, {"name": name})
    until = time.monotonic() + START_LIMIT_S + STOP_LIMIT_S + 10
    while not answer.exists():
        if time.monotonic() > until or not is_running(folder):
            question.unlink(missing_ok=True)
            raise StackError(f"the stack in {folder} did not answer; was it stopped meanwhile?")
        time.sleep(POLL_S / 2)
    error = json.loads(answer.read_text())["error"]
    answer.unlink()
    if error:
        raise StackError(error)


# ---- small pieces -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system takes it back from a supervisor that dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "stack.lock").open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackError(f"a stack runs in {folder} already; stop it, or take another --dir") from None
        yield


def check_free(folder: Path) -> None:
    """Raise StackError if a stack runs in `folder`: before anything in it is touched."""
    if is_running(folder):
        raise StackError(f"a stack runs in {folder} already; stop it, or take another --dir")


def is_running(folder: Path) -> bool:
    """Whether a supervisor holds the folder's lock."""
    try:
        with (folder / "stack.lock").open("r") as held:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def inherited() -> dict[str, str]:
    """The environment for programs: the caller's, without what would make each stack another."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(NOT_INHERITED) and k not in PROXIES}
    return {**kept, "NO_PROXY": "127.0.0.1,localhost"}


def is_secret(name: str) -> bool:
    """Whether the value of a variable of this name is kept out of what is written."""
    return any(word in name.upper() for word in SECRET_WORDS) and not name.endswith("_FILE")


def replace(path: Path, value: object) -> None:
    """Write JSON so that a reader finds the old text or the new one, never a half."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(beside, path)


def _die_with(parent: int) -> Callable[[], None] | None:
    """What a child does before it becomes its program: ask for SIGTERM when we die (Linux only)."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: the child of a fork should do as little as it can

    def ask() -> None:
        prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)

    return ask
