"""Another host, as a process of this machine can be on one: a name and a boot of its own, over the same files.

Its kernel is still this one's, so locks are seen; the shared folder of a cluster may show none.
"""

from __future__ import annotations

import shutil
import subprocess
import uuid
from pathlib import Path

__all__ = ["can_be_made", "words_for"]

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
    asked = [*words_for(folder, "probe"), "hostname"]
    done = subprocess.run(asked, check=False, capture_output=True, text=True, timeout=30)
    return done.stdout.strip() == "probe"
