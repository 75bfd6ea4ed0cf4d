"""Reads what a launcher says of this process: which rank of which launch it is, if several processes share one run.

Variables are taken as the launchers set them:

* torchrun (torch.distributed.elastic), and whatever else speaks its language (Ray Train, DeepSpeed, Accelerate, a shell
  loop): `RANK` and `WORLD_SIZE`, with `MASTER_ADDR`, `MASTER_PORT`, and from torchrun `LOCAL_RANK`, `LOCAL_WORLD_SIZE`,
  `TORCHELASTIC_RUN_ID` and `TORCHELASTIC_RESTART_COUNT` (which each node counts for itself: only its own failures);
* mpirun of OpenMPI: `OMPI_COMM_WORLD_RANK` and `OMPI_COMM_WORLD_SIZE`, with `OMPI_COMM_WORLD_LOCAL_SIZE` and the names
  that its daemons have for the launch; mpirun of MPICH and what is made of it (Hydra): `PMI_RANK` and `PMI_SIZE`, which
  `srun --mpi=pmi2` sets as well, with `MPI_LOCALNRANKS`, which only Hydra sets;
* srun (srun(1), output environment variables): `SLURM_PROCID` and `SLURM_STEP_NUM_TASKS`, with the ids of cluster, job
  and step. Never `SLURM_NTASKS`, which every shell of `salloc` has, nor what a batch script has of its own. Not beside
  mpirun's: in a job over several nodes mpirun starts a daemon on each by srun, and srun's numbers are the daemons'.

None of them tells two launches apart by itself: `--rdzv-id=100` and port 29500 are in everybody's scripts, a step is
numbered within its job, Hydra has no name for a launch. So all there is goes into the launch's identity, and where all
its processes are on this machine, the process that launched them too. Not Ray's `RAY_JOB_ID`: a worker process that Ray
had started before it was needed has `ffffffff` there, and its neighbour in the same group the job's number.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Launch", "Parentage", "is_above", "parentage", "read"]

_HERE = frozenset({"localhost", "127.0.0.1", "::1"})
_OF_ONE_RANK = ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
_OF_ONE_MPI_RANK = ("OMPI_COMM_WORLD_RANK", "PMIX_NAMESPACE", "PMI_RANK", "PMI_SIZE")

Mark = Mapping[str, str | None]  # variables that set a rank apart, None: it hasn't got this one


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of several processes that share a run, and this process's place in it."""

    rank: int
    world: int
    identity: tuple[str, ...]  # the same in each of its processes, and through restarts; another launch's differs
    restarts: tuple[int, ...]  # how often the launcher has started all of it again, as it tells this process
    all_here: bool  # every process of it runs on this machine
    place: Place | None = None  # where torchrun's agent counts only its own node's failures


@dataclass(frozen=True, slots=True)
class Parentage:
    """Two processes above this one, each by its pid and when it started, in this boot of this machine."""

    launcher: str  # what launched this rank
    worker: str  # what it launched: this process, or a wrapper script around it


@dataclass(frozen=True, slots=True)
class Place:
    """Which worker of which of torchrun's agents this is: another one in the same place is there after a restart."""

    agent: str
    local_rank: int
    worker: str


