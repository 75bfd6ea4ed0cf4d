"""Another host, as a process of this machine can be on one: a name, a boot, names that it knows, or no network.

The other files are the same, and its kernel is still this one's, so locks are seen; the shared folder of a cluster may
show none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from pathlib import Path

__all__ = ["WITHOUT_NETWORK", "Names", "can_be_made", "words_for"]

# Who is not root becomes it in a namespace of users, where files are his own all the same.
_MAPPED = () if os.geteuid() == 0 else ("--map-root-user",)

WITHOUT_NETWORK = ("unshare", "--net", *_MAPPED)
"""What stands in front of a command that has none, as on a train: no address is reached, and no name resolved."""

_ENTER = 'hostname "$1" && mount --bind "$2" /proc/sys/kernel/random/boot_id && shift 2 && exec "$@"'


def words_for(folder: Path, name: str) -> tuple[str, ...]:
    """What stands in front of a command that runs on the host `name`; its process keeps its pid."""
    boot = folder / f"boot-id-of-{name}"
    if not boot.exists():
        boot.write_text(f"{uuid.uuid4()}\n")
    return ("unshare", "--uts", "--mount", "sh", "-c", _ENTER, "sh", name, str(boot))


def can_be_made(folder: Path) -> bool:
    """Whether this machine lets us (it takes root, or the right to make namespaces)."""
    if shutil.which("unshare") is None:
        return False
    asked = [*WITHOUT_NETWORK, *words_for(folder, "probe"), "hostname"]
    done = subprocess.run(asked, check=False, capture_output=True, text=True, timeout=30)
    return done.stdout.strip() == "probe"


class Names:
    """The names that processes started behind `words` can resolve: those of a hosts file of their own, no others."""

    _ENTER = 'mount --bind "$1" /etc/hosts && mount --bind "$2" /etc/resolv.conf && shift 2 && exec "$@"'

    def __init__(self, folder: Path) -> None:
        """Only `localhost` is known at first; the name server is one of this machine where nobody listens."""
        self._hosts = folder / "hosts"
        self._hosts.write_text("127.0.0.1 localhost\n")
        servers = folder / "resolv.conf"
        servers.write_text("nameserver 127.0.0.1\n")
        self.words = ("unshare", "--mount", *_MAPPED, "sh", "-c", self._ENTER, "sh", str(self._hosts), str(servers))

    def add(self, name: str, address: str) -> None:
        """From now on `name` is at `address`."""
        with self._hosts.open("a") as file:  # in place: what is mounted is this very file
            file.write(f"{address} {name}\n")
