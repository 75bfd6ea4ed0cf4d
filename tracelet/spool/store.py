"""The spool folder as a whole: where it is, its manifest, its size, what is sealed, moved to delivered/ and deleted."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

from tracelet.errors import SpoolFormatError
from tracelet.guard import guard
from tracelet.spool.disk import allocate, refused, sync_folder
from tracelet.spool.files import SPARES
from tracelet.spool.lease import require_own
from tracelet.spool.pages import Pages
from tracelet.spool.points import HEADER_SIZE, SLOT_SIZE, segment_name
from tracelet.spool.reader import DELIVERED, Position, SpoolReader
from tracelet.spool.seal import VERSION as SEAL_VERSION
from tracelet.spool.seal import foreign_version, read_seal, seal_name, write_seal

__all__ = [
    "Attempt",
    "Manifest",
    "RunFolder",
    "flush_names",
    "held_manifest",
    "is_behind",
    "list_runs",
    "make_spares",
    "move_delivered",
    "read_manifest",
    "remove_run",
    "run_folder",
    "seal",
    "update_manifest",
    "usage",
]

MANIFEST = "manifest.json"
MANIFEST_LOCK = "manifest.lock"
COPY = "manifest.copy.json"
"""The same once more: a damaged manifest would leave whole records with nowhere to go, or send them to another run."""
LOCK_WAIT_S = 10.0
"""Who changes a manifest is through in a millisecond, who deletes in far less than this: nobody waits for longer."""
_LOCK_POLL_S = 0.002
FORMAT = 1
"""The version of the folder's format; a reader refuses another one by name."""


# ---- where ------------------------------------------------------------------------------------------------------


def boot_id() -> str:
    """Which start of this machine it is: 12 hexadecimal digits, "noboot" where the system doesn't say."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        return "noboot"
    return text.strip().replace("-", "")[:12]


def host_name() -> str:
    """This machine's name, as far as it can stand in a folder's name."""
    return re.sub(r"[^A-Za-z0-9._]", "_", socket.gethostname()) or "localhost"


def run_folder(root: Path, run_id: str) -> Path:
    """The folder of a run on this host, since its last boot. Makes nothing."""
    return Path(root).absolute() / run_id / f"{host_name()}-{boot_id()}"


def make_folder(folder: Path) -> Path:
    """Make `folder` and what is missing above it, for this user alone (0700); existing ones stay as they are."""
    for parent in reversed((folder, *folder.parents)):
        if not parent.exists():
            parent.mkdir(mode=0o700, exist_ok=True)
    return folder


def flush_names(folder: Path) -> None:
    """Make a run's folder itself, and the names of all files in it, survive a loss of power.

    Raises:
        OSError: the disk would not have them.
    """
    sync_folder(folder)
    sync_folder(folder.parent)
    with contextlib.suppress(PermissionError):  # others' place for all of their spools may be closed to readers
        sync_folder(folder.parent.parent)


# ---- the manifest -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of a run on this host. `destinations` as in the manifest: id, kind, spec (absolute, no secrets)."""

    key: str
    started_unix_nano: int
    pid: int
    rank: int
    destinations: tuple[Mapping[str, Any], ...] = ()
    ended: Mapping[str, Any] | None = None
    shipper: str = "process"  # "process", "thread", "off"
    lease_until_unix_nano: int | None = None  # for other hosts; None: no lease is kept
    number: int = 0  # 1, 2, ... of those that were known at its start: for people; 0: not known
    order_unix_nano: int = 0  # its start, or just after the newest attempt known then, where the clock says earlier
    ranks_ended: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # rank -> as `ended`: of further ranks
    extra: Mapping[str, Any] = field(default_factory=dict)  # what a newer minor version added

    @property
    def order(self) -> int:
        """What attempts of one run are sorted by. A clock set back can't change it, as far as the earlier attempts were
        known at the start; hosts that know nothing of each other are told apart by their clocks."""
        return self.order_unix_nano or self.started_unix_nano


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is known of a run on this host, other than its records."""

    run_id: str
    project: str
    experiment_name: str
    run_name: str
    host: str = field(default_factory=host_name)
    boot_id: str = field(default_factory=boot_id)
    attempts: tuple[Attempt, ...] = ()
    format: int = FORMAT
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def destinations(self) -> dict[str, Mapping[str, Any]]:
        """Every destination of any attempt by its id; the newest attempt's word on it stands."""
        found: dict[str, Mapping[str, Any]] = {}
        for attempt in sorted(self.attempts, key=lambda attempt: attempt.order):
            for destination in attempt.destinations:
                found[str(destination["id"])] = destination
        return found

    @property
    def newest(self) -> Attempt | None:
        """The attempt that was started last: the one whose end is the run's."""
        return max(self.attempts, key=lambda attempt: attempt.order, default=None)

    def attempt(self, key: str) -> Attempt | None:
        """The attempt with this key."""
        return next((attempt for attempt in self.attempts if attempt.key == key), None)

    def with_attempt(self, attempt: Attempt) -> Manifest:
        """This manifest with `attempt` added, or put in the place of the one with its key."""
        if self.attempt(attempt.key) is None:
            return dataclasses.replace(self, attempts=(*self.attempts, attempt))
        return dataclasses.replace(
            self, attempts=tuple(attempt if old.key == attempt.key else old for old in self.attempts)
        )


