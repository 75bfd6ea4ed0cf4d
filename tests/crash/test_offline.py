"""No receiver for ten minutes, no network for a week, or on no node of a cluster: runs wait, and all is delivered.

Pattern: real programs and their shippers over a receiver that refuses or a wire that is cut, or in a namespace without
a network, where no address can be reached and no name be resolved; their clocks run faster, and each may stand on a
later day. The cluster's commands are those of the guide's page. Limit: a minute a program.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import hosts
from tests.conftest import processes_of
from tests.crash.clocks import other_clocks
from tests.crash.test_sidecar import points
from tests.programs import LIMIT_S, said, started, written
from tests.shipping import until
from tests.sinks import GrpcSink, HttpSink, Sink
from tests.spooled import folder_of
from tests.stack.harness import lacking
from tests.wire import Wire
from tracelet.spool.lease import shipper_alive

DAY_NS = 86_400 * 10**9

TRAIN = """
import sys, tracelet
for run_id in sys.argv[1:]:
    exp = tracelet.start_logging(exp_name="job", project="laptop", run_id=run_id)
    for i in range(1000):
        exp.log_metric("loss", 1 / (i + 1), iteration=i)
    tracelet.stop_logging()
"""


@pytest.fixture(autouse=True)
def no_network(tmp_path: Path) -> None:
    if not hosts.can_be_made(tmp_path):
        lacking("a namespace without a network can't be made here")


def on_day(
    day: int, tmp_path: Path, endpoint: str, *words: str, before: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """A command on that day, its ten minutes a second and a half long."""
    clocks = other_clocks(tmp_path / f"clocks-{day}", faster=400, days=day)
    return subprocess.run(
        [*before, sys.executable, *words],
        env={**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, **clocks},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )


def test_a_week_of_runs_is_named_at_the_next_start_and_delivered_by_one_command(
    tmp_path: Path, clean_environment: Path, otlp_sink: HttpSink
) -> None:
    named = otlp_sink.url.replace("127.0.0.1", "collector.test")
    faults = {0: "Network is unreachable", 2: "Temporary failure in name resolution", 5: "Network is unreachable"}
    for day, fault in faults.items():
        endpoint = named if "name" in fault else otlp_sink.url
        done = on_day(day, tmp_path, endpoint, "-c", TRAIN, f"day-{day}", before=hosts.WITHOUT_NETWORK)
        assert "1,000 points still on the way to otlp" in done.stderr
        # Ten minutes after the end, without progress, its shipper leaves: a closed lid finds no process.
        until(lambda: not processes_of(str(tmp_path)), LIMIT_S)
        assert fault in (folder_of(clean_environment, f"day-{day}") / "shipper.log").read_text()
    assert otlp_sink.requests == []

    done = on_day(7, tmp_path, otlp_sink.url, "-c", TRAIN, "home-1", "home-2")
    (told,) = re.findall(
        r"^3 earlier runs wait in (\S+), .*: (day-\d), (day-\d), (day-\d)\. ", done.stderr, re.MULTILINE
    )
    assert told[0] == str(clean_environment)
    assert done.stderr.count("earlier run") == 1  # not again at the program's second start
    assert sorted(told[1:]) == ["day-0", "day-2", "day-5"]
    assert points(otlp_sink, "day-0") == []  # a new run's shipper is no other's

    names = hosts.Names(tmp_path)
    names.add("collector.test", "127.0.0.1")
    on_day(8, tmp_path, otlp_sink.url, "-m", "tracelet", "ship", before=names.words)
    for day in (0, 2, 5):
        run_id = f"day-{day}"
        assert points(otlp_sink, run_id) == list(range(1000))
        assert otlp_sink.ends(run_id) == ["FINISHED"]
    first, last = (otlp_sink.points(f"day-{day}")[0].time_unix_nano for day in (0, 5))
    assert 5 * DAY_NS <= last - first < 6 * DAY_NS  # each value has the time at which it was logged
    listed = on_day(8, tmp_path, otlp_sink.url, "-m", "tracelet", "runs", "--json")
    assert {run["undelivered"] for run in json.loads(listed.stdout)} == {False}
    done = on_day(9, tmp_path, otlp_sink.url, "-c", TRAIN, "home-3")
    assert "earlier run" not in done.stderr


# ---- a cluster whose nodes have no way out -----------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "offline.md"

JOB = """
import errno, os, socket, sys, tracelet
port = int(os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"].rpartition(":")[2])
assert socket.socket().connect_ex(("127.0.0.1", port)) == errno.ENETUNREACH
exp = tracelet.start_logging(exp_name="job", project="cluster")
for i in range(1000):
    exp.log_metric("loss", 1 / (i + 1), iteration=i)
print("logged", flush=True)
if sys.stdin.readline():
    for i in range(1000, 2000):
        exp.log_metric("loss", 1 / (i + 1), iteration=i)
tracelet.stop_logging()
"""


class Cluster:
    """A node without a network, a login node that has one, and a folder of both; commands are the page's own lines."""

    def __init__(self, folder: Path, sink: HttpSink) -> None:
        self.folder, self.sink, self.shared = folder, sink, folder / "shared"
        self.shared.mkdir()
        written(folder, JOB)

    def line(self, start: str, run: str = "RUN") -> str:
        (found,) = [line for line in PAGE.read_text().splitlines() if line.startswith(start)]
        return found.replace("/shared/", f"{self.shared}/").replace("RUN", run)

    @contextmanager
    def job(self, run: str) -> Iterator[subprocess.Popen[str]]:
        """A job that has logged and goes on until its input ends; a line of it has the job log more."""
        words = [*hosts.WITHOUT_NETWORK, *hosts.words_for(self.folder, "node7"), "bash", "-c"]
        process = subprocess.Popen(
            [*words, f"exec env TRACELET_RUN_ID={run} {self.line('TRACELET_SHIPPER=off')}"],
            cwd=self.folder, env=self.environ(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert said(process) == "logged"
            yield process
        finally:
            process.kill()
            process.communicate()

    def login(self, line: str) -> str:
        """What a command on the login node has said; it leaves with 0."""
        done = subprocess.run(
            ["bash", "-c", line], env=self.environ(), capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def environ(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "OTEL_EXPORTER_OTLP_ENDPOINT": self.sink.url}

    def waiting(self, spool: Path) -> set[str]:
        listed = json.loads(self.login(f"tracelet runs --json --dir {spool}"))
        return {run["run_id"] for run in listed if run["undelivered"]}


@pytest.fixture
def cluster(tmp_path: Path, otlp_sink: HttpSink) -> Cluster:
    if not hosts.can_be_made(tmp_path):
        pytest.skip("namespaces for a host's name and files can't be made here")
    return Cluster(tmp_path, otlp_sink)


def ended(job: subprocess.Popen[str], more: str = "") -> None:
    job.communicate(more, timeout=LIMIT_S)
    assert job.returncode == 0


def test_the_login_node_delivers_what_nodes_without_a_network_wrote_and_ends_only_what_has_its_end(
    cluster: Cluster,
) -> None:
    sink, ship = cluster.sink, cluster.line("tracelet ship --dir")
    with cluster.job("ended") as job:
        ended(job)
    with cluster.job("killed") as job:
        job.kill()
        job.wait(LIMIT_S)
    with cluster.job("living") as job:
        assert sink.requests == []
        cluster.login(ship)
        assert points(sink, "ended") == list(range(1000))
        assert sink.ends("ended") == ["FINISHED"]
        assert points(sink, "living") == points(sink, "killed") == []

        told = cluster.login(f"{ship} --all")
        assert told.count("node7 wrote it, and nothing tells from here whether it goes on") == 2
        assert points(sink, "living") == points(sink, "killed") == list(range(1000))
        assert sink.ends("living") == sink.ends("killed") == []

        cluster.login(cluster.line("tracelet ship --assume-dead", "killed"))
        assert sink.ends("killed") == ["KILLED"]
        ended(job, "more\n")
    cluster.login(ship)
    assert points(sink, "living") == list(range(2000))
    assert sink.ends("living") == ["FINISHED"]
    assert points(sink, "ended") == points(sink, "killed") == list(range(1000))
    assert cluster.waiting(cluster.shared / "ada" / "tracelet") == set()


def test_a_copy_of_a_nodes_runs_is_delivered_whole_and_the_original_knows_nothing_of_it(cluster: Cluster) -> None:
    """Which is why one of them is shipped, and not both."""
    with cluster.job("copied") as job:
        ended(job)
    original, copy = cluster.shared / "ada" / "tracelet", cluster.folder / "copy"
    shutil.copytree(original, copy)
    for _ in range(2):  # the second call finds nothing left
        cluster.login(f"tracelet ship --dir {copy}")
        assert points(cluster.sink, "copied") == list(range(1000))
    assert cluster.sink.ends("copied") == ["FINISHED"]
    assert (cluster.waiting(copy), cluster.waiting(original)) == (set(), {"copied"})


# ---- ten minutes without a receiver -------------------------------------------------------------------------------

GOES_ON = """
import sys, time, tracelet
exp = tracelet.start_logging(exp_name="job", project="outage", run_id="run")
i = 0
def log(count):
    global i
    for i in range(i + 1, i + 1 + count):
        exp.log_metric("loss", 1 / i, iteration=i)
log(100)
print("logged", flush=True)
sys.stdin.readline()
over = time.monotonic() + 600
while time.monotonic() < over:
    log(10)
    time.sleep(0.01)  # six seconds by its clock
print(i, flush=True)
sys.stdin.readline()
"""


def arrived(sink: Sink) -> list[int]:
    """The iterations of its points; a request whose answer was lost comes again, with the same times."""
    return sorted(iteration for iteration, _ in {(p.iteration, p.time_unix_nano) for p in sink.points("run")})


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_ten_minutes_without_a_receiver_under_a_run_that_goes_on_lose_nothing(
    tmp_path: Path, clean_environment: Path, kind: str
) -> None:
    """The whole of it: training, its shipper, and ten minutes by their clocks, which that one shipper outlasts."""
    with GrpcSink() if kind == "grpc" else HttpSink() as sink, Wire(int(sink.endpoint.rpartition(":")[2])) as wire:
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{wire.port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc" if kind == "grpc" else "http/protobuf",
            **other_clocks(tmp_path / "clocks", faster=600),
        }
        with started(tmp_path, GOES_ON, **variables) as program:
            assert said(program) == "logged"
            assert program.stdin is not None
            until(lambda: len(sink.points("run")) == 100, LIMIT_S)
            folder = folder_of(clean_environment)
            shipper = until(lambda: shipper_alive(folder), LIMIT_S)
            wire.spoil("refusing")
            program.stdin.write("the receiver is away\n")
            program.stdin.flush()
            logged = int(said(program))
            until(lambda: "not now" in (folder / "shipper.log").read_text(), LIMIT_S)
            assert len(sink.points("run")) == 100
            wire.mend()
            until(lambda: len(arrived(sink)) >= logged, LIMIT_S)
            assert shipper_alive(folder) == shipper
            program.stdin.close()
            until(lambda: sink.ends("run"), LIMIT_S)
        assert arrived(sink) == list(range(1, logged + 1))
        assert sink.ends("run") == ["FINISHED"]
        assert list(folder.glob("rejected-*")) == []
        until(lambda: shipper_alive(folder) is None, LIMIT_S)
