"""Programs in places that nobody orders: no descriptors, no threads, closed streams, words that can't be said.

Pattern: real programs that take away from themselves what tracelet needs, then log, stop and say what came of it.
Limit: 60 s a program; the file some 30 s.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.programs import finished
from tests.sinks import until
from tests.spooled import folder_of, read
from tracelet.records import SpanEnded, WriterEnded
from tracelet.spool.store import read_manifest

HEAD = """
import json, os, resource, sys
os.environ.pop("PYTEST_CURRENT_TEST", None)  # as outside of a test, where our faults are kept from training
import tracelet
def tried(call, *arguments):
    try:
        return repr(call(*arguments))
    except BaseException as error:
        return f"raised {type(error).__name__}: {error}"
def many(count, start=0):
    for i in range(start, start + count):
        exp.log_metric("loss", float(i), iteration=i)
"""


def answers(tmp_path: Path, code: str, *arguments: object, **environ: str) -> Any:
    """What the program wrote into its file `answers`, as JSON; its streams may be closed."""
    done = finished(tmp_path, HEAD + code, *arguments, **environ)
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "answers").read_text())


SAY = """
with open("answers", "w") as file:
    json.dump(found, file)
"""

TAKE_ALL = """
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
taken = []
def take_all():
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
def give_back(count):
    for _ in range(count):
        os.close(taken.pop())
"""


def test_a_program_without_a_descriptor_left_goes_on_and_ends_as_it_did(
    tmp_path: Path, clean_environment: Path
) -> None:
    code = (
        TAKE_ALL
        + """
exp = tracelet.start_logging(exp_name="x", project="p", backend="file")
take_all()
calls = {
    "points": (many, 70_000), "a new name": (exp.log_metric, "new", 1.0, 1), "params": (exp.log_params, {"a": 1}),
    "an artifact": (exp.log_artifact, __file__), "stats": (lambda: exp.stats and None,), "links": (exp.links,),
    "an iteration": (exp.set_iteration, 3), "flush": (exp.flush, 0.2),
}
found = {name: tried(*call) for name, call in calls.items()}
give_back(20)
found["flush with descriptors"] = tried(exp.flush, 0.0)
take_all()
found["stop"] = tried(exp.stop)
give_back(len(taken))
found["counts"] = [exp.stats.logged, exp.stats.refused]
"""
        + SAY
    )
    found = answers(tmp_path, code)
    logged, refused = found.pop("counts")
    assert found.pop("an artifact").startswith("raised InvalidValue")  # the file could not be read
    assert re.match("raised SpoolError: .*Too many open files.*flush again", found.pop("flush"))
    assert found.pop("flush with descriptors") in ("True", "False")  # what the disk has; the shipper has its own time
    assert found.pop("links") == "{}"
    assert set(found.values()) == {"None"}
    assert logged + refused == 70_003  # with the params, and the record that asks for the flush
    folder = folder_of(clean_environment)
    until(lambda: ended(folder), 60)  # by the shipper that was there before
    assert ended(folder)["status"] == "FINISHED"


def ended(folder: Path) -> Any:
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest.attempts[0].ended


def test_a_start_with_few_descriptors_is_a_spool_error_or_a_run(tmp_path: Path) -> None:
    code = (
        TAKE_ALL
        + """
import tracelet.core.experiment
tracelet.Experiment, tracelet.SpoolError
tracelet.start_logging(exp_name="before", project="p", backend="file", shipper="off").stop()  # all is imported
take_all()
found = []
for free in range(1, 16):
    give_back(1)
    try:
        exp = tracelet.start_logging(exp_name="x", project="p", backend="file")
    except tracelet.SpoolError:
        found.append("a spool error")
        continue
    except BaseException as error:
        found.append(f"{free}: {type(error).__name__}: {error}")
        continue
    found.append(tried(exp.log_metric, "a", 1.0, 1) + tried(lambda: exp.stop(timeout=0)))
"""
        + SAY
    )
    found = answers(tmp_path, code)
    assert set(found) == {"a spool error", "NoneNone"}
    assert found[-1] == "NoneNone"


CLOSED = ["sys.stderr.close()", "os.close(2)", "sys.stderr = None", "sys.stderr = object()", "sys.stdout.close()"]


@pytest.mark.parametrize("how", CLOSED)
def test_what_there_is_to_say_never_raises_whatever_became_of_the_streams(tmp_path: Path, how: str) -> None:
    code = f"""
