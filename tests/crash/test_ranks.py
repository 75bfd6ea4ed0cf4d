"""The spans of a launch as one tree: every span's parent arrives, whoever is killed and whoever ships.

Pattern: a launcher that sets what torchrun sets starts four real programs, which log phases; an OTLP receiver takes
their spans. A rank is killed, the shipper is, `tracelet ship` comes later, shippers die before they acknowledge.
Limit: two minutes a launch.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import launches
from tests.gateway_process import GatewayProcess
from tests.mortal_shipper import ship_with_deaths
from tests.programs import written
from tests.servers import MlflowServer, run_of
from tests.shipping import until
from tests.sinks import HttpSink, Sink, attributes
from tests.spooled import folder_of
from tracelet import ids
from tracelet.spool.lease import shipper_alive

RANKS = range(4)

TRAIN = """
import os, signal, sys, time
from pathlib import Path
import tracelet
how, rank = sys.argv[2], int(os.environ["RANK"])
exp = tracelet.start_logging(exp_name=sys.argv[1], project="ranks", ranks="all")
with exp.span("epoch", attributes={"number": 1}):
    exp.log_metric("loss", rank, iteration=1)
    with exp.span("validate"):
        exp.log_metric("accuracy", rank, iteration=1)
if how == "waits":
    Path(f"logged-{rank}").touch()
    until = time.monotonic() + 100
    while not Path("go").exists() and time.monotonic() < until:
        time.sleep(0.05)
with exp.span("epoch", attributes={"number": 2}):
    exp.log_metric("loss", rank, iteration=2)
    if how == "killed" and rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raises" and rank == 3:
        raise ValueError("a bad batch")
exp.stop()
"""


@dataclass(frozen=True)
class Tree:
    """The spans of a run as they arrived, each once."""

    spans: dict[str, Any]
    rank_of: dict[str, int]

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans.values() if span.name == name]

    def states(self) -> dict[str, str]:
        """What the root span and those of ranks say of their end."""
        return {
            span.name: str(attributes(span)["tracelet.run.state"])
            for span in self.spans.values()
            if "tracelet.run.state" in attributes(span)
        }


def tree_of(sink: Sink, name: str, *, attempts: int = 1) -> Tree:
    """The run's spans; that they are a tree for each attempt, and no span id stands for two spans, is checked here."""
    spans: dict[str, Any] = {}
    rank_of: dict[str, int] = {}
    for received in list(sink.stored):
        for resource in received.message.resource_spans if received.signal == "traces" else ():
            own = attributes(resource.resource)
            for scope in resource.scope_spans if own["tracelet.run.name"] == name else ():
                for span in scope.spans:
                    known = spans.setdefault(span.span_id.hex(), span)
                    assert known.SerializeToString(deterministic=True) == span.SerializeToString(deterministic=True)
                    assert rank_of.setdefault(span.span_id.hex(), own["tracelet.rank"]) == own["tracelet.rank"]
    roots = [span for span in spans.values() if not span.parent_span_id]
    assert [span.name for span in roots] == [f"run {name}"] * attempts
    for span in spans.values():
        parent = span.parent_span_id.hex()
        assert not parent or spans[parent].trace_id == span.trace_id, f"{span.name} has a parent that never arrived"
        assert span.end_time_unix_nano >= span.start_time_unix_nano
    for span in spans.values():
        if span.name in ("epoch", "validate"):
            above = spans[span.parent_span_id.hex()]
            assert rank_of[span.parent_span_id.hex()] == rank_of[span.span_id.hex()]
            rank = rank_of[span.span_id.hex()]
            wanted = "epoch" if span.name == "validate" else f"rank {rank}" if rank else f"run {name}"
            assert above.name == wanted
    return Tree(spans, rank_of)


def has_ended(sink: Sink, name: str, *ranks: int) -> bool:
    """Whether the spans of these ranks have arrived, the root span for 0."""
    names = {f"rank {rank}" if rank else f"run {name}" for rank in ranks}
    return names <= {span.name for span in sink.spans()}


