"""Training killed by SIGKILL, anywhere: every point whose call had returned arrives once, and the run is marked.

Pattern: a real program tells through a pipe which calls have returned, and is killed from outside at a random moment,
or by itself at a line of ours, one line after the other. Limit: two minutes a program, five for what it leaves to be
shipped. TRACELET_SOAK=1: 200 random kills instead of 20, and every line instead of every twelfth.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.programs import started, written
from tests.servers import MlflowServer, run_of
from tests.sinks import HttpSink, attributes, until
from tests.spooled import folder_of
from tracelet import launch
from tracelet.core import delivery, process, run
from tracelet.spool import store
from tracelet.spool.lease import shipper_alive

SOAK = os.environ.get("TRACELET_SOAK") == "1"
NOTICED_NS = 2_000_000_000  # how much later than a death its end may be, by the clock of the shipper that saw it

# One byte for each call that returned: what the pipe holds at the death of the program was acknowledged.
TRAINING = """
import os, sys, tracelet
exp = tracelet.start_logging(exp_name=sys.argv[1], project="kills", backend="otlp", run_id=sys.argv[1])
step = 0
while True:
    if step % 50 == 49:
        exp.log_params({f"p{step}": step})
        os.write(1, b"p")
    exp.log_metric("loss", step, iteration=step)
    os.write(1, b".")
    step += 1
"""


@pytest.fixture
def sink(otlp_sink: HttpSink, monkeypatch: pytest.MonkeyPatch) -> HttpSink:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", otlp_sink.url)
    return otlp_sink


def read_exactly(pipe: int, size: int) -> bytes:
    found = b""
    while len(found) < size:
        piece = os.read(pipe, size - len(found))
        assert piece, "the program ended by itself"
        found += piece
    return found


def root_span(sink: HttpSink, run_id: str) -> Any:
    found = [span for span in sink.spans() if span.name == f"run {run_id}"]
    assert len(found) < 2
    return found[0] if found else None


def ship(folder: Path) -> None:
    """What a person types afterwards."""
    done = subprocess.run(
        [sys.executable, "-m", "tracelet", "ship", str(folder)],
        capture_output=True,
        text=True,
        timeout=1800 if SOAK else 300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def kill_and_look(tmp_path: Path, spool: Path, sink: HttpSink, seed: int, how: str) -> int:
    """Kill one program at a random moment, see that all it had logged has arrived, and say how much that was."""
    chance, run_id = random.Random(seed), f"{how}-{seed}".replace(" ", "-")
    folder = tmp_path / run_id
    folder.mkdir()
    began = time.time_ns()
    with started(folder, TRAINING, run_id, group=True) as program:
        assert program.stdout is not None
        pipe = program.stdout.fileno()
        acknowledged = read_exactly(pipe, chance.choice([1, chance.randrange(1, 500), chance.randrange(1, 40_000)]))
        mine = folder_of(spool, run_id)
        if how == "shipper too":
            until(lambda: shipper_alive(mine) is not None, 60)
            shipper = shipper_alive(mine)
            if shipper is not None:
                os.kill(shipper, signal.SIGKILL)
        if how == "group":
            os.killpg(program.pid, signal.SIGKILL)
        else:
            program.send_signal(signal.SIGKILL)
        assert program.wait(30) == -signal.SIGKILL
        after = time.time_ns()
        while piece := os.read(pipe, 65536):
            acknowledged += piece
    if how == "shipper too":
        until(lambda: shipper_alive(mine) is None, 30)
        ship(mine)
    until(lambda: root_span(sink, run_id) is not None, 60)
    root = root_span(sink, run_id)
    found = attributes(root)
    assert (found["tracelet.run.state"], root.status.code) == ("KILLED", 2)
    # Who watched knows when it was; who came later takes the last record for it.
    assert began < root.end_time_unix_nano < (after if how == "shipper too" else after + NOTICED_NS)
    points = Counter(point.iteration for point in sink.points(run_id))
    calls = acknowledged.count(b".")
    assert set(range(calls)) <= points.keys()
    assert len(points) <= calls + 1
    assert set(points.values()) == {1}
    params = {name for name in found if name.startswith("tracelet.param.")}
    assert {f"tracelet.param.p{50 * n + 49}" for n in range(acknowledged.count(b"p"))} <= params
    return calls


HOW = ("training", "training", "group", "shipper too")


@pytest.mark.parametrize("part", range(10 if SOAK else 2))
def test_all_that_was_acknowledged_outlives_a_kill_at_a_random_moment(
    tmp_path: Path, clean_environment: Path, sink: HttpSink, part: int, record_property: Callable[[str, object], None]
) -> None:
    each = 20 if SOAK else 10
    with ThreadPoolExecutor(2) as two_at_once:
        done = [
            two_at_once.submit(kill_and_look, tmp_path, clean_environment, sink, seed, HOW[seed % len(HOW)])
            for seed in range(part * each, (part + 1) * each)
        ]
        acknowledged = sum(one.result() for one in done)
    record_property("kills", each)
    record_property("points acknowledged, none lost", acknowledged)


# A child for each line: warm from its parent, it lives for a few milliseconds.
LINES = """
import json, os, pathlib, signal, sys, time
import tracelet
from tests.crash.lines import Lines
from tracelet.core import artifacts, claim, delivery, experiment, run, values
from tracelet.spool import files, writer
writer.Writer.__init__.__kwdefaults__["slots_per_segment"] = 64  # rolls come soon