exp = tracelet.start_logging(exp_name="x", project="p", backend="file", shipper="off", max_bytes=2_500_000)
{how}
found = [tried(many, 100_000), tried(exp.log_params, {{"a": "x" * 3_000_000}}), tried(exp.stop), exp.stats.refused]
sys.stderr = sys.__stderr__ = None
"""
    *calls, refused = answers(tmp_path, code + SAY)
    assert calls == ["None"] * 3
    assert refused > 0


def test_a_logging_handler_or_filter_of_the_program_that_raises_stops_no_call(tmp_path: Path) -> None:
    code = """
import logging
class Handler(logging.Handler):
    def emit(self, record):
        raise RuntimeError("a handler")
def refuse(record):
    raise KeyError("a filter")
logging.getLogger().addHandler(Handler())
found = []
for filters in ([], [refuse]):
    logging.getLogger("tracelet").filters = filters
    exp = tracelet.Experiment("x", project="p", backend="file", shipper="off", max_bytes=2_500_000)
    found += [tried(many, 100_000), tried(exp.log_params, {"a": "x" * 3_000_000}), tried(exp.stop)]
"""
    assert answers(tmp_path, code + SAY) == ["None"] * 6


BAD = """
class Bad(Exception):
    def __str__(self):
        raise RuntimeError("it has no words")
"""


def test_an_exception_without_words_ends_a_phase_and_a_run_as_any_other(
    tmp_path: Path, clean_environment: Path
) -> None:
    code = (
        BAD
        + """
found = []
try:
    with tracelet.Experiment("x", project="p", backend="file", shipper="off") as exp:
        with exp.span("phase"):
            raise Bad
except Bad:
    found.append(exp.running)
"""
    )
    assert answers(tmp_path, code + SAY) == [False]
    spooled = read(folder_of(clean_environment))
    for kind in (SpanEnded, WriterEnded):
        (ended,) = spooled.of(kind)
        assert ended.error is not None
        assert ended.error.type == "__main__.Bad"
        assert "could not be had" in ended.error.message


def test_a_program_that_an_exception_without_words_ends_has_failed(tmp_path: Path, clean_environment: Path) -> None:
    code = (
        HEAD
        + BAD
        + """
exp = tracelet.start_logging(exp_name="x", project="p", backend="file", shipper="off")
exp.log_metric("a", 1.0, iteration=1)
raise Bad
"""
    )
    assert finished(tmp_path, code).returncode == 1
    (ended,) = read(folder_of(clean_environment)).of(WriterEnded)
    assert ended.status == "FAILED"


def test_a_phase_that_another_context_finishes_raises_nothing_and_has_its_end(
    tmp_path: Path, clean_environment: Path
) -> None:
    code = """
import contextvars
exp = tracelet.start_logging(exp_name="x", project="p", backend="file", shipper="off")
def steps():
    with exp.span("phase"):
        yield
generator = steps()
contextvars.copy_context().run(next, generator)
found = [tried(next, generator, None), tried(exp.stop)]
"""
    assert answers(tmp_path, code + SAY) == ["None", "None"]
    assert len(read(folder_of(clean_environment)).of(SpanEnded)) == 1


def test_where_no_thread_can_be_started_the_data_waits_and_is_served_once_one_can(tmp_path: Path) -> None:
    code = """
import threading
threading.stack_size(1 << 30)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 29), resource.RLIM_INFINITY))
exp = tracelet.Experiment("x", project="p", backend="file", shipper="thread")
found = [tried(exp.log_metric, "a", 1.0, 1), tried(exp.flush, 1.0)]
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
threading.stack_size(0)
found += [tried(exp.flush, 30.0), tried(exp.stop), exp.stats.shipped]
"""
    assert answers(tmp_path, code + SAY) == ["None", "False", "True", "None", 1]


def test_an_artifact_relative_to_a_folder_that_is_gone_is_missing_by_name(tmp_path: Path) -> None:
    code = """
