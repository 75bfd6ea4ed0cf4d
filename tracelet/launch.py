"""Starts the shipper process, detached from training, and says whether it can outlive the program.

Standard library only. The shipper gets the program's interpreter, folder and environment, a session of its own (so
that Ctrl-C in the terminal is not its end), no descriptor but its log, and its secrets as one JSON line on standard
input: they are never in a file, an argument list or the environment.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["ShipperProcess", "can_outlive", "start_shipper"]

_PACKAGE_ROOT = str(Path(__file__).resolve().parent.parent)

# -P keeps the script's folder off sys.path, where a user's `queue.py` or `mlflow/` would shadow the real one. The
# package is then found where training found it: in front while it is imported, so that no other distribution of the
# same name comes first, and at the end afterwards, so that nothing beside it shadows anything. Behind that comes what
# the program itself has put on its path: there may be all its packages (pex, bazel, a vendored folder).
_MAIN = (
    "import json, sys; root, paths = sys.argv[1], json.loads(sys.argv[2]); sys.path.insert(0, root); import tracelet;"
    " del sys.path[0]; sys.path.append(root); sys.path += [path for path in paths if path not in sys.path];"
    " from tracelet.shipper.process import main; sys.exit(main(sys.argv[3:]))"
)

# `opentelemetry-instrument` puts this folder on PYTHONPATH; its sitecustomize would trace the shipper's own requests.
_AUTO_INSTRUMENTATION = os.path.join("opentelemetry", "instrumentation", "auto_instrumentation")

# What a worker process of Ray has, and nothing else. Ray kills the child processes of a worker that ends or is killed.
_KILLS_CHILDREN = "RAY_RAYLET_PID"

_INITIAL_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO of the Linux kernel
_LONGEST_PATHS = 16_384  # characters; an argument has at most 128 kB, and each of these may be twelve
_JOB_VARIABLES = {"SLURM_JOB_ID": "SLURM", "PBS_JOBID": "PBS", "LSB_JOBID": "LSF"}


class ShipperProcess:
    """A shipper that was started here. Keep it as long as the run: asking `has_ended()` reaps the child."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.pid = process.pid

    def has_ended(self) -> bool:
        """Whether it has ended; never waits."""
        return self._process.poll() is not None


class _Detached(subprocess.Popen[bytes]):
    """A process that is meant to live on when nobody holds this object any more."""

    def __del__(self) -> None:
        # Popen's own finalizer would complain with a ResourceWarning; what else it does is right: a child that goes
        # on is remembered, and reaped when the next one is started. Not done in ShipperProcess, since the garbage
        # collector may finalize the two in any order.
        super().__del__(_warn=_say_nothing)  # type: ignore[call-arg]


def _say_nothing(*_: object, **__: object) -> None:
    pass


def start_shipper(
    folder: Path, secrets: Mapping[str, Mapping[str, object]], *, environ: Mapping[str, str]
) -> ShipperProcess:
    """Start the shipper of the run's `folder`, and return at once; whether it holds the lock is not waited for.

    `secrets` are by destination id. Its standard output and error go to `shipper.log` in the folder.

    Raises:
        OSError: no process could be started. Nothing is lost: the data waits in the spool for `tracelet ship`.

    Cost: one vfork and exec, about 1 ms.
    """
    if not sys.executable:
        raise OSError("this interpreter doesn't know its own path (sys.executable is empty)")
    line = json.dumps(secrets).encode("ascii") + b"\n"
    reading, writing = os.pipe()
    try:
        try:
            # Written before there is a reader that might have ended: no wait, and no SIGPIPE.
            _fill(writing, line)
        finally:
            os.close(writing)
        with open(folder / "shipper.log", "ab", buffering=0, opener=_private) as log:
            process = _Detached(
                [
                    *(sys.executable, "-P", "-c", _MAIN, _PACKAGE_ROOT, json.dumps(_paths())),
                    *(str(folder), *_manner(environ)),
                ],
                stdin=reading,
                stdout=log,
                stderr=log,
                close_fds=True,  # an inherited pipe would keep its reader waiting for as long as the shipper lives
                start_new_session=True,
                env=_environment(environ),
            )
    finally:
        os.close(reading)
    return ShipperProcess(process)


def _paths() -> list[str]:
    """Where this program finds packages; not the folder of its script, whose files are meant for it alone."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    own = None if script is None else os.path.dirname(os.path.realpath(script))
    found = [
        path
        for path in sys.path
        if isinstance(path, str)
        and os.path.isabs(path)
        and os.path.realpath(path) != own
        and not path.rstrip(os.sep).endswith(_AUTO_INSTRUMENTATION)
    ]
    return found if sum(map(len, found)) < _LONGEST_PATHS else []


def _manner(environ: Mapping[str, str]) -> list[str]:
    """How the shipper is to live: an "orphan" where a child of this process would be killed with it."""
    return ["orphan"] if environ.get(_KILLS_CHILDREN) else []


def _fill(pipe: int, line: bytes) -> None:
    """Put all of `line` into a pipe that nobody reads yet: 64 kB go in as it is, on Linux 1 MiB after asking."""
    if len(line) > 65_536 and hasattr(fcntl, "F_SETPIPE_SZ"):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 1 << 20)
    os.set_blocking(pipe, False)
    if os.write(pipe, line) != len(line):
        raise OSError(f"the destinations' secrets take {len(line)} bytes, more than a pipe holds")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    env = dict(environ)
    paths = env.get("PYTHONPATH", "").split(os.pathsep)
    kept = [path for path in paths if not path.rstrip(os.sep).endswith(_AUTO_INSTRUMENTATION)]
    if len(kept) != len(paths):
        env["PYTHONPATH"] = os.pathsep.join(kept)
    return env


def can_outlive(environ: Mapping[str, str], *, proc: Path = Path("/proc")) -> str | None:
    """None if a shipper goes on when the program ends, else the reason, in words, why it can't.

    A process of a PID namespace dies with its first one (a container), a batch system kills what a job leaves.
    Not seen: a container that shares the host's PID namespace. Its engine's `/.dockerenv` says nothing, since
    virtual machines are made from the same images.
    """
    try:
        namespace = os.readlink(proc / "self/ns/pid")
    except OSError:
        namespace = _INITIAL_PID_NAMESPACE  # no /proc: macOS, where there are no PID namespaces
    if namespace != _INITIAL_PID_NAMESPACE:
        return "this is a container or another PID namespace, which ends with its first process"
    for variable, system in _JOB_VARIABLES.items():
        if environ.get(variable):
            return f"this is a {system} job ({variable} is set), whose processes are killed at its end"
    return None