backend = json.loads(sys.argv[3])
if "file" in backend:
    backend = tracelet.File(backend["file"])
where = tuple(sys.argv[4:] or [os.path.dirname(tracelet.__file__)])
lines = Lines(where, every=int(sys.argv[1]), seed=int(sys.argv[2]))

def scenario(run_id, told):
    exp = tracelet.start_logging(exp_name=run_id, project="kills", backend=backend, run_id=run_id, tags={"a": "b"})
    for i in range(150):
        exp.log_metric(f"m{i % 7}", i, iteration=i)
        os.write(told, b".")
    exp.log_params({"late": 1})
    os.write(told, b"p")
    tracelet.stop_logging()
    os.write(told, b"e")

def one(run_id):
    reading, writing = os.pipe()
    began = time.time_ns()
    child = os.fork()
    if child == 0:
        sys.settrace(lines.watch)
        scenario(run_id, writing)
        sys.settrace(None)
        pathlib.Path("lines.json").write_text(json.dumps(lines.met))
        os._exit(0)
    os.close(writing)
    told = b""
    while piece := os.read(reading, 4096):
        told += piece
    os.close(reading)
    _, status = os.waitpid(child, 0)
    gone = time.time_ns()
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), code
    line = {"run": run_id, "at": lines.last, "time": lines.time, "told": told.decode(), "code": code,
            "began": began, "gone": gone}
    print(json.dumps(line), flush=True)

one("line-none")
for number in lines.turns(json.loads(pathlib.Path("lines.json").read_text())):
    one(f"line-{number}")