exp = tracelet.start_logging(exp_name="x", project="p", backend="file", shipper="off")
os.mkdir("gone")
home = os.getcwd()
os.chdir("gone")
os.rmdir("../gone")
found = [tried(exp.log_artifact, "file"), tried(exp.log_metric, "a", 1.0, 1), tried(exp.stop)]
os.chdir(home)
"""
    artifact, *others = answers(tmp_path, code + SAY)
    assert artifact.startswith("raised FileMissing")
    assert others == ["None", "None"]


def test_a_copy_in_the_process_of_a_launchs_rank_goes_on_being_delivered_after_the_rank_has_stopped(
    tmp_path: Path,
) -> None:
    code = """
import pickle
exp = tracelet.start_logging(exp_name="x", project="p", backend=tracelet.File(path="out.jsonl"))
exp.log_metric("a", 1.0, iteration=1)
copy = pickle.loads(pickle.dumps(exp))
copy.log_metric("b", 0.0, iteration=0)
exp.stop(timeout=1)
for i in range(1, 50):
    copy.log_metric("b", float(i), iteration=i)
found = [copy.flush(40)]
for i in range(50, 100):
    copy.log_metric("b", float(i), iteration=i)
found += [copy.flush(40), copy.stats.shipped]
copy.stop()
"""
    launch = {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "copies",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    assert answers(tmp_path, code + SAY, **launch) == [True, True, 101]


def test_more_living_workers_than_the_shipper_has_descriptors_are_delivered_while_they_live(tmp_path: Path) -> None:
    code = """
import signal, time
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
exp = tracelet.start_logging(exp_name="x", project="p", backend="file")
exp.log_metric("a", 1.0, iteration=0)
workers = []
for _ in range(80):
    pid = os.fork()
    if pid == 0:
        exp.log_metric("a", 1.0, iteration=os.getpid())
        signal.pause()
    workers.append(pid)
until = time.monotonic() + 45
while exp.stats.shipped < 81 and time.monotonic() < until:
    time.sleep(0.1)
found = exp.stats.shipped
for pid in workers:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
exp.stop(timeout=0)
"""
    assert answers(tmp_path, code + SAY) == 81


@pytest.mark.parametrize("mapped", ["mapped", "appended"])
def test_a_program_that_closes_all_descriptors_by_number_keeps_its_own_files_whole(tmp_path: Path, mapped: str) -> None:
    code = """
import time, tracelet.spool.writer
if sys.argv[1] == "appended":
    tracelet.spool.writer.may_map = lambda folder: False
exp = tracelet.start_logging(exp_name="x", project="p", backend="file", shipper="off")
exp.log_params({"before": 1})
exp.log_metric("a", 1.0, iteration=1)
os.closerange(3, 256)
mine = [open(f"mine-{i}", "w+") for i in range(16)]  # these get the numbers that were ours
for file in mine:
    file.write("z" * 100_000)
    file.flush()
exp.log_params({"after": 1})
exp.log_metric("b", 1.0, iteration=1)
exp.stop()
found = [file.tell() for file in mine if not file.closed and os.fstat(file.fileno()).st_size == 100_000]
"""
    assert answers(tmp_path, code + SAY, mapped) == [100_000] * 16
    assert {(tmp_path / f"mine-{i}").read_text() for i in range(16)} == {"z" * 100_000}


def test_secrets_of_the_environment_that_are_no_text_hinder_no_delivery(
    tmp_path: Path, clean_environment: Path
) -> None:
    code = """
exp = tracelet.start_logging(exp_name="x", project="p", backend="file")
many(10)
try:
    with exp:
        raise ConnectionError("refused: " + os.environ["MY_TOKEN"])
except ConnectionError:
    pass
found = tried(exp.flush, 30)
"""
    no_text = os.fsdecode(b"\xff\xfe-planted")
    proxy = f"http://somebody:{no_text}@127.0.0.1:9"
    assert answers(tmp_path, code + SAY, MY_TOKEN=no_text, HTTPS_PROXY=proxy) == "True"
    said = (tmp_path / "tracelet.otlp.jsonl").read_text()
    assert said.count('"asDouble"') >= 10
    assert "refused: ***" in said
