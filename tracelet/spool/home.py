"""Whose host a run's folder belongs to, and the sign of life that its shipper there gives to other hosts.

Locks tell the truth within one kernel. Over a shared file system they may tell nothing, so the shipper at home renews
a lease, a file of a few bytes, every ten seconds; whoever looks from elsewhere counts with its own clock how long the
file has stayed the same, so that two clocks that disagree do no harm.

    lease.json  {"holder": "<random>", "beat": 17, "renewed_unix_nano": ..., "host": "node7"}

No file means that nobody promised to renew one (`TRACELET_SHIPPER=off`, or a shipper that left in good order): then
nothing can be told from elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tracelet.guard import guard
from tracelet.spool import store
from tracelet.spool.store import Manifest

__all__ = [
    "LATE_S",
    "LEASE",
    "MISSED_S",
    "RENEW_S",
    "SILENT_S",
    "Beat",
    "Lease",
    "Watch",
    "is_here",
    "is_of_an_earlier_boot",
    "last_written_ns",
    "read_lease",
    "written_ns",
]

LEASE = "lease.json"
RENEW_S = 10.0
MISSED_S = 3 * RENEW_S
"""Three leases missed: the host, or its shipper, is gone."""
LATE_S = 2 * RENEW_S
"""One lease missed: nothing is known of the run, which is LOST until more is."""
SILENT_S = 3600.0
"""The same where nobody renews a lease: for how long nothing has been written to the folder."""

_NAMELESS = ("localhost", "localhost.localdomain")


def is_here(manifest: Manifest) -> bool:
    """The run's writers are, or were, processes of the kernel that runs now: their locks can be asked.

    Containers of one machine share its kernel, and so its boot id, under names of their own.
    """
    boot = store.boot_id()
    return manifest.boot_id == boot and (boot != "noboot" or manifest.host == store.host_name())


def is_of_an_earlier_boot(manifest: Manifest) -> bool:
    """This very host wrote it, before it was started anew: whatever wrote then is gone for certain."""
    return (
        manifest.host == store.host_name()
        and manifest.host not in _NAMELESS
        and "noboot" not in (manifest.boot_id, store.boot_id())
        and manifest.boot_id != store.boot_id()
    )


@dataclass(frozen=True, slots=True)
class Lease:
    """The last sign of life as it stands in the folder."""

    holder: str
    beat: int
    renewed_unix_nano: int  # by the holder's clock: for people
    host: str


def read_lease(folder: Path) -> Lease | None:
    """The lease of a folder; None where nobody renews one, or what is there makes no sense."""
    try:
        fields = json.loads((folder / LEASE).read_bytes())
        return Lease(str(fields["holder"]), int(fields["beat"]), int(fields["renewed_unix_nano"]), str(fields["host"]))
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def written_ns(folder: Path) -> dict[str, int]:
    """When each of the writers' files was written last; a mapped file's time is as of its kernel's last flush."""
    pattern = "?" * 16 + "-*."
    times = {}
    for path in [*folder.glob(pattern + "points"), *folder.glob(pattern + "frames")]:
        with contextlib.suppress(FileNotFoundError):  # delivered, and moved meanwhile
            times[path.name] = path.stat().st_mtime_ns
    return times


def last_written_ns(folder: Path) -> int:
    """When a writer wrote last, by its files. 0: never."""
    return max(written_ns(folder).values(), default=0)


class Beat:
    """The lease of the shipper at home; made anew by each shipper, so that a later one is told from an earlier."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._holder = secrets.token_hex(8)
        self._count = 0
        self._next = float("-inf")

    def renew(self) -> None:
        """Write it again if ten seconds have passed; raises OSError where there is no room."""
        now = self._clock()
        if now < self._next:
            return
        self._next = now + RENEW_S
        self._count += 1
        fields = {
            "holder": self._holder,
            "beat": self._count,
            "renewed_unix_nano": time.time_ns(),
            "host": store.host_name(),
        }
        store.write_whole(self._folder / LEASE, (json.dumps(fields) + "\n").encode("ascii"))

    def withdraw(self) -> None:
        """Leave in good order: from now on nothing is promised, and nothing follows from silence."""
        if self._count:
            self._count, self._next = 0, float("-inf")
            with guard("withdraw the lease"):
                (self._folder / LEASE).unlink(missing_ok=True)


class Watch:
    """A lease, watched from another host."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._seen = read_lease(folder)
        self._since = clock()

    @property
    def lease(self) -> Lease | None:
        """As it was at the last look."""
        return self._seen

    def unchanged_s(self) -> float:
        """For how long, as seen from here, it has stayed the same. Looks."""
        found, now = read_lease(self._folder), self._clock()
        if found != self._seen:
            self._seen, self._since = found, now
        return now - self._since

    def is_missed(self) -> bool:
        """Whether it was there, and three renewals have not come. No lease at all is never missed."""
        quiet = self.unchanged_s()
        return self._seen is not None and quiet >= MISSED_S
