"""A process without a network, as on a train: a namespace with nothing but a loopback, which is down.

There every address is unreachable, and no name is resolved.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

__all__ = ["can_be_made", "knowing", "words"]

# Who is not root becomes it in a namespace of users, where files are his own all the same.
_MAPPED = () if os.geteuid() == 0 else ("--map-root-user",)


def words() -> tuple[str, ...]:
    """What stands in front of a command that has no network; its process keeps its pid."""
    return ("unshare", "--net", *_MAPPED)


def knowing(folder: Path, name: str) -> tuple[str, ...]:
    """What stands in front of a command that has the network, on which `name` is this machine."""
    known = folder / f"hosts-with-{name}"
    known.write_text(f"127.0.0.1 localhost {name}\n")
    enter = 'mount --bind "$1" /etc/hosts && shift && exec "$@"'
    return ("unshare", "--mount", *_MAPPED, "sh", "-c", enter, "sh", str(known))


def can_be_made(folder: Path) -> bool:
    """Whether this machine lets us (it takes root, or the right to make namespaces)."""
    if shutil.which("unshare") is None:
        return False
    asked = ([*words(), "true"], [*knowing(folder, "probe.test"), "getent", "hosts", "probe.test"])
    return all(subprocess.run(one, check=False, capture_output=True, timeout=30).returncode == 0 for one in asked)
