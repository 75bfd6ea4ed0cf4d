"""Processes that come from a training process: none hangs, nothing they log is lost or doubled, all of it is one run.

Pattern: a real interpreter forks, or starts workers, at the worst moment; its spool is read back, or its sink.
Limit: a minute for each program (a hanging child kills itself by an alarm before).
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import processes_of
from tests.programs import finished, said, started
from tests.sinks import HttpSink, attributes, until
from tests.spooled import folder_of, read
from tracelet import ids
from tracelet.records import ParamsLogged, WriterEnded
from tracelet.spool import store
from tracelet.spool.lease import shipper_alive

SOAK = os.environ.get("TRACELET_SOAK") == "1"

FORK_WHILE_HELD = """
import os, signal, sys, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import tracelet
from tracelet import guard, session
from tracelet.core import artifacts, process

exp = tracelet.start_logging(exp_name="fork", project="fork", backend="file", shipper="off")
exp.log_metric("parent", 1.0, iteration=0)
open("file.bin", "w").close()
held, act = {
    "guard": (lambda: guard.guard._lock, lambda: guard.guard.limited("child", "a warning of the child")),
    "session": (lambda: session._lock, tracelet.stop_logging),
    "artifacts": (lambda: artifacts._once._lock, lambda: artifacts._once.limited("child", "another")),
    "start": (lambda: process._lock, lambda: tracelet.Experiment("own", backend="file", shipper="off").start()),
    "writer": (lambda: exp._run.writer._lock, lambda: exp.log_metric("child", 1.0, iteration=0)),
}[sys.argv[1]]
inside, done = threading.Event(), threading.Event()

def hold():
    with held():
        inside.set()
        done.wait()

threading.Thread(target=hold, daemon=True).start()
inside.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)  # a child that hangs ends by it
    act()
    os._exit(0)
_, status = os.waitpid(child, 0)
done.set()
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""


@pytest.mark.parametrize("lock", ["guard", "session", "artifacts", "start", "writer"])
def test_a_child_forked_while_a_thread_held_a_lock_of_ours_does_not_hang(tmp_path: Path, lock: str) -> None:
    done = finished(tmp_path, FORK_WHILE_HELD, lock)
    assert done.returncode == 0, done.stderr


WORKERS = """
import multiprocessing, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import tracelet

def work(exp, number, each):
    for step in range(each):
        exp.log_metric("parent", step, iteration=100_000 * (number + 1) + step)  # a name that the parent has written
        exp.log_metric(f"worker{number}", step, iteration=step)

if __name__ == "__main__":
    each = int(sys.argv[1])
    exp = tracelet.start_logging(exp_name="workers", project="fork", backend="otlp", run_id="workers")
    exp.log_metric("parent", 0.0, iteration=0)
    started, number = [], 0
    for method, count in (("fork", 4), ("forkserver", 2), ("spawn", 2)):
        context = multiprocessing.get_context(method)
        for _ in range(count):
            started.append(context.Process(target=work, args=(exp, number, each)))
            started[-1].start()
            number += 1
    exp.log_metric("parent", 1.0, iteration=1)
    for step in range(2, 1000):
        exp.log_metric("parent", float(step), iteration=step)
    for worker in started:
        worker.join(60)
    assert [worker.exitcode for worker in started] == [0] * number
    exp.log_metric("parent", 1000.0, iteration=1000)
    assert exp.flush(timeout=60)
"""


def test_workers_of_every_start_method_log_into_one_run_with_nothing_lost_or_doubled(
    tmp_path: Path, otlp_sink: HttpSink, record_property: Callable[[str, object], None]
) -> None:
    each = 20_000 if SOAK else 2_000
    done = finished(tmp_path, WORKERS, each, OTEL_EXPORTER_OTLP_ENDPOINT=otlp_sink.url)
    assert done.returncode == 0, done.stderr
    until(lambda: bool(otlp_sink.spans()), 30)
    assert [attributes(span)["tracelet.run.state"] for span in otlp_sink.spans()] == ["FINISHED"]
    points = Counter((point.name, point.iteration) for point in otlp_sink.points("workers"))
    wanted = {(f"worker{number}", step) for number in range(8) for step in range(each)}
    wanted |= {("parent", 100_000 * (number + 1) + step) for number in range(8) for step in range(each)}
    record_property("points of workers", points.total())
    assert points == Counter(wanted | {("parent", step) for step in range(1001)})
    assert {resource["service.instance.id"] for resource, _, _ in otlp_sink.metrics()} == {
        ids.instance_id("workers", attempt_of(otlp_sink), 0)
    }


