"""Real torchrun: one launch is one run, whatever is killed of it, and all that its ranks were told is logged arrives.

Pattern: torchrun of a real PyTorch starts real ranks (two nodes are two agents, each in a namespace with a host name of
its own); they, or it, are killed; an OTLP receiver says what came. Limit: seven minutes a launch.
"""

from __future__ import annotations

import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import launches
from tests.programs import written
from tests.sinks import HttpSink, until
from tests.trainers.arrived import by_attempt_and_rank, whole
from tests.trainers.environment import TELL, ended, run, started, told
from tracelet.spool import store

TRAIN = (
    TELL
    + """
import signal, sys, tracelet
rank, count = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
exp = tracelet.start_logging(exp_name="launched", project="trainers", backend="otlp")
for step in range(100):
    exp.log_metric("loss", step, iteration=step)
with exp.span("validate"):
    pass
tell(run=exp.id, rank=rank, count=count, pid=os.getpid(), host=os.uname().nodename, left_out=exp.stats.left_out)
"""
)
"""What every rank does first; after its word all of that is acknowledged."""


def torchrun(*words: str) -> list[str]:
    return ["-m", "torch.distributed.run", *words, "train.py"]


def runs(found: list[dict[str, Any]]) -> set[str]:
    return {one["run"] for one in found}


def test_four_ranks_of_one_launch_are_one_run_that_rank_0_logs(tmp_path: Path, sink: HttpSink) -> None:
    written(tmp_path, TRAIN)
    run(tmp_path, *torchrun("--nproc-per-node=4"))
    found = told(tmp_path)
    (run_id,) = runs(found)
    assert sorted((one["rank"], one["left_out"]) for one in found) == [(0, 0), (1, 100), (2, 100), (3, 100)]
    whole(sink, run_id, ["FINISHED"], 100)
    until(lambda: len([span for span in sink.spans() if span.name == "validate"]) == 4, 60)
    assert len({span.trace_id for span in sink.spans()}) == 1


def test_every_rank_logs_where_that_is_asked_for(tmp_path: Path, sink: HttpSink) -> None:
    written(tmp_path, TRAIN)
    run(tmp_path, *torchrun("--nproc-per-node=2"), TRACELET_RANKS="all")
    (run_id,) = runs(told(tmp_path))
    whole(sink, run_id, ["FINISHED"], 200)
    assert sorted((rank, count) for (_, rank), count in by_attempt_and_rank(sink, run_id).items()) == [
        (0, 100),
        (1, 100),
    ]


def test_launches_with_one_rendezvous_id_are_runs_of_their_own_at_once_and_in_turn(
    tmp_path: Path, sink: HttpSink
) -> None:
    written(tmp_path, TRAIN)
    words = torchrun("--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--rdzv-id=100")
    with started(tmp_path, *words) as one, started(tmp_path, *words) as other:
        ended(one, tmp_path)
        ended(other, tmp_path)
    run(tmp_path, *words)
    counted = Counter(one["run"] for one in told(tmp_path))
    assert sorted(counted.values()) == [2, 2, 2]
    for run_id in counted:
        whole(sink, run_id, ["FINISHED"], 100)


TOLD = TELL + "tell(**os.environ)"


def test_the_variables_are_those_that_the_tests_launcher_sets(tmp_path: Path) -> None:
    written(tmp_path, TOLD)
    run(tmp_path, *torchrun("--nproc-per-node=2", "--max-restarts=3", "--rdzv-id=100", "--master-port=0"))
    found = sorted(told(tmp_path), key=lambda one: int(one["RANK"]))
    own = {"MASTER_PORT", "TORCHELASTIC_ERROR_FILE"}  # another one each time
    for one, ours in zip(found, launches.torchrun(2, rdzv_id="100"), strict=True):
        theirs = {name for name in one if name.startswith("TORCH") or name.partition("_")[0] in ROLES} - {BOUND_LAZILY}
        assert theirs | {"OMP_NUM_THREADS"} == ours.keys()
        assert {name: one[name] for name in ours.keys() - own} == {name: ours[name] for name in ours.keys() - own}


ROLES = ("RANK", "LOCAL", "GROUP", "ROLE", "WORLD", "MASTER")
BOUND_LAZILY = "TORCH_USE_RTLD_GLOBAL"  # set by the environment of these tests, not by torchrun


KILLED = (
    TRAIN
    + """
if count == 0:
    if rank == int(sys.argv[1]):
        all_told(2)
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()
"""
)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_that_torchrun_starts_again_is_the_next_attempt_of_the_run(
    tmp_path: Path, sink: HttpSink, rank: int
) -> None:
    written(tmp_path, KILLED)
    run(tmp_path, *torchrun("--nproc-per-node=2", "--max-restarts=1"), str(rank))
    found = told(tmp_path)
    (run_id,) = runs(found)
    assert sorted((one["count"], one["rank"]) for one in found) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    whole(sink, run_id, ["KILLED", "FINISHED"], 200)
    assert sorted(by_attempt_and_rank(sink, run_id).values()) == [100, 100]


LASTING = (
    TRAIN
    + """
while not os.path.exists("go"):
    time.sleep(0.01)
exp.log_metric("loss", 100.0, iteration=100)
"""
)


def test_sigterm_to_torchrun_ends_the_run_as_killed_with_everything_delivered(tmp_path: Path, sink: HttpSink) -> None:
    written(tmp_path, LASTING)
    with started(tmp_path, *torchrun("--nproc-per-node=2")) as launcher:
        until(lambda: len(told(tmp_path)) == 2, 60)
        launcher.send_signal(signal.SIGTERM)
        ended(launcher, tmp_path, code=None)
    (run_id,) = runs(told(tmp_path))
    whole(sink, run_id, ["KILLED"], 100)