"""


def killed_at_lines(
    tmp_path: Path, backend: object, every: int, record_property: Callable[[str, object], None], *where: str
) -> list[dict[str, Any]]:
    """What became of a program killed at each `every`th line; with 1, at each line there is.

    `backend` is one's name, several, or {"file": path}.
    """
    seed = time.time_ns()
    record_property("seed", seed)
    done = subprocess.run(
        [sys.executable, str(written(tmp_path, LINES)), str(every), str(seed), json.dumps(backend), *where],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True, text=True,
        timeout=1800 if SOAK else 120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[0]["told"] == "." * 150 + "pe"
    record_property("kills at a line", sum(line["code"] != 0 for line in lines))
    return lines


def points_of(path: Path) -> dict[str, Counter[int]]:
    """How often each iteration of each run stands in a file."""
    found: dict[str, Counter[int]] = {}
    for line in path.read_text().splitlines():
        for resource in json.loads(line).get("resourceMetrics", []):
            named = {a["key"]: a["value"].get("stringValue") for a in resource["resource"]["attributes"]}
            count = found.setdefault(str(named["tracelet.run.id"]), Counter())
            for scope in resource["scopeMetrics"]:
                if scope["scope"]["name"] != "tracelet":
                    continue
                for metric in scope["metrics"]:
                    for point in metric["gauge"]["dataPoints"]:
                        if not point.get("flags"):
                            count[int(point["attributes"][0]["value"]["intValue"])] += 1
    return found


def roots_of(path: Path) -> dict[str, dict[str, Any]]:
    """Each run's root span in a file, by run id, its attributes by their names."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        for resource in json.loads(line).get("resourceSpans", []):
            named = {a["key"]: a["value"].get("stringValue") for a in resource["resource"]["attributes"]}
            for scope in resource["scopeSpans"]:
                for span in scope["spans"]:
                    assert named["tracelet.run.id"] not in found, "a second end"
                    found[str(named["tracelet.run.id"])] = {
                        **span,
                        "attributes": {a["key"]: a["value"] for a in span["attributes"]},
                    }
    return found