def attempt_of(sink: HttpSink) -> str:
    (attempt,) = {resource["tracelet.run.attempt"] for resource, _, _ in sink.metrics()}
    return str(attempt)


IN_A_THREAD = """
import os, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import tracelet
exp = tracelet.start_logging(exp_name="thread", project="fork", backend="file", shipper="off")
stop = threading.Event()

def busy(number):
    step = 0
    while not stop.is_set():
        exp.log_metric(f"busy{number}", step, iteration=step)
        exp.log_metric(f"new{number}-{step}", step, iteration=step)  # takes the lock, and rolls
        step += 1

def fork():
    for child in range(20):
        pid = os.fork()
        if pid == 0:
            exp.log_metric("known", child, iteration=child)
            exp.log_metric("child", child, iteration=child)
            exp.log_params({f"child{child}": child})
            os._exit(0)
        exp.log_metric("known", 100 + child, iteration=100 + child)
        os.waitpid(pid, 0)

exp.log_metric("known", 99, iteration=99)
threads = [threading.Thread(target=busy, args=(number,)) for number in range(3)]
forking = threading.Thread(target=fork)
for thread in (*threads, forking):
    thread.start()
forking.join()
stop.set()
for thread in threads:
    thread.join()
"""


def test_children_forked_by_a_thread_while_others_log_lose_nothing_and_do_not_hang(
    tmp_path: Path, clean_environment: Path
) -> None:
    done = finished(tmp_path, IN_A_THREAD)
    assert done.returncode == 0, done.stderr
    found = read(folder_of(clean_environment))
    assert sorted(found.values("child")) == [(child, float(child)) for child in range(20)]
    assert sorted(found.values("known")) == [(i, float(i)) for i in [*range(20), *range(99, 120)]]
    assert {key for one in found.of(ParamsLogged) for key in one.params} == {f"child{child}" for child in range(20)}
    for number in range(3):
        values = found.values(f"busy{number}")
        assert values == [(step, float(step)) for step in range(len(values))]
    assert [ended.status for ended in found.of(WriterEnded) if ended.status] == ["FINISHED"]


OUTLIVING = """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import tracelet
exp = tracelet.start_logging(exp_name="outlived", project="fork", backend="otlp", run_id="outlived")
exp.log_metric("loss", 1.0, iteration=0)
for number in range(8):
    if os.fork() == 0:
        exp.log_metric("child", number, iteration=number)
        os.write(1, b"child\\n")
        sys.stdin.readline()  # the end of it
        exp.log_metric("late", number, iteration=number)
        os._exit(0)
sys.stdin.readline()
"""


def test_a_death_is_noticed_within_a_second_while_eight_children_live_on_and_what_they_log_late_arrives(
    tmp_path: Path, clean_environment: Path, otlp_sink: HttpSink
) -> None:
    with started(tmp_path, OUTLIVING, OTEL_EXPORTER_OTLP_ENDPOINT=otlp_sink.url) as program:
        assert [said(program) for _ in range(8)] == ["child"] * 8
        folder = folder_of(clean_environment)
        until(lambda: shipper_alive(folder) is not None and len(otlp_sink.points()) == 9, 30)
        before = time.time_ns()
        program.kill()
        killed = time.time_ns()
        program.wait(30)

        def ended() -> int | None:
            manifest = store.read_manifest(folder)
            over = None if manifest is None else manifest.attempts[0].ended
            return None if over is None else int(over["end_unix_nano"])

        until(lambda: ended() is not None, 30)
        assert before < (ended() or 0) < killed + 1_000_000_000  # its death, and not its last record
        assert len({pid for pid in processes_of(str(tmp_path)) if pid != shipper_alive(folder)}) == 8
        assert program.stdin is not None
        program.stdin.close()
    until(lambda: len(otlp_sink.points()) == 17, 30)
    until(lambda: shipper_alive(folder) is None, 30)
    points = Counter((point.name, point.iteration) for point in otlp_sink.points())
    assert points == Counter(
        {(name, number): 1 for name in ("child", "late") for number in range(8)} | {("loss", 0): 1}
    )
    assert [attributes(span)["tracelet.run.state"] for span in otlp_sink.spans()] == ["KILLED"]