def test_ranks_that_outlive_a_killed_torchrun_go_on_with_their_run(tmp_path: Path, sink: HttpSink) -> None:
    written(tmp_path, LASTING)
    with started(tmp_path, *torchrun("--nproc-per-node=2")) as launcher:
        until(lambda: len(told(tmp_path)) == 2, 60)
        launcher.send_signal(signal.SIGKILL)
        ended(launcher, tmp_path, code=-signal.SIGKILL)
        (run_id,) = runs(told(tmp_path))
        (tmp_path / "go").touch()
        whole(sink, run_id, ["FINISHED"], 101)


needs_root = pytest.mark.skipif(
    subprocess.run(["unshare", "--uts", "--mount", "true"], check=False, capture_output=True).returncode != 0,
    reason="needs unshare(1) and permission for host names and mounts of one's own",
)

# A node is a host name of its own, known to both; each has its address on this machine's loopback.
NODE = """#!/bin/sh
set -e
hostname "$1"
printf '127.0.0.1 localhost\\n127.0.0.2 node-a\\n127.0.0.3 node-b\\n' > "hosts-$1"
mount --bind "hosts-$1" /etc/hosts
shift
exec "$@"
"""


@contextmanager
def two_nodes(folder: Path, *words: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Two agents that make one launch of two ranks each, on nodes of their own, over one spool."""
    node = folder / "node.sh"
    node.write_text(NODE)
    node.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.2", 0))
        port = free.getsockname()[1]
    command = [
        *("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--max-restarts=3"),
        *("--rdzv-backend=c10d", "--rdzv-id=100", f"--rdzv-endpoint=node-a:{port}", "train.py", *words),
    ]
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                started(folder, *command, before=("unshare", "--uts", "--mount", str(node), f"node-{name}"))
            )
            for name in "ab"
        ]


@needs_root
def test_two_agents_on_two_nodes_are_one_run(tmp_path: Path, sink: HttpSink) -> None:
    written(tmp_path, TRAIN)
    with two_nodes(tmp_path) as agents:
        for agent in agents:
            ended(agent, tmp_path)
    found = told(tmp_path)
    (run_id,) = runs(found)
    assert sorted((one["rank"], one["host"][:5]) for one in found) == [(rank, "node-") for rank in range(4)]
    assert len({one["host"] for one in found}) == 2
    whole(sink, run_id, ["FINISHED"], 100)


# Ranks on both nodes are killed, one in each of the first two rounds. torchrun's count tells a node only of its own.
KILLED_IN_TURN = (
    TRAIN
    + """
round = (len(open(os.environ["TOLD"]).readlines()) - 1) // 4
if round < 2:
    all_told(4 * round + 4)
    if rank == (2, 0)[round]:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()
"""
)


@needs_root
def test_ranks_killed_on_both_nodes_in_turn_make_further_attempts_of_one_run(tmp_path: Path, sink: HttpSink) -> None:
    written(tmp_path, KILLED_IN_TURN)
    with two_nodes(tmp_path) as agents:
        for agent in agents:
            ended(agent, tmp_path)
    found = told(tmp_path)
    (run_id,) = runs(found)
    for round in range(3):
        assert sorted(one["rank"] for one in found[4 * round : 4 * round + 4]) == [0, 1, 2, 3]
    assert len({one["count"] for one in found[8:]}) == 1  # each node has counted its own failure
    assert len({one["count"] for one in found[4:8]}) == 2
    whole(sink, run_id, ["KILLED", "KILLED", "FINISHED"], 300)
    assert sorted(by_attempt_and_rank(sink, run_id).values()) == [100, 100, 100]
    manifests = [store.read_manifest(folder) for folder in (tmp_path / "spool" / run_id).iterdir()]
    ranks = [[set(one.extra["launch"]["ranks"]) for one in each.attempts] for each in manifests if each is not None]
    assert [sorted(one | other) for one, other in zip(*ranks, strict=True)] == [["0", "1", "2", "3"]] * 3


TRAINED = (
    TELL
    + """
import torch, tracelet
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
exp = tracelet.start_logging(exp_name="launched", project="trainers", backend="otlp")
torch.manual_seed(rank)  # each rank has data of its own; the gradients are of all
x = torch.randn(16, 4)
y = x.sum(dim=1, keepdim=True)
for step in range(10):
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    exp.log_metric("loss", loss, iteration=step)
tell(run=exp.id, rank=rank, weight=model.module.weight.sum().item(), loss=loss.item(), left_out=exp.stats.left_out)
dist.destroy_process_group()
"""
)


def test_a_model_trained_by_two_ranks_over_gloo_is_logged_by_rank_0(tmp_path: Path, sink: HttpSink) -> None:
    written(tmp_path, TRAINED)
    run(tmp_path, *torchrun("--nproc-per-node=2"))
    first, second = sorted(told(tmp_path), key=lambda one: int(one["rank"]))
    assert first["run"] == second["run"]
    assert first["weight"] == second["weight"]  # they have trained together
    assert first["loss"] != second["loss"]
    assert (first["left_out"], second["left_out"]) == (0, 10)
    whole(sink, first["run"], ["FINISHED"], 10)
    points = {point.iteration: point.value for point in sink.points(first["run"])}
    assert list(points) == list(range(10))
    assert points[9] == first["loss"] < points[0]
