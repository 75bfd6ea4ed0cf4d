"""Real Ray: a trial is a run, a training of several workers is one, and neither needs the cluster to outlive it.

Pattern: programs that start clusters of a real Ray on this machine, whose tasks, actors and Ray Train workers log, and
are killed by Ray or by the kernel; an OTLP receiver says what came. Limit: seven minutes a program.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import launches
from tests.conftest import processes_of
from tests.programs import written
from tests.sinks import HttpSink, until
from tests.trainers.arrived import whole
from tests.trainers.environment import TELL, ended, run, started, told

CLUSTER = (
    TELL
    + """
import signal, sys, ray, tracelet

def cluster():  # the paths of its sockets have to be short; nothing of it listens but on the loopback
    return ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False,
        _temp_dir=os.environ["RAY_FILES"], _node_ip_address="127.0.0.1",
    )
"""
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The test's folder; what clusters write goes elsewhere, and no token of theirs into the user's home."""
    files = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    monkeypatch.setenv("RAY_FILES", files)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")  # a busy machine is none of our subjects
    yield tmp_path
    shutil.rmtree(files, ignore_errors=True)


TRIALS = (
    CLUSTER
    + """
def train(number, run_id=None):
    exp = tracelet.start_logging(exp_name=f"trial {number}", project="trainers", backend="otlp", run_id=run_id)
    for step in range(10):
        exp.log_metric("loss", number + step, iteration=step)
    return exp.id

@ray.remote(num_cpus=0.1, max_retries=0)
def trial(number, run_id=None):
    train(number, run_id)
    tracelet.stop_logging()

@ray.remote(num_cpus=0.1, max_retries=0)
def killed(number):
    tell(run=train(number), end="KILLED")
    os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory is out

@ray.remote(num_cpus=0.1)
class Trainer:
    def __init__(self, number, end):
        self.run = train(number)
        tell(run=self.run, end=end)
    def stop(self):
        tracelet.stop_logging()

cluster()
@ray.remote(num_cpus=0.1)
def numbered(number):
    tell(run=train(number), end="FINISHED")
    tracelet.stop_logging()

ray.get([numbered.remote(number) for number in range(10)])
for number in range(2):
    ray.get(trial.remote(number, "named"))
try:
    ray.get(killed.remote(10))
except ray.exceptions.WorkerCrashedError:
    tell(crashed=True)
one, other = Trainer.remote(11, "KILLED"), Trainer.remote(12, "FINISHED")
ray.get([other.stop.remote(), one.__ray_ready__.remote()])
ray.kill(one)
ray.shutdown()
"""
)


def test_every_trial_is_a_run_whether_it_ends_or_its_worker_is_killed(here: Path, sink: HttpSink) -> None:
    written(here, TRIALS)
    run(here, "train.py")
    assert {"crashed": True} in told(here)
    runs = {one["run"]: one["end"] for one in told(here) if "run" in one}
    assert sorted(runs.values()) == ["FINISHED"] * 11 + ["KILLED"] * 2
    for run_id, end in runs.items():
        whole(sink, run_id, [end], 10)
    whole(sink, "named", ["FINISHED"] * 2, 20)  # under one id they are attempts of one run
    until(lambda: not processes_of(str(here)), 60)


TRAINED = (
    CLUSTER
    + """
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

def train(config):
    import torch
    import torch.distributed as dist
    exp = tracelet.start_logging(exp_name="trained", project="trainers", backend="otlp")
    for step in range(10):
        total = torch.tensor(float(step + dist.get_rank()))
        dist.all_reduce(total)
        exp.log_metric("loss", total, iteration=step)
    tell(run=exp.id, rank=dist.get_rank(), which=config["which"], left_out=exp.stats.left_out, environ=dict(os.environ))
    tracelet.stop_logging()

for turn in range(int(sys.argv[2])):  # one cluster after the other
    cluster()
    which = f"{sys.argv[1]} {turn}"
    TorchTrainer(
        train,
        train_loop_config={"which": which},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name=which, storage_path=os.environ["RAY_FILES"]),
    ).fit()
    ray.shutdown()
"""
)


OWN = {"MASTER_ADDR", "MASTER_PORT", "RAY_JOB_ID", "RAY_RAYLET_PID"}
"""Variables of a Ray Train worker that are others each time."""


def test_trainings_of_two_workers_are_one_run_each_in_clusters_at_once_and_in_turn(here: Path, sink: HttpSink) -> None:
    written(here, TRAINED)
    with started(here, "train.py", "one", "2") as one, started(here, "train.py", "other", "1") as other:
        ended(one, here)
        ended(other, here)
    found = told(here)
    trainings = ("one 0", "one 1", "other 0")
    assert sorted((each["which"], each["rank"], each["left_out"]) for each in found) == [
        (which, rank, 10 * rank) for which in trainings for rank in range(2)
    ]
    for each in found:
        ours = launches.ray(2)[each["rank"]]
        assert ours.keys() <= each["environ"].keys()
        theirs = {name: each["environ"][name] for name in ours.keys() - OWN}
        assert theirs == {name: ours[name] for name in theirs}
        assert each["environ"]["RAY_JOB_ID"] in ("01000000", "ffffffff")
    runs = {(each["which"], each["run"]) for each in found}
    assert sorted(which for which, _ in runs) == list(trainings)
    assert len({run_id for _, run_id in runs}) == 3
    for _, run_id in runs:
        whole(sink, run_id, ["FINISHED"], 10)
        assert [point.value for point in sink.points(run_id)] == [float(2 * step + 1) for step in range(10)]
