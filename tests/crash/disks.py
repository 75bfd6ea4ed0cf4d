"""Real disks for tests: file systems mounted for one test, filled, broken or cut off from power, and gone after it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.stack.harness import lacking

__all__ = ["Disk", "after_a_reboot", "disk", "ext", "fill", "program", "tmpfs"]

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
    "fusermount3": "fuse3",
    "sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
    "unshare": "util-linux",
}
"""The programs that tests with disks start, and the package of Debian and Ubuntu that has each."""

_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])


def program(name: str) -> str:
    """The path of a program; skips the test where it is not there (fails it where the stack is required)."""
    return shutil.which(name, path=_PATH) or lacking(f"there is no {name} here; Debian has it in {PACKAGES[name]}")


class Disk:
    """A file system over an image file, which can lose its power."""

    def __init__(self, at: Path, kind: str, image: Path) -> None:
        self.at = at
        self._kind = kind
        self._image = image
        _mount(at, "-t", kind, "-o", "loop", str(image))

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
        copy = self._image.with_name(f"{self._image.name}.copy")
        subprocess.run(["cp", "--sparse=always", str(self._image), str(copy)], check=True)
        self._image.unlink()
        os.rename(copy, self._image)
        _mount(self.at, "-t", self._kind, "-o", "loop", str(self._image))


@contextmanager
def disk(at: Path, kind: str, *, megabytes: int | None = None, image: Path | None = None) -> Iterator[Disk]:
    """A file system of this kind in an image file, by default beside `at`."""
    image = at.with_name(f"{at.name}.{kind}") if image is None else image
    make = {"xfs": ["mkfs.xfs", "-q"], "btrfs": ["mkfs.btrfs", "-q"]}.get(kind, ["mke2fs", "-q", "-F", "-t", kind])
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


def after_a_reboot(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `tracelet` as on this host after another start of it: the kernel's boot id is another one."""
    other = folder / "boot_id"
    other.write_text("00000000-1111-2222-3333-444444444444\n")
    script = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'
    command = [
        program("unshare"),
        "--mount",
        "sh",
        "-c",
        script,
        str(other),
        sys.executable,
        "-m",
        "tracelet",
        *arguments,
    ]
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
