"""Launchers: which variables make several processes one launch, and which never do."""

from __future__ import annotations

import os
from collections.abc import Mapping

import pytest

from tests import launches
from tracelet.core.launchers import Launch, Parentage, parentage, read


def launch_of(environ: Mapping[str, str], by: str | None = None) -> Launch | None:
    return read(environ, lambda _: None if by is None else Parentage(by, "boot/20/1"))


@pytest.mark.parametrize(
    "workers",
    [
        launches.torchrun(4),
        launches.torchrun(4, rdzv_id="100", address="node-0", here=2),
        launches.torchrun(4, rdzv_id="100", address="localhost", here=2),
        launches.srun(4),
        launches.srun(4, nodes=2),
        launches.ray(4),
        launches.mpirun(4),
        launches.mpirun(4, here=2),
        launches.mpirun(4, hydra=True),
        # over the nodes of a job mpirun has a daemon on each, which srun has started, or not where mpirun itself is
        [
            {**srun, **rank}
            for srun, rank in zip([{}, {}, *2 * launches.srun(1)], launches.mpirun(4, here=2), strict=True)
        ],
        [
            {**srun, **rank}
            for srun, rank in zip(
                [one for one in launches.srun(2, nodes=2) for _ in range(2)],
                launches.mpirun(4, hydra=True, here=2),
                strict=True,
            )
        ],
        # RANK set from mpirun's number, by a program that torch is to find its ranks in
        [{"RANK": str(rank), "WORLD_SIZE": "4", **one} for rank, one in enumerate(launches.mpirun(4, here=2))],
    ],
)
def test_the_processes_of_one_launch_know_the_same_and_each_its_rank(workers: launches.Environs) -> None:
    found = [launch_of(one, "boot/1/1") for one in workers]
    assert len({(one.identity, one.restarts, one.world) for one in found if one is not None}) == 1
    assert [one.rank for one in found if one is not None] == list(range(len(workers)))


