"""The Job of examples/kubernetes/job.yaml, run as Kubernetes runs it: its commands and variables, its signals in order.

Pattern: the sidecar is started first, then the program; they are processes that share a folder. There is no Kubernetes
here: what stands in the manifest is checked against Kubernetes' own schema. Limit: a minute a test.
"""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import hosts
from tests.crash.clocks import other_clocks
from tests.crash.test_sidecar import namespace, points
from tests.shipping import until
from tests.sinks import HttpSink, Received, Say
from tests.stack.harness import lacking
from tracelet.settings import parse_duration, parse_size

LIMIT_S = 60.0
JOB = Path(__file__).parents[2] / "examples" / "kubernetes" / "job.yaml"
UID = "6f1c2b7e-5a0d-4f5e-9d55-0c8a4e3b2a10"  # what the API server would put into the label

TRAIN = """
import sys, time, tracelet
exp = tracelet.start_logging(exp_name="job", project="kubernetes")
exp.log_params({"lr": 0.1})
for i in range(5000):
    exp.log_metric("loss", 1 / (i + 1), iteration=i)
print("logged", flush=True)
if sys.argv[1:] == ["wait"]:
    time.sleep(600)
tracelet.stop_logging()
"""


@pytest.fixture(scope="module")
def job() -> Any:
    return yaml.safe_load(JOB.read_text())


def pod(job: Any) -> Any:
    return job["spec"]["template"]["spec"]


def containers(job: Any) -> tuple[Any, Any]:
    """The sidecar and the program."""
    (sidecar,), (train,) = pod(job)["initContainers"], pod(job)["containers"]
    return sidecar, train


def plain(container: Any) -> dict[str, str]:
    return {one["name"]: one["value"] for one in container["env"] if "value" in one}