def check_whole(sink: Sink, name: str) -> None:
    """Every rank's phases, each under its rank's span, whose status and end are its own."""
    tree = tree_of(sink, name)
    assert tree.states() == {f"run {name}": "FINISHED", **{f"rank {rank}": "FINISHED" for rank in RANKS[1:]}}
    for rank in RANKS:
        mine = sorted(span.name for span in tree.spans.values() if tree.rank_of[span.span_id.hex()] == rank)
        assert mine == sorted(["epoch", "epoch", "validate", f"rank {rank}" if rank else f"run {name}"])
    ends = {span.end_time_unix_nano for name in tree.states() for span in tree.named(name)}
    assert len(ends) == len(RANKS)
    assert all(span.status.code == 0 for span in tree.spans.values())


def command(folder: Path, name: str, how: str) -> list[str]:
    return [sys.executable, str(written(folder, TRAIN)), name, how]


def launched(folder: Path, name: str, how: str, sink: Sink, **environ: str) -> subprocess.Popen[str]:
    given = {"OTEL_EXPORTER_OTLP_ENDPOINT": getattr(sink, "url", ""), **environ}
    return launches.start(folder, command(folder, name, how), launches.torchrun(4), **given)


def test_every_ranks_phases_have_their_parent_and_there_is_one_root(tmp_path: Path, otlp_sink: HttpSink) -> None:
    launches.done(launched(tmp_path, "whole", "stops", otlp_sink))
    until(lambda: has_ended(otlp_sink, "whole", *RANKS), 60)
    check_whole(otlp_sink, "whole")


@pytest.mark.parametrize(
    ("how", "rank", "state", "error"), [("killed", 2, "KILLED", "KILLED"), ("raises", 3, "FAILED", "ValueError")]
)
def test_a_rank_that_died_has_its_own_status_and_the_phase_it_died_in(
    tmp_path: Path, otlp_sink: HttpSink, how: str, rank: int, state: str, error: str
) -> None:
    out, _ = launched(tmp_path, how, how, otlp_sink).communicate(timeout=120)
    assert out == ""
    until(lambda: has_ended(otlp_sink, how, *RANKS), 60)
    tree = tree_of(otlp_sink, how)
    assert tree.states() == {f"run {how}": "FINISHED", **{f"rank {r}": "FINISHED" for r in RANKS[1:]}} | {
        f"rank {rank}": state
    }
    (span,) = tree.named(f"rank {rank}")
    assert (span.status.code, attributes(span)["error.type"]) == (2, error)
    in_error = {(one.name, tree.rank_of[one.span_id.hex()]) for one in tree.spans.values() if one.status.code == 2}
    assert in_error == {(f"rank {rank}", rank), ("epoch", rank)}
    assert otlp_sink.ends(run_id_of(otlp_sink, how)) == ["FINISHED"]  # one end of the run: rank 0's


def run_id_of(sink: Sink, name: str) -> str:
    found = {one["tracelet.run.id"] for one, _, _ in sink.metrics() if one.get("tracelet.run.name") == name}
    (run_id,) = found
    return str(run_id)


def test_a_shipper_killed_and_replaced_in_between_leaves_one_tree(
    tmp_path: Path, clean_environment: Path, otlp_sink: HttpSink
) -> None:
    launcher = launched(tmp_path, "replaced", "waits", otlp_sink)
    try:
        until(lambda: all((tmp_path / f"logged-{rank}").exists() for rank in RANKS), 60)
        folder = folder_of(clean_environment)
        # Their first phases have arrived, or are about to.
        until(lambda: len([span for span in otlp_sink.spans() if span.name == "epoch"]) == 4, 60)
        shipper = shipper_alive(folder)
        assert shipper is not None
        os.kill(shipper, signal.SIGKILL)
        until(lambda: shipper_alive(folder) != shipper, 30)
        (tmp_path / "go").touch()
    finally:
        launches.done(launcher)
    until(lambda: has_ended(otlp_sink, "replaced", *RANKS), 60)
    check_whole(otlp_sink, "replaced")


def test_who_ships_later_sends_the_same_tree(tmp_path: Path, otlp_sink: HttpSink) -> None:
    launches.done(launched(tmp_path, "later", "stops", otlp_sink, TRACELET_SHIPPER="off"))
    assert not otlp_sink.requests
    for said in ("points delivered: 12 to otlp", "Nothing waits."):
        done = subprocess.run(
            [sys.executable, "-m", "tracelet", "ship"], capture_output=True, text=True, timeout=120, check=False
        )
        assert (done.returncode, said in done.stdout) == (0, True), done.stdout + done.stderr
    check_whole(otlp_sink, "later")