def _to_json(value: Attempt | Manifest) -> dict[str, Any]:
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.name != "extra"}
    if isinstance(value, Manifest):
        fields["attempts"] = [_to_json(attempt) for attempt in value.attempts]
    else:
        fields["destinations"] = [dict(destination) for destination in value.destinations]
    return {**value.extra, **fields}


def _known(kind: type[Any], fields: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(kind)} - {"extra"}
    known = {name: value for name, value in fields.items() if name in names}
    return {**known, "extra": {name: value for name, value in fields.items() if name not in names}}


_CHECK = "crc32"  # the key of the checksum, over everything beside it
_IS_ID = re.compile(r"[^/\0.][^/\0]*")  # it is part of file names
_Type = type | tuple[type, ...]
_MANIFEST_TYPES: dict[str, _Type] = {
    "run_id": str,
    "project": str,
    "experiment_name": str,
    "run_name": str,
    "host": str,
    "boot_id": str,
    "attempts": list,
}
_ATTEMPT_TYPES: dict[str, _Type] = {
    "key": str,
    "started_unix_nano": int,
    "pid": int,
    "rank": int,
    "number": int,
    "order_unix_nano": int,
    "destinations": list,
    "ended": (dict, type(None)),
    "ranks_ended": dict,
    "shipper": str,
    "lease_until_unix_nano": (int, type(None)),
    "launch": dict,
    "keep": (dict, type(None)),
    "max_bytes": (int, type(None)),
}
_LAUNCH_TYPES: dict[str, _Type] = {"world": int, "restarts": list, "ranks": dict, "agents": dict}
_ENDED_TYPES: dict[str, _Type] = {
    "status": str,
    "end_unix_nano": int,
    "seen_by": str,
    "error": (dict, type(None)),
    "exit_code": (int, type(None)),
    "rank": (int, type(None)),
}
_ERROR_TYPES: dict[str, _Type] = {"type": str, "message": str, "stacktrace": str}


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a run's folder, or its copy where it is damaged; None where there is none yet.

    Raises:
        SpoolFormatError: neither can be read, or they are of a format this release doesn't know.
    """
    try:
        return _read_manifest(folder / MANIFEST)
    except SpoolFormatError as error:
        if "version" not in error.facts:
            with contextlib.suppress(SpoolFormatError, OSError):
                copy = _read_manifest(folder / COPY)
                if copy is not None:
                    guard.limited(f"damaged {folder}", "goes on with its copy: %s", error)
                    return copy
        raise


def _read_manifest(path: Path) -> Manifest | None:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except PermissionError:
        raise
    except OSError as error:  # a disk that fails: as good as damaged
        raise SpoolFormatError(f"{path} can't be read ({error.strerror or error})", path=str(path)) from error
    try:
        fields = json.loads(text)
        check = fields.pop(_CHECK, None)
        if check is not None and check != _check(fields):
            raise ValueError(f"its checksum is wrong; if it was changed by hand, take out its line {_CHECK!r}")
        version = fields["format"]
        if version != FORMAT:
            raise SpoolFormatError(
                f"{path} has format {version}, this tracelet reads {FORMAT}:"
                " use the release that wrote it, or a newer one",
                path=str(path),
                version=version,
            )
        _expect(fields, _MANIFEST_TYPES)
        attempts = []
        for one in fields["attempts"]:
            _expect_attempt(one)
            one["destinations"] = tuple(one.get("destinations", ()))
            attempts.append(Attempt(**_known(Attempt, one)))
        fields["attempts"] = tuple(attempts)
        return Manifest(**_known(Manifest, fields))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SpoolFormatError(
            f"{path} can't be read ({error}): the records beside it are whole, but nothing says where they should go;"
            " put the manifest back, or start the run again by run_id= to write a new one in place of a removed one",
            path=str(path),
        ) from error


def _expect(fields: Mapping[str, Any], types: Mapping[str, _Type]) -> None:
    """Fields that are there have these types: who reads a manifest later must not stumble over a damaged one."""
    for name, wanted in types.items():
        if name in fields and (not isinstance(fields[name], wanted) or isinstance(fields[name], bool)):
            raise ValueError(f"{name} is {fields[name]!r}")


def _expect_attempt(attempt: Any) -> None:
    _expect({"attempts": attempt}, {"attempts": dict})
    _expect(attempt, _ATTEMPT_TYPES)
    for destination in attempt.get("destinations", ()):
        _expect({"destinations": destination}, {"destinations": dict})
        _expect(destination, {"id": str, "kind": str, "spec": dict})
        if not _IS_ID.fullmatch(destination["id"]) or not destination["kind"]:
            raise ValueError(f"a destination has the id {destination['id']!r}")
    if "launch" in attempt:
        _expect_launch(attempt["launch"])
    if not all(rank.isdecimal() for rank in attempt.get("ranks_ended", {})):
        raise ValueError(f"ranks_ended is {attempt['ranks_ended']!r}")
    ended = attempt.get("ended")
    for verdict in (*([] if ended is None else [ended]), *attempt.get("ranks_ended", {}).values()):
        _expect_ended(verdict)


def _expect_launch(launch: Any) -> None:
    _expect(launch, _LAUNCH_TYPES)
    if not all(type(restarts) is int for restarts in launch["restarts"]):
        raise ValueError(f"launch is {launch!r}")
    agents = launch.get("agents", {})
    _expect(agents, dict.fromkeys(agents, dict))


def _expect_ended(ended: Any) -> None:
    _expect({"ended": ended}, {"ended": dict})
    _expect({"status": None, "end_unix_nano": None, **ended}, _ENDED_TYPES)
    if ended.get("error") is not None:
        _expect({"type": None, "message": None, **ended["error"]}, _ERROR_TYPES)


def _check(fields: Mapping[str, Any]) -> str:
    return f"{crc32(json.dumps(fields, sort_keys=True).encode('ascii')):08x}"


def update_manifest(folder: Path, change: Callable[[Manifest | None], Manifest], *, make: bool = True) -> Manifest:
    """Replace the manifest by what `change` makes of it, under its lock.

    Readers see the old or the new one, never half of it. `change` gets None where there is none yet. `make`: make the
    folder if there is none; not where it is somebody else's, who may have deleted it.

    Raises:
        SpoolError: the folder can't be made or written, or has no room, or its manifest can't be read.
    """
    try:
        return _update_manifest(folder, change, make)
    except OSError as error:
        raise refused(folder, error) from error


def _update_manifest(folder: Path, change: Callable[[Manifest | None], Manifest], make: bool) -> Manifest:
    with held_manifest(folder, make=make):
        manifest = change(read_manifest(folder))
        fields = _to_json(manifest)
        data = (json.dumps({**fields, _CHECK: _check(fields)}, indent=1) + "\n").encode("ascii")
        write_whole(folder / MANIFEST, data, durable=True)
        with contextlib.suppress(OSError):  # an older copy is better than none
            write_whole(folder / COPY, data)
        return manifest


@contextlib.contextmanager
def held_manifest(folder: Path, *, make: bool = False) -> Iterator[None]:
    """Within the block nobody changes the manifest: no destination and no attempt comes meanwhile.

    Raises:
        OSError: there is no such folder (`make`: it can't be made), it can't be written, or it stays locked.
    """
    while True:
        if make:
            make_folder(folder)
        path = folder / MANIFEST_LOCK
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _lock(fd, folder)
            if _is_at(path, fd):
                yield
                return
        finally:
            with contextlib.suppress(OSError):
                # By its name, too: a child that another thread forked in the block has the descriptor as long as it
                # lives, and with it the lock, which the close alone would leave to it.
                fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)


def _is_at(path: Path, fd: int) -> bool:
    """Not where who held the lock before has deleted the folder: then it is the lock of nothing."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _lock(fd: int, folder: Path) -> None:
    """Take the manifest's lock; flock, not lockf: two threads of one process exclude each other too.

    Not for as long as it takes: its holder may be a process that was suspended, or this very thread, when a signal's
    handler comes here in the middle of it.

    Raises:
        OSError: nobody gave it back in time.
    """
    until = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= until:
                raise TimeoutError(
                    errno.ETIMEDOUT, f"its manifest has been locked by another for {LOCK_WAIT_S:g} s", str(folder)
                ) from None
        time.sleep(_LOCK_POLL_S)


def write_whole(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Put `data` at `path` in one step: it appears whole or not at all.

    `durable`: after a loss of power, too. Without, the name may be on the disk before the bytes are: an empty file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(fd)
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# ---- what is there ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run on one host, as found under TRACELET_DIR."""

    run_id: str
    folder: Path
    manifest: Manifest | None
    problem: str | None = None  # why the manifest can't be read


def list_runs(root: Path) -> Iterator[RunFolder]:
    """Every run's folder under `root`, by run id."""
    for run in sorted(_folders(root)):
        for folder in sorted(_folders(run)):
            try:
                manifest, problem = read_manifest(folder), None
            except SpoolFormatError as error:
                manifest, problem = None, str(error)
            # A start that died before its manifest leaves a folder in which nothing was ever logged.
            if manifest is not None or problem is not None or any(folder.glob(f"{'?' * 16}.lock")):
                yield RunFolder(run.name, folder, manifest, problem)


def _folders(parent: Path) -> list[Path]:
    try:
        with os.scandir(parent) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError:
        require_own(parent)
        raise


def usage(folder: Path) -> int:
    """The bytes of all files in `folder` but those in delivered/, which may be deleted at any time."""
    total = 0
    pending = [os.fspath(folder)]
    while pending:
        with contextlib.suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if entry.name != DELIVERED:
                        pending.append(entry.path)
                else:
                    with contextlib.suppress(OSError):  # gone meanwhile
                        total += entry.stat(follow_symlinks=False).st_size
    return total


# ---- for the shipper --------------------------------------------------------------------------------------------


def make_spares(folder: Path, slots: int = 32768, *, max_bytes: int | None = None) -> int:
    """Make the segments ahead that are missing; returns how many were made.

    `max_bytes`: none where the folder would then hold more, less room for as many segments again: a writer looks at
    the folder's size once a second, and may have made some of its own since.

    Written full of zeros: the pages are then in memory, and training's first stores there cost no fault of the disk.
    """
    made = 0
    size = HEADER_SIZE + SLOT_SIZE * slots
    for name in SPARES:
        path = folder / name
        if path.exists():
            continue
        if max_bytes is not None and usage(folder) + size * (1 + len(SPARES)) > max_bytes:
            return made
        temporary = folder / f".{name}.{os.getpid()}"
        try:
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                allocate(fd, size)
                if os.write(fd, bytes(size)) != size:
                    raise OSError(28, "No space left on device")
            finally:
                os.close(fd)
            os.rename(temporary, path)
            made += 1
        except OSError:  # no room or no allocation here: writers make their own, and say what is wrong
            temporary.unlink(missing_ok=True)
            return made
    return made


def seal(folder: Path, writer: str, number: int, *, dead: bool = False, pages: Pages | None = None) -> bool:
    """Seal a segment that nobody writes to any more; False where one of its slots has no marker yet.

    A living writer leaves a segment only when all of its slots are taken, whatever stands behind it: the next one's
    file is made first, and on a full disk long before, and a slot that is filled behind a seal would be damage.

    `dead`: the writer ended or died, so slots without a marker stay so, and a file in which no segment was begun goes.
    `pages`: what the caller has found unreadable so far. Sealed already: True.
    """
    if read_seal(folder, writer, number) is not None:
        return True
    foreign = foreign_version(folder, writer, number)
    if foreign is not None:
        guard.limited(
            "seal of another version",
            "%s has format %d, this tracelet reads %d: its checksums are not looked at, and it stays where it is",
            folder / seal_name(writer, number),
            foreign,
            SEAL_VERSION,
        )
        return True
    reader = SpoolReader(folder, pages=pages)
    try:
        used = reader.used_slots(writer, number)
        if used is None:
            return dead and _remove_unbegun(folder / segment_name(writer, number))
        slots, unmarked, fd = used
        if unmarked and not dead:
            return False
        write_seal(folder, writer, number, fd, slots, pread=reader.pread)
        return True
    finally:
        reader.close()


def _remove_unbegun(path: Path) -> bool:
    """Delete what a full disk left of a segment that was never begun; False where something stands in it."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return True
    if any(data):
        return False
    path.unlink(missing_ok=True)
    return True


def move_delivered(
    folder: Path,
    destinations: Iterable[Mapping[str, Position]],
    *,
    over: Collection[str] = (),
    now_s: float | None = None,
) -> int:
    """Move sealed segments that every destination has passed to delivered/; returns how many. Makes no folder anew.

    `destinations` holds each destination's positions by writer; none at all moves nothing. `over` names the writers of
    a run that is over and delivered everywhere: their frames (names and params, which a restarted shipper needs) go
    too. Not those of a writer that has come since: what lies in delivered/ may be deleted at any time.
    """
    positions = list(destinations)
    if not positions:
        return 0
    moved = 0
    target = folder / DELIVERED
    with contextlib.suppress(FileExistsError):
        target.mkdir(mode=0o700)
    for path in sorted(folder.glob("*.seal")):
        writer, _, number = path.stem.partition("-")
        segment = int(number)
        sealed = read_seal(folder, writer, segment)
        if sealed is None or not all(is_behind(where.get(writer), segment, sealed.slots) for where in positions):
            continue
        for name in (segment_name(writer, segment), seal_name(writer, segment)):
            _move(folder / name, target, now_s)
        moved += 1
    if over:
        waiting = {path.name[:16] for path in folder.glob("*.points")}
        for path in folder.glob("*.frames"):
            if path.name[:16] in over and path.name[:16] not in waiting:
                _move(path, target, now_s)
    return moved


def is_behind(position: Position | None, segment: int, slots: int) -> bool:
    """Whether a destination that stands there has passed all `slots` of a sealed segment. None: it has not begun."""
    if position is None or any(number == segment for number, _ in position.open):
        return False
    return position.segment > segment or (position.segment == segment and position.next >= slots)


def _move(path: Path, target: Path, now_s: float | None) -> None:
    now = time.time() if now_s is None else now_s
    with contextlib.suppress(FileNotFoundError):
        os.utime(path, (now, now))  # its age counts from its delivery
        os.rename(path, target / path.name)


def remove_run(folder: Path) -> None:
    """Delete everything a run has on this host, and its parent folder if that is then empty."""
    shutil.rmtree(folder)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()