def test_a_kill_at_any_line_of_start_roll_over_or_stop_loses_nothing_acknowledged_and_can_be_shipped(
    tmp_path: Path,
    clean_environment: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    monkeypatch.setenv("TRACELET_SHIPPER", "off")
    file = tmp_path / "out.jsonl"
    lines = killed_at_lines(tmp_path, {"file": str(file)}, 1 if SOAK else 12, record_property)
    assert sum(line["code"] != 0 for line in lines) > 50
    ship(clean_environment)
    look(clean_environment, file, lines)


def test_a_kill_at_any_line_that_starts_or_awaits_the_shipper_leaves_nothing_undelivered(
    tmp_path: Path, clean_environment: Path, record_property: Callable[[str, object], None]
) -> None:
    file = tmp_path / "out.jsonl"
    where = [launch.__file__, delivery.__file__, process.__file__]
    lines = killed_at_lines(tmp_path, {"file": str(file)}, 1 if SOAK else 12, record_property, *where)
    assert sum(line["code"] != 0 for line in lines) > 5
    # Where a shipper was started it delivers all by itself; who died before that one is shipped afterwards.
    until(lambda: all(shipper_alive(folder) is None for folder in clean_environment.glob("*/*")), 90)
    ship(clean_environment)
    look(clean_environment, file, lines)


def test_a_kill_at_any_line_has_one_status_and_one_end_time_in_mlflow_and_on_the_root_span(
    tmp_path: Path,
    clean_environment: Path,
    mlflow_server: MlflowServer,
    sink: HttpSink,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """Of start, roll-over and stop; the shipper goes on, where the program came as far as to start one."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    where = [os.path.dirname(store.__file__), run.__file__]  # most of the others come before anything is written
    lines = killed_at_lines(tmp_path, ["mlflow", "otlp"], 8 if SOAK else 100, record_property, *where)
    assert sum(line["code"] != 0 for line in lines) >= 3
    until(lambda: all(shipper_alive(folder) is None for folder in clean_environment.glob("*/*")), 90)
    ship(clean_environment)
    for line in lines:
        run_id, (ended,) = line["run"], ends_of(clean_environment, line["run"]) or [None]
        root = root_span(sink, run_id)
        assert (root is None) == (ended is None), line
        assert ended is not None or "." not in line["told"], line
        if ended is None:
            continue
        possible = {"e": ["FINISHED"], "p": ["FINISHED", "KILLED"], ".": ["KILLED"], "": ["KILLED"]}
        assert ended["status"] in possible[line["told"][-1:]], line
        assert attributes(root)["tracelet.run.state"] == ended["status"], line
        assert root.status.code == (0 if ended["status"] == "FINISHED" else 2), line
        assert root.end_time_unix_nano == ended["end_unix_nano"], line
        assert line["began"] < root.end_time_unix_nano < line["gone"] + NOTICED_NS, line
        told = run_of(mlflow_server, run_id, project="kills", status=ended["status"])
        assert told.info.end_time == root.end_time_unix_nano // 1_000_000, line


def ends_of(spool: Path, run_id: str) -> list[Mapping[str, Any]]:
    """What the manifests say of a run's ends."""
    return [
        attempt.ended
        for folder in spool.glob(f"{run_id}/*")
        if (manifest := store.read_manifest(folder)) is not None
        for attempt in manifest.attempts
        if attempt.ended is not None
    ]


def look(spool: Path, file: Path, lines: list[dict[str, Any]]) -> None:
    """What each child told arrived once, and its run has the end that it can have."""
    found, roots = points_of(file), roots_of(file)
    for line in lines:
        run_id, told = line["run"], line["told"]
        points = found.get(run_id, Counter())
        assert set(range(told.count("."))) <= points.keys(), line
        assert len(points) <= told.count(".") + 1, line
        assert set(points.values()) <= {1}, line
        ends = [ended["status"] for ended in ends_of(spool, run_id)]
        if "." in told:
            assert ends in (["KILLED"], ["FINISHED"]), line
        assert (run_id in roots) == bool(ends), line
        if run_id in roots:
            root = roots[run_id]
            assert root["attributes"]["tracelet.run.state"]["stringValue"] == ends[0], line
            assert line["began"] < int(root["endTimeUnixNano"]) < line["gone"] + NOTICED_NS, line
        if "." in told:
            assert roots[run_id]["attributes"]["tracelet.tag.a"] == {"stringValue": "b"}, line
        if "p" in told:
            assert roots[run_id]["attributes"]["tracelet.param.late"] == {"intValue": "1"}, line
        if "e" in told:
            assert ends == ["FINISHED"], line
        elif "p" not in told:
            assert ends in ([], ["KILLED"]), line


REPLACED = """
import sys, time, tracelet
exp = tracelet.start_logging(exp_name=sys.argv[1], project="kills", backend="otlp", run_id=sys.argv[1])
step = 0
while True:
    {seldom}
    exp.log_metric("loss", step, iteration=step)
    step += 1
    time.sleep({pause})
"""


WHILE_IT = {
    "sets-iterations": ("exp.set_iteration(step)", 0.05),
    "writes-records": ("exp.set_tags({'at': str(step)})", 0.05),
    "brings-names": ("exp.log_metric(f'new{step}', 0, iteration=0)", 0.05),
    "fills-segments": ("pass", 0.00001),
}


def test_a_shipper_killed_while_training_goes_on_is_replaced_meanwhile(sink: HttpSink, clean_environment: Path) -> None:
    with ThreadPoolExecutor(len(WHILE_IT)) as pool:  # each mostly waits, so all do at the same time
        list(pool.map(lambda run_id: replaced(sink, clean_environment, run_id), WHILE_IT))


def replaced(sink: HttpSink, spool: Path, run_id: str) -> None:
    seldom, pause = WHILE_IT[run_id]
    code = REPLACED.format(seldom=seldom, pause=pause)
    program = subprocess.Popen([sys.executable, "-c", code, run_id])
    try:
        until(lambda: bool(sink.points(run_id)), 60)
        folder = folder_of(spool, run_id)
        first = shipper_alive(folder)
        assert first is not None
        os.kill(first, signal.SIGKILL)
        until(lambda: shipper_alive(folder) not in (None, first), 60)
        before = len(sink.points(run_id))
        until(lambda: len(sink.points(run_id)) > before + 20, 60)
        assert program.poll() is None  # all this while it trained
    finally:
        program.kill()
        program.wait()
    until(lambda: shipper_alive(folder) is None, 60)
    found = {(point.iteration, point.time_unix_nano) for point in sink.points(run_id) if point.name == "loss"}
    assert sorted(iteration for iteration, _ in found) == list(range(len(found)))
