"""Programs of the system's packages that tests start for real, and what stands in for a machine of their own.

`make launchers` installs the packages. Nothing of the machine's configuration is used.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import processes_of, stop
from tests.stack.harness import REPOSITORY, lacking

__all__ = ["Place", "free_ports", "place", "system_program"]

_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")  # where services are, and not on everybody's PATH


def system_program(name: str) -> str:
    """The path of a program; skips the test where it is not there (fails it where the stack is required)."""
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *_SBIN]))
    return found or lacking(f"there is no {name} here; `make launchers` installs it on Debian and Ubuntu, as root")


def free_ports(count: int) -> list[int]:
    """Ports of the loopback at which nobody listens."""
    taken = [socket.socket() for _ in range(count)]
    try:
        for each in taken:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in taken]
    finally:
        for each in taken:
            each.close()


class Place:
    """A folder that every user may enter, with this Python and tracelet in it for who can't reach the real ones.

    Interpreter, packages and project often lie in a home that is closed to other users. `inside(...)` runs a command
    in a mount namespace of its own, in which they stand in this folder too; there `programs` has `python` and
    `tracelet`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.programs = folder, folder / "programs"
        packages = [Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib"))]
        self._binds = {folder / "python": Path(sys.base_prefix), folder / "project": REPOSITORY}
        self._binds |= {folder / f"packages-{i}": path for i, path in enumerate(dict.fromkeys(packages))}
        for at in (*self._binds, self.programs):
            at.mkdir()
        path = os.pathsep.join([str(folder / "project"), *(str(at) for at in self._binds if "packages" in at.name)])
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        shared = (
            f"export LD_LIBRARY_PATH='{folder}/python/lib'\n" if sysconfig.get_config_var("Py_ENABLE_SHARED") else ""
        )
        for name, words in (("python", ""), ("tracelet", " -m tracelet")):
            program = self.programs / name
            program.write_text(
                f"#!/bin/sh\n"
                f'export PYTHONPATH="${{PYTHONPATH:+$PYTHONPATH:}}{path}" PYTHONDONTWRITEBYTECODE=1\n'
                f"{shared}exec '{folder}/python/bin/{version}'{words} \"$@\"\n"
            )
            program.chmod(0o755)

    def inside(self, *command: str) -> list[str]:
        """The command line of a program in the namespace."""
        script = "".join(f"mount --bind '{path}' '{at}' && " for at, path in self._binds.items()) + 'exec "$@"'
        return [
            system_program("unshare"),
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            script,
            "inside",
            *command,
        ]

    def stands_at(self, at: Path, file: Path) -> None:
        """In the namespaces of commands to come `file` stands in the place of the machine's own `at`."""
        self._binds[at] = file

    def owned(self, name: str, user: pwd.struct_passwd) -> Path:
        """A folder in it that is this user's."""
        made = self.folder / name
        made.mkdir(exist_ok=True)
        os.chown(made, user.pw_uid, user.pw_gid)
        return made


@contextmanager
def place() -> Iterator[Place]:
    """A place that is gone at the end, with all processes that have to do with it."""
    if os.geteuid() != 0:
        lacking("to be several users, and to mount, one has to be root")
    with tempfile.TemporaryDirectory(prefix="tracelet-") as name:
        made = Place(Path(name))
        made.folder.chmod(0o755)
        may = subprocess.run(made.inside("true"), capture_output=True, text=True, check=False, timeout=60)
        if may.returncode:
            lacking(f"nothing can be mounted here: {may.stderr.strip()}")
        try:
            yield made
        finally:
            stop(processes_of(name))
