"""Real disks for tests: file systems mounted for one test, filled, broken or cut off from power, and gone after it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.stack.harness import lacking

__all__ = [
    "Disk",
    "Sshfs",
    "after_a_reboot",
    "as_another_machine",
    "disk",
    "ext",
    "fill",
    "overlay",
    "program",
    "sshfs",
    "tmpfs",
]

MEGABYTES = {"ext2": 8, "ext4": 64, "xfs": 320, "btrfs": 128}
"""The least, or a size that is good to use: XFS is made no smaller."""

_SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN, linux/fs.h
_NO_LOG_FLUSH = 2  # of FS_SHUTDOWN_FLAGS: as it is, without writing down anything more


@contextmanager
def tmpfs(at: Path, size: str) -> Iterator[Path]:
    """A file system in memory, of this size."""
    with _mounted(at, "-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
        yield at


@contextmanager
def ext(at: Path, kind: str, megabytes: int) -> Iterator[Path]:
    """An ext2 (which has no fallocate) or ext4 file system in a file."""
    with disk(at, kind, megabytes=megabytes):
        yield at


PACKAGES = {
    "mke2fs": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "mkfs.btrfs": "btrfs-progs",
    "sshfs": "sshfs",
    "sftp-server": "openssh-sftp-server",
    "unshare": "util-linux",
    "umount": "mount",
    "filefrag": "e2fsprogs",
}
"""The programs that tests with disks start, and the package of Debian and Ubuntu that has each."""

_PATH = os.pathsep.join(
    [os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/lib/openssh"]
)


def program(name: str) -> str:
    """The path of a program; skips the test where it is not there (fails it where the stack is required)."""
    return shutil.which(name, path=_PATH) or lacking(
        f"there is no {name} here: Debian has it in {PACKAGES[name]}, which `make launchers` installs there, as root"
    )


class Disk:
    """A file system over an image file, which can lose its power."""

    def __init__(self, at: Path, kind: str, image: Path) -> None:
        self.at = at
        self._kind = kind
        self.image = image
        self._mount()

    def _mount(self) -> None:
        # XFS mounts no file system twice, and takes the copy that `restart` makes for the first one, where anybody's
        # mount namespace still holds the first.
        options = "loop,nouuid" if self._kind == "xfs" else "loop"
        _mount(self.at, "-t", self._kind, "-o", options, str(self.image))

    def lose_power(self) -> None:
        """From now on nothing reaches the disk any more: what the kernel has in memory alone is lost with `restart`.

        The file system is shut down without a last word. What is open stays open, and gets errors.
        """
        folder = os.open(self.at, os.O_RDONLY)
        try:
            fcntl.ioctl(folder, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(folder)

    def restart(self) -> None:
        """Mount what the disk has: the file system replays its journal. Nobody may have a file open."""
        subprocess.run(["umount", str(self.at)], check=True)
        # A copy: a mount namespace made meanwhile by anybody holds the old one, and would have it mounted once more.
        copy = self.image.with_name(f"{self.image.name}.copy")
        subprocess.run(["cp", "--sparse=always", str(self.image), str(copy)], check=True)
        self.image.unlink()
        os.rename(copy, self.image)
        self._mount()


@contextmanager
def disk(at: Path, kind: str, *, megabytes: int | None = None, image: Path | None = None) -> Iterator[Disk]:
    """A file system of this kind in an image file, by default beside `at`."""
    image = at.with_name(f"{at.name}.{kind}") if image is None else image
    make = {"xfs": ["mkfs.xfs", "-q"], "btrfs": ["mkfs.btrfs", "-q"]}.get(
        kind, ["mke2fs", "-q", "-F", "-b", "4096", "-t", kind]
    )
    make[0] = program(make[0])
    with open(image, "wb") as file:
        file.truncate((MEGABYTES[kind] if megabytes is None else megabytes) * 2**20)
    try:
        made = subprocess.run([*make, str(image)], capture_output=True, text=True, check=False)
        if made.returncode != 0:
            pytest.skip(f"{make[0]} made no {kind}: {made.stderr}")
        one = Disk(at, kind, image)
        try:
            yield one
        finally:
            subprocess.run(["umount", "-l", str(at)], check=True)
    finally:
        image.unlink()


@contextmanager
def overlay(at: Path, lower: Path | None = None) -> Iterator[Path]:
    """An overlay as a container has it, with its upper layer on the disk that `at` lies on."""
    under, upper, work = (at.with_name(f"{at.name}-{name}") for name in ("under", "upper", "work"))
    for one in (under, upper, work):
        one.mkdir()
    layers = f"lowerdir={lower or under},upperdir={upper},workdir={work}"
    with _mounted(at, "-t", "overlay", "-o", layers, "overlay"):
        yield at


@contextmanager
def _mounted(at: Path, *options: str) -> Iterator[None]:
    _mount(at, *options)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def _mount(at: Path, *options: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root with CAP_SYS_ADMIN")
    at.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(at)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"mounting a small file system needs root with CAP_SYS_ADMIN: {done.stderr.strip()}")


class Sshfs:
    """A folder of another machine, mounted by sshfs: an SFTP server behind it, on this machine, over a pipe."""

    def __init__(self, at: Path, server: Path) -> None:
        """Mount the folder `server` at `at`."""
        self.at = at
        at.mkdir()
        command = at.with_name(f"{at.name}.sh")
        self._server = at.with_name(f"{at.name}.pid")
        command.write_text(f"#!/bin/sh\necho $$ > {self._server}\nexec {program('sftp-server')}\n")
        command.chmod(0o700)
        self._process = subprocess.Popen(
            [program("sshfs"), "-f", "-o", f"ssh_command={command}", f"elsewhere:{server}", str(at)],
            stderr=subprocess.PIPE,
            text=True,
        )
        until = time.monotonic() + 30
        while not os.path.ismount(at):
            if self._process.poll() is not None or time.monotonic() > until:
                _, words = self._process.communicate() if self._process.poll() is not None else ("", "it hangs")
                self.unmount()
                lacking(f"sshfs could not be mounted here: {words}")
            time.sleep(0.01)

    def lose_connection(self) -> None:
        """The server is gone, for good."""
        os.kill(int(self._server.read_text()), signal.SIGKILL)

    def unmount(self) -> None:
        """Let it go, whoever has a file open there."""
        subprocess.run([program("umount"), "-l", str(self.at)], capture_output=True, check=False)
        self._process.terminate()
        self._process.communicate(timeout=30)


@contextmanager
def sshfs(at: Path, server: Path) -> Iterator[Sshfs]:
    """The folder `server` at `at`, as over a network."""
    mounted = Sshfs(at, server)
    try:
        yield mounted
    finally:
        mounted.unmount()


def as_another_machine(folder: Path, name: str, *command: str) -> list[str]:
    """The command line of a program that believes itself on a machine of this name, with a boot id of its own."""
    other = folder / f"boot-{name}"
    other.write_text(f"{uuid.uuid5(uuid.NAMESPACE_DNS, name)}\n")
    script = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && hostname "$1" && shift && exec "$@"'
    return [program("unshare"), "--mount", "--uts", "sh", "-c", script, str(other), name, *command]


def after_a_reboot(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `tracelet` as on this host after another start of it: the kernel's boot id is another one."""
    command = as_another_machine(folder, socket.gethostname(), sys.executable, "-m", "tracelet", *arguments)
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **environ}, capture_output=True, text=True, timeout=60, check=False
    )


def fill(ballast: Path) -> None:
    """Take all the room there is, to the last byte."""
    with open(ballast, "ab", buffering=0) as file:
        for step in (2**20, 4096, 1):
            try:
                while True:
                    file.write(bytes(step))
            except OSError as error:
                assert error.errno in (errno.ENOSPC, errno.EFBIG), error  # noqa: PT017
