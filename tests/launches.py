"""What launchers set in the processes they start, and a launcher for tests that does it.

torchrun: as seen in the ranks of PyTorch 2.15.0, with which tests/trainers/test_torchrun.py compares it. Ray Train: as
seen in the workers of Ray 2.60.0, compared by tests/trainers/test_ray.py. srun and sbatch, mpirun of OpenMPI and MPICH:
seen in SLURM 22.05, OpenMPI 4.1 and MPICH 4.0, and held by tests/launchers/test_slurm.py and test_mpirun.py beside it,
where they run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

LAUNCHER = """
import json, os, subprocess, sys
command, rounds = json.loads(sys.argv[1])
for workers in rounds:
    started = [subprocess.Popen(command, env={**os.environ, **one}) for one in workers]
    codes = [one.wait() for one in started]
"""

Environs = list[dict[str, str]]


def torchrun(
    world: int,
    *,
    rdzv_id: str = "none",
    restarts: int = 0,
    address: str = "127.0.0.1",
    port: int = 29500,
    here: int = 0,
) -> Environs:
    """The workers of one agent, by rank; `here` of them where the launch has other machines too.

    Address and id are those of a launch with `--master-port`; with no arguments at all they are "localhost", a free
    port, and a random id. `restarts` are those that this very agent has counted.
    """
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "ROLE_RANK": str(rank),
            "ROLE_NAME": "default",
            "LOCAL_WORLD_SIZE": str(here or world),
            "WORLD_SIZE": str(world),
            "GROUP_WORLD_SIZE": str(world // (here or world)),
            "ROLE_WORLD_SIZE": str(world),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RESTART_COUNT": str(restarts),
            "TORCHELASTIC_ERROR_FILE": f"/tmp/torchelastic/{rdzv_id}/attempt_{restarts}/{rank}/error.json",
            "TORCHELASTIC_MAX_RESTARTS": "3",
            "TORCHELASTIC_RUN_ID": rdzv_id,
            "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
            "OMP_NUM_THREADS": "1",
        }
        for rank in range(here or world)
    ]


def batch(*, job: str = "4711", tasks: int = 4, restarts: int | None = None) -> dict[str, str]:
    """What a batch script has; a shell of salloc has the same, without the rank."""
    found = {
        "SLURM_CLUSTER_NAME": "cluster",
        "SLURM_JOB_ID": job,
        "SLURM_NTASKS": str(tasks),
        "SLURM_NNODES": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }
    return found if restarts is None else {**found, "SLURM_RESTART_COUNT": str(restarts)}


def srun(tasks: int, *, job: str = "4711", step: int = 0, nodes: int = 1, restarts: int | None = None) -> Environs:
    """The tasks of one step, as many on each node."""
    here = tasks // nodes
    return [
        {
            **batch(job=job, tasks=tasks, restarts=restarts),
            "SLURM_NNODES": str(nodes),
            "SLURM_STEP_ID": str(step),
            "SLURM_STEPID": str(step),
            "SLURM_STEP_NUM_TASKS": str(tasks),
            "SLURM_STEP_NUM_NODES": str(nodes),
            "SLURM_PROCID": str(task),
            "SLURM_LOCALID": str(task % here),
            "SLURM_NODEID": str(task // here),
        }
        for task in range(tasks)
    ]


def mpirun(world: int, *, hydra: bool = False, job: str = "428408833", here: int = 0) -> Environs:
    """The ranks of one launch by OpenMPI's mpirun, or by Hydra's; `here` of them on each machine."""
    local = here or world
    if hydra:
        return [
            {
                "PMI_RANK": str(rank),
                "PMI_SIZE": str(world),
                "PMI_FD": str(6 + 2 * (rank % local)),
                "MPI_LOCALNRANKS": str(local),
                "MPI_LOCALRANKID": str(rank % local),
            }
            for rank in range(world)
        ]
    return [
        {
            "OMPI_COMM_WORLD_RANK": str(rank),
            "OMPI_COMM_WORLD_SIZE": str(world),
            "OMPI_COMM_WORLD_LOCAL_RANK": str(rank % local),
            "OMPI_COMM_WORLD_LOCAL_SIZE": str(local),
            "PMIX_NAMESPACE": job,
            "PMIX_RANK": str(rank),
            "OMPI_MCA_orte_hnp_uri": f"{int(job) - 1}.0;tcp://10.0.0.1:36657",
        }
        for rank in range(world)
    ]


def ray(world: int, *, address: str = "10.0.0.1", port: int = 40001, job: str = "01000000") -> Environs:
    """The workers of one Ray Train trial on one machine. Ray counts its jobs from 1 in each cluster.

    A process that Ray had started before it was needed, as here rank 0's, has no job's number.
    """
    return [
        {
            "RAY_JOB_ID": job if rank else "ffffffff",
            "RAY_RAYLET_PID": "4242",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "NODE_RANK": "0",
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
        }
        for rank in range(world)
    ]


def start(folder: Path, command: Sequence[str], *rounds: Environs, **environ: str) -> subprocess.Popen[str]:
    """A launcher that starts the workers of the first round, waits for them, and goes on with the next."""
    asked = json.dumps([list(command), rounds])
    inherited: Mapping[str, str] = {**os.environ, **environ}
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, asked],
        cwd=folder,
        env=dict(inherited),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def done(launcher: subprocess.Popen[str], limit_s: float = 120.0) -> str:
    """What a launch printed, once it is over."""
    try:
        out, err = launcher.communicate(timeout=limit_s)
    finally:
        launcher.kill()
    assert launcher.returncode == 0, err
    assert "Traceback" not in err, err
    return out