@pytest.mark.parametrize(
    "environ",
    [
        {},
        launches.batch(tasks=8),  # ten trials in one allocation, each a plain process of the batch script
        {name: value for name, value in launches.batch(tasks=8).items() if name != "SLURM_PROCID"},  # a shell of salloc
        launches.srun(1)[0],  # srun --pty bash, and one trial a step
        launches.torchrun(1)[0],
        {"RANK": "0"},
        {"RANK": "4", "WORLD_SIZE": "4"},
        {"RANK": "-1", "WORLD_SIZE": "4"},
        {"RANK": "first", "WORLD_SIZE": "many"},
        {"RANK": "", "WORLD_SIZE": "4"},
        {"LOCAL_RANK": "1", "WORLD_SIZE": "4"},
        {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"},
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"},  # of no launch that has a name
        launches.mpirun(1)[0],
        {**launches.srun(2, nodes=2)[1], **launches.mpirun(1)[0]},  # srun's numbers are those of mpirun's daemons
        # Hydra over several machines by ssh: no name of the launch, no process that all its ranks have above them
        launches.mpirun(4, hydra=True, here=2)[0],
        {**launches.srun(1)[0], **launches.mpirun(4, hydra=True, here=2)[0]},  # in a shell by `srun --pty`
        {"PMI_RANK": "1", "PMI_SIZE": "4"},
    ],
)
def test_a_process_by_itself_is_no_part_of_a_launch(environ: Mapping[str, str]) -> None:
    assert launch_of(environ) is None


@pytest.mark.parametrize(
    ("one", "by", "other", "by_other"),
    [
        # --rdzv-id=100 and port 29500 are in everybody's scripts: the agents are two processes
        (launches.torchrun(4, rdzv_id="100"), "boot/10/1", launches.torchrun(4, rdzv_id="100"), "boot/11/2"),
        # on several machines each rendezvous has a port of its own
        (
            launches.torchrun(4, rdzv_id="100", address="a", port=40001, here=2),
            None,
            launches.torchrun(4, rdzv_id="100", address="a", port=40002, here=2),
            None,
        ),
        (launches.srun(4, step=0), None, launches.srun(4, step=1), None),
        (launches.srun(4, job="1"), None, launches.srun(4, job="2"), None),
        # two Ray clusters, each at its first job; and two trials of one job
        (launches.ray(2, address="10.0.0.1"), None, launches.ray(2, address="10.0.0.2"), None),
        (launches.ray(2), "boot/10/1", launches.ray(2), "boot/11/2"),
        (launches.ray(2, port=40001), "boot/10/1", launches.ray(2, port=40002), "boot/10/1"),
        # mpirun counts its launches by its pid, each machine for itself
        (launches.mpirun(2), "boot/10/1", launches.mpirun(2), "boot/11/2"),
        (launches.mpirun(4, here=2, job="100"), None, launches.mpirun(4, here=2, job="200"), None),
        (launches.mpirun(2, hydra=True), "boot/10/1", launches.mpirun(2, hydra=True), "boot/11/2"),
    ],
)
def test_two_launches_never_know_the_same(
    one: launches.Environs, by: str | None, other: launches.Environs, by_other: str | None
) -> None:
    first, second = launch_of(one[0], by), launch_of(other[0], by_other)
    assert first is not None
    assert second is not None
    assert first.identity != second.identity


def test_two_agents_on_one_machine_are_one_launch_also_where_the_master_is_localhost() -> None:
    workers = launches.torchrun(4, rdzv_id="100", address="localhost", here=2)
    one, other = launch_of(workers[0], "boot/10/1"), launch_of({**workers[1], "RANK": "2"}, "boot/11/2")
    assert one is not None
    assert other is not None
    assert one.identity == other.identity
    assert not one.all_here


def test_clusters_number_their_jobs_each_for_itself() -> None:
    (mine, _), (theirs, _) = launches.srun(2), launches.srun(2)
    theirs["SLURM_CLUSTER_NAME"] = "another"
    first, second = launch_of(mine), launch_of(theirs)
    assert first is not None
    assert second is not None
    assert first.identity != second.identity


def test_a_restart_keeps_the_identity_and_is_counted_also_where_the_port_changes() -> None:
    before = launch_of(launches.torchrun(4, port=40001)[0], "boot/10/1")
    after = launch_of(launches.torchrun(4, port=40002, restarts=1)[0], "boot/10/1")
    assert before is not None
    assert after is not None
    assert (before.identity, before.restarts, after.restarts) == (after.identity, (0, 0), (0, 1))
    first, requeued = launch_of(launches.srun(4)[0]), launch_of(launches.srun(4, restarts=1)[0])
    assert first is not None
    assert requeued is not None
    assert (first.identity, first.restarts, requeued.restarts) == (requeued.identity, (0,), (1,))


def test_srun_is_believed_where_its_pmi_sets_what_mpirun_sets() -> None:
    plain = [launch_of(one) for one in launches.srun(2)]
    pmi2 = [launch_of({**one, "PMI_RANK": one["SLURM_PROCID"], "PMI_SIZE": "2"}) for one in launches.srun(2)]
    assert plain == pmi2


def test_mpiruns_ranks_in_a_requeued_job_are_a_new_launch_by_openmpi_and_the_same_by_hydra_over_nodes() -> None:
    steps = [launches.srun(2, nodes=2, restarts=restarts)[0] for restarts in (None, 1)]
    first, again = (launch_of({**step, **launches.mpirun(4, hydra=True, here=2)[0]}) for step in steps)
    assert first is not None
    assert again is not None
    assert (first.identity, first.restarts, again.restarts) == (again.identity, (0,), (1,))


def test_the_launcher_is_the_parent_where_it_is_no_rank_itself() -> None:
    found = parentage({"RANK": "0", "WORLD_SIZE": "2"})
    assert found is not None
    assert [one.split("/")[1] for one in (found.launcher, found.worker)] == [str(os.getppid()), str(os.getpid())]