class Cluster:
    """As much of a node as the Job sees: its volume, its Secret, its label, and the collector's address."""

    def __init__(self, job: Any, tmp_path: Path, sink: HttpSink) -> None:
        self.job, self.volume, self.sink = job, tmp_path / "volume", sink
        self.volume.mkdir(mode=0o777)
        (tmp_path / "image").mkdir()
        self.image = tmp_path / "image"
        (self.image / "train.py").write_text(TRAIN)

    def environ(self, container: Any) -> dict[str, str]:
        # The image's own: its interpreter and what is installed.
        names = ("PYTHONPATH", "HOME", "LANG")
        given = {name: os.environ[name] for name in names if name in os.environ}
        given["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        for one in container["env"]:
            given[one["name"]] = one["value"] if "value" in one else self.looked_up(one["valueFrom"])
        (mount,) = container["volumeMounts"]
        given["TRACELET_DIR"] = given["TRACELET_DIR"].replace(mount["mountPath"], str(self.volume))
        if "OTEL_EXPORTER_OTLP_ENDPOINT" in given:
            given["OTEL_EXPORTER_OTLP_ENDPOINT"] = self.sink.url
        return given

    @staticmethod
    def looked_up(source: Any) -> str:
        if "secretKeyRef" in source:
            return "Authorization=Bearer%20s3cret"
        assert source["fieldRef"]["fieldPath"] == "metadata.labels['batch.kubernetes.io/controller-uid']"
        return UID

    @contextmanager
    def started(
        self, container: Any, *words: str, on: str = "", faster: float = 1.0
    ) -> Iterator[subprocess.Popen[str]]:
        """A container, by its own command; `on` a node, in a Pod of that name. `faster`: how much its clock is."""
        clocks = other_clocks(self.image.parent / f"clocks-{faster}", faster=faster)
        process = subprocess.Popen(
            [*(hosts.words_for(self.image, on) if on else ()), *container["command"], *words],
            env=self.environ(container) | clocks,
            cwd=self.image,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


@pytest.fixture
def cluster(job: Any, tmp_path: Path, otlp_sink: HttpSink) -> Cluster:
    return Cluster(job, tmp_path, otlp_sink)


def line_of(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdout is not None
    said = ""
    while word not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    return said


def rest_of(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=LIMIT_S)
    return said


def test_the_manifest_is_valid_by_kubernetes_own_schema(job: Any) -> None:
    import kubernetes_validate

    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


def shown() -> Any:
    """The guide's excerpts."""
    page = (Path(__file__).parents[2] / "docs" / "guide" / "kubernetes.md").read_text()
    return [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)]


def test_the_guides_excerpt_says_nothing_else_than_the_manifest(job: Any) -> None:
    excerpt, _ = shown()
    assert_within(excerpt["spec"], pod(job))


def test_the_manifest_with_the_guides_claim_in_it_is_valid_and_keeps_runs_in_a_folder_of_their_job(job: Any) -> None:
    import kubernetes_validate

    _, claim = shown()
    claimed = copy.deepcopy(job)
    pod(claimed)["volumes"] = claim["volumes"]
    for container in containers(claimed):
        container["volumeMounts"] = claim["volumeMounts"]
        container["env"] += claim["env"]
    kubernetes_validate.validate(claimed, kubernetes_validate.latest_version(), strict=True)
    (volume,), (mount,), (variable,) = claim["volumes"], claim["volumeMounts"], claim["env"]
    assert (volume["name"], mount["mountPath"]) == ("spool", "/spool")
    assert mount["subPathExpr"] == f"$({variable['name']})"


def assert_within(part: Any, whole: Any) -> None:
    """Each thing of `part` stands in `whole`; of a list, by name."""
    if isinstance(part, dict):
        for key, value in part.items():
            assert_within(value, whole[key])
    elif isinstance(part, list) and part and isinstance(part[0], dict):
        named = {one["name"]: one for one in whole}
        for one in part:
            assert_within(one, named[one["name"]])
    else:
        assert part == whole


def test_both_containers_share_folder_and_user_and_the_ends_fit_into_the_grace_period(job: Any) -> None:
    sidecar, train = containers(job)
    assert sidecar["restartPolicy"] == "Always"
    assert sidecar["volumeMounts"] == train["volumeMounts"]
    assert plain(sidecar)["TRACELET_DIR"] == plain(train)["TRACELET_DIR"]
    assert "securityContext" not in sidecar | train  # the Pod's, for both
    assert pod(job)["securityContext"]["runAsUser"]
    assert parse_duration(plain(sidecar)["TRACELET_GRACE"]) < pod(job)["terminationGracePeriodSeconds"]
    (volume,) = pod(job)["volumes"]
    assert parse_size(plain(train)["TRACELET_MAX_BYTES"]) < parse_size(
        volume["emptyDir"]["sizeLimit"].replace("Gi", "GiB")
    )


def test_process_1_that_handles_no_sigterm_goes_on_which_is_why_the_pod_shares_its_namespace(tmp_path: Path) -> None:
    if not namespace():
        lacking("no PID namespace can be made here")
    code = "import tracelet; tracelet.start_logging(backend='file'); print('logged', flush=True); print(input())"
    process = subprocess.Popen(
        [*namespace(), sys.executable, "-c", code],
        env={**os.environ, "TRACELET_SHIPPER": "off"},
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        line_of(process, "logged")
        (inside,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(inside), signal.SIGTERM)
        said, _ = process.communicate("still there\n", timeout=LIMIT_S)
        assert said == "still there\n"
    finally:
        process.kill()
        process.communicate()


def test_a_job_that_ends_is_delivered_with_its_end_when_the_sidecar_has_its_sigterm(cluster: Cluster) -> None:
    sidecar, train = containers(cluster.job)
    with cluster.started(sidecar) as shipper:
        line_of(shipper, "follows")
        with cluster.started(train) as program:
            assert program.wait(LIMIT_S) == 0, rest_of(program)
        shipper.send_signal(signal.SIGTERM)
        said = rest_of(shipper)
        assert shipper.returncode == 0, said
    assert points(cluster.sink, UID) == list(range(5000))
    assert cluster.sink.ends(UID) == ["FINISHED"]
    assert {r.headers.get("authorization") for r in cluster.sink.stored} == {"Bearer s3cret"}


def test_a_deleted_pod_leaves_its_run_killed_and_the_next_pod_goes_on_with_it(cluster: Cluster) -> None:
    """SIGTERM to the program first, to the sidecar once it is gone; then a Pod in the place of this one."""
    sidecar, train = containers(cluster.job)
    assert pod(cluster.job)["shareProcessNamespace"] is True  # else the program would be process 1, and stay
    with cluster.started(sidecar) as shipper, cluster.started(train, "wait") as program:
        line_of(shipper, "follows")
        line_of(program, "logged")
        program.send_signal(signal.SIGTERM)
        assert program.wait(LIMIT_S) == -signal.SIGTERM
        shipper.send_signal(signal.SIGTERM)
        said = rest_of(shipper)
        assert shipper.returncode == 0, said
    assert points(cluster.sink, UID) == list(range(5000))
    assert cluster.sink.ends(UID) == ["KILLED"]
    with cluster.started(sidecar) as shipper, cluster.started(train) as program:
        until(lambda: len(cluster.sink.ends(UID)) == 2, LIMIT_S)
        assert program.wait(LIMIT_S) == 0
    assert cluster.sink.ends(UID) == ["KILLED", "FINISHED"]
    assert points(cluster.sink, UID) == [*range(5000), *range(5000)]


def has_points(received: Received) -> bool:
    """Whether a request has points of the program's own."""
    resources = received.message.resource_metrics if received.signal == "metrics" else ()
    return any(scope.scope.name == "tracelet" for resource in resources for scope in resource.scope_metrics)


def test_a_killed_sidecar_that_kubernetes_starts_again_loses_nothing_and_sends_what_it_repeats_unchanged(
    cluster: Cluster,
) -> None:
    sidecar, train = containers(cluster.job)
    unanswered = [Say(hang_s=600.0)]  # taken, and the answer does not come
    cluster.sink.rule = lambda received: unanswered.pop() if unanswered and has_points(received) else None
    with cluster.started(train, "wait") as program:
        with cluster.started(sidecar) as killed:
            until(lambda: points(cluster.sink, UID), LIMIT_S)
            killed.kill()
            killed.wait(LIMIT_S)
        with cluster.started(sidecar) as shipper:
            line_of(program, "logged")
            program.send_signal(signal.SIGTERM)
            assert program.wait(LIMIT_S) == -signal.SIGTERM
            line_of(shipper, "follows")
            shipper.send_signal(signal.SIGTERM)
            said = rest_of(shipper)
            assert shipper.returncode == 0, said
    assert sorted(set(points(cluster.sink, UID))) == list(range(5000))
    assert len(set(cluster.sink.points(UID))) == 5000  # what is there twice has the same times
    assert len(points(cluster.sink, UID)) > 5000
    assert cluster.sink.ends(UID) == ["KILLED"]


@pytest.mark.parametrize("end", ["deleted", "lost with its node"])
def test_what_a_pod_could_not_deliver_into_a_claim_the_next_pods_sidecar_takes_up(cluster: Cluster, end: str) -> None:
    """With the destination down beyond the grace period; the next Pod is another host, on another node."""
    if not hosts.can_be_made(cluster.image):
        pytest.skip("namespaces for a host's name and files can't be made here")
    sidecar, train = containers(cluster.job)
    cluster.sink.rule = lambda _: Say(503)
    with (
        cluster.started(sidecar, on="train-7xk2p", faster=20) as shipper,
        cluster.started(train, "wait", on="train-7xk2p") as program,
    ):
        line_of(program, "logged")
        line_of(shipper, "ships it")
        if end == "deleted":
            program.send_signal(signal.SIGTERM)
            assert program.wait(LIMIT_S) == -signal.SIGTERM
            shipper.send_signal(signal.SIGTERM)
            said = rest_of(shipper)  # the 40 s of its grace are two here
            assert shipper.returncode == 1, said
            assert "Something is left" in said
        else:
            until(lambda: list(cluster.volume.rglob("lease.json")), LIMIT_S)
            shipper.kill()
            program.kill()
    assert cluster.sink.stored == []
    cluster.sink.rule = None
    with (
        cluster.started(sidecar, on="train-q9v4d", faster=20) as shipper,
        cluster.started(train, on="train-q9v4d") as program,
    ):
        assert program.wait(LIMIT_S) == 0
        until(lambda: len(cluster.sink.ends(UID)) == 2, LIMIT_S)
        shipper.send_signal(signal.SIGTERM)
        said = rest_of(shipper)
        assert shipper.returncode == 0, said
    assert sorted(points(cluster.sink, UID)) == sorted([*range(5000), *range(5000)])
    assert sorted(cluster.sink.ends(UID)) == ["FINISHED", "KILLED"]