def read(environ: Mapping[str, str], above: Callable[[Mark], Parentage | None]) -> Launch | None:
    """The launch this process belongs to; None for a process by itself, or where the variables make no sense.

    `above` names the process that launched this one, if it can be known, by what this rank alone has.
    """
    # In a step every process has them; beside one, a batch script has some that its ranks on other nodes don't.
    names = ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_STEP_ID") if environ.get("SLURM_STEP_ID") else ()
    job = tuple(environ.get(name, "") for name in names)
    requeued = _number(environ, "SLURM_RESTART_COUNT") or 0
    place = _place(environ, "RANK", "WORLD_SIZE")
    if place is None:
        if _by_mpirun(environ):
            return _mpirun(environ, above, job, requeued)
        place = _place(environ, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
        if place is None:
            return None
        all_here = _number(environ, "SLURM_STEP_NUM_NODES") == 1
        return Launch(*place, ("srun", *job), (requeued,), all_here)
    elastic = environ.get("TORCHELASTIC_RUN_ID")
    if elastic is None and _by_mpirun(environ):
        launch = _mpirun(environ, above, job, requeued)
        if launch is not None and place == (launch.rank, launch.world):
            return launch  # RANK was set from mpirun's number, as torch's scripts do, and mpirun says more
    master = (environ.get("MASTER_ADDR", ""), environ.get("MASTER_PORT", ""))
    local = _number(environ, "LOCAL_WORLD_SIZE")
    # Two agents may well call the master "localhost": both are on one machine, or its /etc/hosts has it for its name.
    all_here = master[0] in _HERE if local is None else local == place[1]
    by = above({name: environ.get(name) for name in _OF_ONE_RANK}) if all_here or elastic is not None else None
    here = by.launcher if all_here and by is not None else ""
    kind = "ray" if environ.get("RAY_JOB_ID") else "env" if elastic is None else "torchrun"
    if elastic is not None and here:
        master = ("", "")  # its port may change at each restart, and the agent's process says more
    identity = (kind, *job, elastic or "", *master, here)
    restarts = (requeued, _number(environ, "TORCHELASTIC_RESTART_COUNT") or 0)
    spot = None
    if elastic is not None and not all_here and by is not None:
        spot = Place(by.launcher, _number(environ, "LOCAL_RANK") or 0, by.worker)
    return Launch(*place, identity, restarts, all_here, spot)


def _by_mpirun(environ: Mapping[str, str]) -> bool:
    return "OMPI_COMM_WORLD_SIZE" in environ or ("PMI_SIZE" in environ and "MPI_LOCALNRANKS" in environ)


def _mpirun(
    environ: Mapping[str, str],
    above: Callable[[Mark], Parentage | None],
    job: tuple[str, ...],
    requeued: int,
) -> Launch | None:
    """The launch by mpirun; None also where nothing tells it from the next one, which would merge the two."""
    openmpi = "OMPI_COMM_WORLD_SIZE" in environ
    names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE") if openmpi else ("PMI_RANK", "PMI_SIZE")
    place = _place(environ, *names)
    if place is None:
        return None
    all_here = _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE" if openmpi else "MPI_LOCALNRANKS") == place[1]
    parents = above({name: environ.get(name) for name in _OF_ONE_MPI_RANK}) if all_here else None
    by = None if parents is None else parents.launcher
    if openmpi:
        # Not the job: the ranks beside mpirun have no step, those on other nodes have their daemons'.
        called = tuple(environ.get(name, "") for name in ("PMIX_NAMESPACE", "OMPI_MCA_orte_hnp_uri"))
        return Launch(*place, ("openmpi", *called, by or ""), (0,), all_here) if by or any(called) else None
    if by is not None:
        return Launch(*place, ("hydra", by), (0,), all_here)
    if job and _place(environ, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS") is not None:
        return Launch(*place, ("hydra", *job), (requeued,), all_here)  # srun started its daemons, on every node
    return None


def _place(environ: Mapping[str, str], rank_name: str, world_name: str) -> tuple[int, int] | None:
    rank, world = _number(environ, rank_name), _number(environ, world_name)
    return (rank, world) if rank is not None and world is not None and rank < world > 1 else None


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "").strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None


def parentage(mine: Mark, proc: Path = Path("/proc")) -> Parentage | None:
    """Who launched this rank, and what: by pid and start, in this boot of this machine. None: unknown.

    The launcher is the nearest process above that is not of this rank itself, as a wrapper script is: all ranks of a
    launch on one machine have it in common, and through its restarts it stays.
    """
    try:
        boot = (proc / "sys/kernel/random/boot_id").read_text().strip()
        worker, pid = os.getpid(), os.getppid()
        while pid > 1 and _same_rank(proc / str(pid), mine):
            worker, pid = pid, int(_stat(proc / str(pid))[1])
        launcher, launched = (f"{boot}/{one}/{_stat(proc / str(one))[19]}" for one in (pid, worker))
        return Parentage(launcher, launched)
    except (OSError, ValueError, IndexError):
        return None  # no /proc (macOS), or a parent that has just gone


def is_above(pid: int | None, proc: Path = Path("/proc")) -> bool:
    """Whether that process started this one, or one above it; without /proc (macOS) only the parent is known."""
    above = os.getppid()
    try:
        while above != pid and above > 1:
            above = int(_stat(proc / str(above))[1])
    except (OSError, ValueError, IndexError):
        return False
    return above == pid


def _same_rank(process: Path, mine: Mark) -> bool:
    try:
        words = (process / "environ").read_bytes().split(b"\0")
    except PermissionError:
        return False  # another user's: no wrapper of ours
    theirs = dict(word.decode("utf-8", "surrogateescape").partition("=")[::2] for word in words)
    return all(theirs.get(name) == value for name, value in mine.items())


def _stat(process: Path) -> list[str]:
    """The fields of /proc/PID/stat from the third one on: proc(5) counts state as 3, ppid as 4, starttime as 22."""
    return (process / "stat").read_text().rpartition(")")[2].split()