def test_every_rank_killed_before_anything_was_sent_has_its_end_once_somebody_ships(
    tmp_path: Path, clean_environment: Path, otlp_sink: HttpSink
) -> None:
    launcher = launched(tmp_path, "all-killed", "waits", otlp_sink, TRACELET_SHIPPER="off")
    until(lambda: all((tmp_path / f"logged-{rank}").exists() for rank in RANKS), 60)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    assert len(children) == 4
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    launches.done(launcher)
    assert ship_with_deaths(folder_of(clean_environment), dict(os.environ)) >= len(RANKS)
    tree = tree_of(otlp_sink, "all-killed")
    assert tree.states() == {"run all-killed": "KILLED", **{f"rank {rank}": "KILLED" for rank in RANKS[1:]}}


def test_shippers_that_die_before_each_acknowledgement_send_each_span_again_as_it_was(
    tmp_path: Path, clean_environment: Path, otlp_sink: HttpSink
) -> None:
    launches.done(launched(tmp_path, "repeated", "stops", otlp_sink, TRACELET_SHIPPER="off"))
    assert ship_with_deaths(folder_of(clean_environment), dict(os.environ)) >= len(RANKS)
    check_whole(otlp_sink, "repeated")  # that a span id stands for one span alone
    bodies = [one.body for one in otlp_sink.stored if one.signal == "traces"]
    assert {bodies.count(body) for body in bodies} == {2}


def test_a_resumed_launch_has_a_tree_for_each_attempt(tmp_path: Path, otlp_sink: HttpSink) -> None:
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": otlp_sink.url}
    rounds = launches.torchrun(4), launches.torchrun(4, restarts=1)
    launches.done(launches.start(tmp_path, command(tmp_path, "again", "stops"), *rounds, **environ))
    until(lambda: [span.name for span in otlp_sink.spans()].count("rank 3") == 2, 60)
    until(lambda: [span.name for span in otlp_sink.spans()].count("run again") == 2, 60)
    tree = tree_of(otlp_sink, "again", attempts=2)
    assert len({span.trace_id for span in tree.spans.values()}) == 2
    assert len(tree.spans) == 2 * 16


def test_a_tree_reaches_mlflow_through_a_gateway_under_the_run_whose_end_is_rank_0s(
    tmp_path: Path, mlflow_server: MlflowServer
) -> None:
    with GatewayProcess(tmp_path / "gateway", mlflow_server.uri) as gateway:
        environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": gateway.http}
        name = "through-a-gateway"
        launcher = launches.start(tmp_path, command(tmp_path, name, "killed"), launches.torchrun(4), **environ)
        launcher.communicate(timeout=120)
        run = run_of(mlflow_server, name, project="ranks", status="FINISHED", within_s=60)
        attempt = run.data.tags["tracelet.run.attempt"].partition("-")[2].partition(" ")[0]
        trace = f"tr-{ids.trace_id(run.data.tags['tracelet.run.id'], attempt)}"
        until(lambda: len(spans_in(mlflow_server.database, trace)) == 16, 60)
        spans = spans_in(mlflow_server.database, trace)
        assert [name for name, parent, _ in spans.values() if parent is None] == [f"run {name}"]
        assert all(parent is None or parent in spans for _, parent, _ in spans.values())
        assert {name for name, _, status in spans.values() if status == "ERROR"} == {"rank 2", "epoch"}
        assert gateway.number("runs_lost") == 0
        assert run_of(mlflow_server, name, project="ranks").info.status == "FINISHED"


def spans_in(database: Path, trace: str) -> dict[str, tuple[str, str | None, str]]:
    """Name, parent and status of each span of a trace, by its id."""
    with closing(sqlite3.connect(database)) as opened:
        found = opened.execute(
            "select span_id, name, parent_span_id, status from spans where trace_id = ?", [trace]
        ).fetchall()
    return {span_id: (name, parent, status) for span_id, name, parent, status in found}