MANY = """
import os, sys, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import tracelet
from tracelet.spool.lease import shipper_alive
exp = tracelet.start_logging(exp_name="many", project="fork", backend="otlp", run_id="many")
exp.log_metric("parent", 0.0, iteration=0)
exp.flush(timeout=60)

def links(pid):
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
        except FileNotFoundError:  # closed meanwhile, as the one of this very look
            pass
    return found

watched = lambda: sum("pidfd" in link for link in links(shipper))
shipper, before = shipper_alive(exp._run.folder), None
mine = watched()

def wait(until):
    limit = time.monotonic() + 60
    while not until():
        assert time.monotonic() < limit, links(shipper)
        time.sleep(0.01)

for group in range(int(sys.argv[1]) // 20):
    reading, writing = os.pipe()
    pids = []
    for child in range(20 * group, 20 * group + 20):
        pids.append(os.fork())
        if pids[-1] == 0:
            os.close(writing)
            exp.log_metric("child", child, iteration=child)
            os.read(reading, 1)  # until it is let go
            os._exit(0)
    wait(lambda: watched() == mine + 20)
    os.close(reading)
    os.close(writing)
    for pid in pids:
        os.waitpid(pid, 0)
    if group == 0:
        before = len(links("self"))
assert len(links("self")) <= before, links("self")
assert exp.flush(timeout=60)
wait(lambda: watched() == mine)
print(len(links(shipper)))
"""


def test_workers_that_come_and_go_by_the_hundred_leave_no_descriptor_behind(
    tmp_path: Path, otlp_sink: HttpSink, record_property: Callable[[str, object], None]
) -> None:
    count = 1_000 if SOAK else 200
    done = finished(tmp_path, MANY, count, limit_s=300, OTEL_EXPORTER_OTLP_ENDPOINT=otlp_sink.url)
    assert done.returncode == 0, done.stderr
    until(lambda: len(otlp_sink.points("many")) == count + 1, 60)
    assert sorted(point.iteration for point in otlp_sink.points("many") if point.name == "child") == list(range(count))
    assert int(done.stdout) < 100
    record_property("workers", count)


WORKER = """
import os, sys, tracelet
exp = tracelet.start_logging(exp_name="worker", project="fork", backend="otlp")
for step in range(100):
    exp.log_metric("loss", step, iteration=step)
print(exp.id, flush=True)
sys.stdin.readline()
"""


def test_where_a_launcher_kills_the_children_of_its_workers_the_shipper_is_none_of_them(
    tmp_path: Path, clean_environment: Path, otlp_sink: HttpSink
) -> None:
    # As Ray does at the end of a worker process; what it does for real: tests/trainers/test_ray.py.
    environ = {"RAY_RAYLET_PID": "4242", "OTEL_EXPORTER_OTLP_ENDPOINT": otlp_sink.url}
    with started(tmp_path, WORKER, **environ) as worker:
        run_id = said(worker)
        folder = folder_of(clean_environment, run_id)
        until(lambda: shipper_alive(folder) is not None, 60)
        shipper = shipper_alive(folder)
        assert shipper is not None
        stat = Path(f"/proc/{shipper}/stat").read_text()
        parent, group, session = map(int, stat.rpartition(")")[2].split()[1:4])
        assert parent != worker.pid
        assert os.getpgid(worker.pid) != group
        assert os.getsid(worker.pid) != session
        worker.kill()
    until(lambda: otlp_sink.ends(run_id) == ["KILLED"], 60)
    assert len(otlp_sink.points(run_id)) == 100


FORKED_IN_A_START = """
import os, signal, sys, threading, time
from pathlib import Path
import tracelet
from tracelet.spool import store

def is_waiting(thread):
    frame = sys._current_frames().get(thread.ident)
    while frame is not None and frame.f_code is not store._lock.__code__:
        frame = frame.f_back
    return frame is not None

exp = tracelet.Experiment("early", project="fork", backend="file", shipper="off", run_id="early")
folder = store.run_folder(Path(os.environ["TRACELET_DIR"]), "early")
with store.held_manifest(folder, make=True):
    starting = threading.Thread(target=exp.start)
    starting.start()
    while not is_waiting(starting):
        time.sleep(0.005)
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        exp.log_metric("child", 1.0, iteration=0)
        os._exit(0)
starting.join()
exp.log_metric("parent", 2.0, iteration=0)
exp.stop()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0)
"""


def test_what_a_child_logs_that_was_forked_while_a_thread_was_starting_the_run_is_there(
    tmp_path: Path, clean_environment: Path
) -> None:
    done = finished(tmp_path, FORKED_IN_A_START, TRACELET_DIR=str(clean_environment))
    assert done.returncode == 0, done.stderr
    found = read(folder_of(clean_environment))
    assert (found.values("child"), found.values("parent")) == ([(0, 1.0)], [(0, 2.0)])
