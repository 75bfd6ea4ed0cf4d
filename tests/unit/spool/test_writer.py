"""What the writer promises while the disk is well: records, order, iterations, threads, forks, signals, the end."""

from __future__ import annotations

import errno
import os
import signal
import stat
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import pytest

from tests.unit.spool.pens import ENDED, NAMED, OPENED, TEXT, drain, end, name_frame, only, pen, to_float
from tracelet.errors import InvalidValue, RunClosed, SpoolError, SpoolFull
from tracelet.guard import guard
from tracelet.spool.points import Address
from tracelet.spool.reader import START, SlotRange, SpoolReader
from tracelet.spool.store import make_spares, usage
from tracelet.spool.writer import Writer

both_ways = pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "appended"])


@both_ways
def test_every_point_is_read_back_in_order_over_many_segments(tmp_path: Path, mapped: bool) -> None:
    writer = pen(tmp_path, slots_per_segment=64, mapped=mapped)
    before = time.time_ns()
    expected = [(f"m{i % 7}", i / 3, i - 500) for i in range(1000)]
    for name, value, iteration in expected:
        writer.log(name, value, iteration=iteration)
    after = time.time_ns()
    end(writer)
    story = only(drain(tmp_path))
    assert story.points == expected
    assert story.times == sorted(story.times)
    assert before <= story.times[0]
    assert story.times[-1] <= after
    assert story.ended
    assert story.voids == 0
    assert not story.damaged
    assert [kind for kind, _ in story.frames] == [1] + 7 * [NAMED] + [ENDED]
    assert writer.counts() == (1000, 9, 0)


@both_ways
def test_a_live_writer_can_be_read_up_to_its_last_call(tmp_path: Path, mapped: bool) -> None:
    writer = pen(tmp_path, mapped=mapped)
    for i in range(5):
        writer.log("a", i, i)
        story = only(drain(tmp_path))
        assert len(story.points) == i + 1
        assert not story.ended
    end(writer)


def test_a_call_without_an_iteration_takes_the_current_one(tmp_path: Path) -> None:
    writer = pen(tmp_path)
    assert writer.iteration == 0
    writer.log("a", 1.0)
    writer.set_iteration(7)
    writer.log("a", 2.0)
    writer.log("a", 3.0, iteration=0)
    writer.log("a", 4.0)
    writer.log_many({"a": 5.0})
    end(writer)
    assert [iteration for _, _, iteration in only(drain(tmp_path)).points] == [0, 7, 0, 7, 7]
    assert writer.iteration == 7


def test_a_name_logged_twice_without_any_iteration_is_told_once(tmp_path: Path) -> None:
    told: list[str] = []
    writer = pen(tmp_path, repeated_without_iteration=told.append)
    writer.log("once", 1.0)
    writer.log("twice", 1.0)
    assert told == []
    for _ in range(10):
        writer.log("twice", 1.0)
    assert told == ["twice"]
    end(writer)


def test_iterations_of_other_types_are_converted_and_int64_is_the_limit(tmp_path: Path) -> None:
    class Index:
        def __index__(self) -> int:
            return 5

    writer = pen(tmp_path)
    writer.log("a", 1.0, iteration=Index())  # type: ignore[arg-type]
    writer.log("a", 1.0, iteration=2**63 - 1)
    writer.log("a", 1.0, iteration=-(2**63))
    for beyond in (2**63, -(2**63) - 1):
        with pytest.raises(InvalidValue):
            writer.log("a", 1.0, iteration=beyond)
        with pytest.raises(InvalidValue):
            writer.log_many({"a": 1.0}, iteration=beyond)
        with pytest.raises(InvalidValue):
            writer.set_iteration(beyond)
    writer.log("a", 2.0, iteration=1)
    end(writer)
    story = only(drain(tmp_path))
    assert [iteration for _, _, iteration in story.points] == [5, 2**63 - 1, -(2**63), 1]
    assert story.voids == 2
    assert story.ended
    assert writer.counts().points == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), RuntimeError("CUDA error")])
def test_what_a_conversion_raises_passes_unchanged_and_takes_no_slot(tmp_path: Path, error: BaseException) -> None:
    class Tensor:
        def __float__(self) -> float:
            raise error

    writer = pen(tmp_path)
    writer.log("a", 1.0, 1)
    head = writer.heads()
    with pytest.raises(type(error)) as caught:
        writer.log("a", Tensor(), 1)
    assert caught.value is error
    assert writer.heads() == head
    end(writer)


def test_one_bad_value_or_name_of_several_writes_nothing(tmp_path: Path) -> None:
    writer = pen(tmp_path)
    writer.log_many({"a": 1, "b": 2.0}, 1)
    head = writer.heads()
    for bad in ({"a": 1.0, "b": "x"}, {"a": 1.0, "": 2.0}, {"new": 1.0, 5: 2.0}):
        with pytest.raises(InvalidValue):
            writer.log_many(bad, 2)  # type: ignore[arg-type]
    assert writer.heads() == head
    writer.log_many({}, 3)
    end(writer)
    story = only(drain(tmp_path))
    assert story.points == [("a", 1.0, 1), ("b", 2.0, 1)]
    assert story.times[0] == story.times[1]


@pytest.mark.parametrize("name", ["", None, 5, ["a"], b"a"])
def test_what_is_no_name_is_refused_at_once(tmp_path: Path, name: object) -> None:
    writer = pen(tmp_path)
    writer.log("a", 1.0, 1)
    with pytest.raises(InvalidValue):
        writer.log(name, 1.0, 1)  # type: ignore[arg-type]
    end(writer)
    assert len(only(drain(tmp_path)).points) == 1


@both_ways
def test_frames_and_points_share_one_order(tmp_path: Path, mapped: bool) -> None:
    writer = pen(tmp_path, slots_per_segment=16, mapped=mapped)
    addresses = []
    for i in range(40):
        writer.log("a", i, i)
        addresses.append(writer.frame(TEXT, b"%d" % i * (i * 50), time.time_ns()))
    end(writer)
    story = only(drain(tmp_path))
    assert [payload for kind, payload in story.frames if kind == TEXT] == [b"%d" % i * (i * 50) for i in range(40)]
    slots = story.slots()
    assert [(a.segment, a.slot) for a in addresses] == slots[3:-1:2]
    assert addresses == sorted(addresses)


def test_frames_roll_to_a_new_file(tmp_path: Path) -> None:
    writer = pen(tmp_path)
    payload = os.urandom(6 * 2**20)
    for _ in range(8):
        writer.frame(TEXT, payload, 1)
    end(writer)
    assert len(list(tmp_path.glob("*.frames"))) == 3
    assert [p for kind, p in only(drain(tmp_path)).frames if kind == TEXT] == [payload] * 8


def test_a_frame_that_is_too_long_is_refused_by_name(tmp_path: Path) -> None:
    writer = pen(tmp_path)
    with pytest.raises(SpoolError, match="artifact"):
        writer.frame(TEXT, bytes(256 * 2**20 + 1), 1)
    writer.log("a", 1.0, 1)
    end(writer)
    assert only(drain(tmp_path)).points == [("a", 1.0, 1)]


def test_after_the_end_every_call_raises_and_a_second_end_does_nothing(tmp_path: Path) -> None:
    writer = pen(tmp_path)
    log = writer.log
    log("a", 1.0, 1)
    end(writer)
    end(writer)
    for call in (
        lambda: log("a", 1.0, 2),
        lambda: log("new", 1.0, 2),
        lambda: writer.log_many({"a": 1.0}, 2),
        lambda: writer.frame(TEXT, b"", 1),
    ):
        with pytest.raises(RunClosed):
            call()
    story = only(drain(tmp_path))
    assert story.points == [("a", 1.0, 1)]
    assert [kind for kind, _ in story.frames].count(ENDED) == 1


@both_ways
def test_an_end_takes_the_slot_kept_for_it_or_the_next_segments(tmp_path: Path, mapped: bool) -> None:
    for count, at in ((5, 7), (6, 0), (7, 1)):  # behind the opening and the name; the eighth record needs a segment
        folder = tmp_path / str(count)
        writer = pen(folder, slots_per_segment=8, mapped=mapped)
        for i in range(count):
            writer.log("a", 1.0, i)
        name = str(writer.writer_id)
        assert writer.heads() == (Address(name, 1 if at == 7 else 2, at),)
        end(writer)
        assert writer.heads() == (Address(name, 1 if at == 7 else 2, at + 1),)
        story = only(drain(folder))
        assert [i for _, _, i in story.points] == list(range(count))
        assert story.slots()[-1] == (1 if at == 7 else 2, at)
        assert (story.voids, story.ended) == (0, True)


def fill(writer: Writer) -> None:
    while True:
        writer.frame(TEXT, b"more", 1)


@both_ways
def test_an_end_has_room_where_the_quota_leaves_none(tmp_path: Path, mapped: bool, lenient: None) -> None:
    for limit in range(30_000, 43_000, 1024):
        folder = tmp_path / str(limit)
        writer = pen(folder, slots_per_segment=128, max_bytes=limit, mapped=mapped)
        for i in range(3000):
            writer.log("a", 1.0, i)
            if writer.counts().refused:
                break
        with pytest.raises(SpoolFull):
            fill(writer)
        points = writer.counts().points
        end(writer)
        story = only(drain(folder))
        assert len(story.points) == points
        assert story.ended
        assert usage(folder) <= limit + 8192 + 4096


def test_the_room_kept_for_the_end_is_no_damage_and_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object, **__: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no fallocate here")

    monkeypatch.setattr("tracelet.spool.frames.allocate", none)
    writer = pen(tmp_path, mapped=False)
    writer.log("a", 1.0, 1)
    writer.frame(TEXT, b"text", 1)
    (path,) = tmp_path.glob("*.frames")
    assert path.read_bytes().endswith(bytes(8192))
    reader = SpoolReader(tmp_path)
    assert [kind for kind, _ in reader.scan_frames(str(writer.writer_id))] == [OPENED, NAMED, TEXT]
    assert reader.damaged_frames == 0
    reader.close()
    end(writer)
    assert path.read_bytes().endswith(b"{}")
    assert only(drain(tmp_path)).ended


def test_a_forked_childs_files_leave_the_parents_room_alone(tmp_path: Path) -> None:
    writer = pen(tmp_path, mapped=False)
    os.register_at_fork(after_in_child=writer.after_fork_in_child)
    writer.log("a", 1.0, 1)
    before, after = os.pipe()

    def child() -> None:
        os.read(before, 1)  # the parent has written on, behind what the child knew as the end
        writer.frame(TEXT, b"child", 1)

    pid = os.fork()
    if pid == 0:
        try:
            child()
        finally:
            os._exit(0)
    writer.frame(TEXT, b"t" * 5000, 1)
    os.write(after, b"!")
    os.waitpid(pid, 0)
    end(writer)
    first, _ = drain(tmp_path, dead=True).values()
    assert [len(payload) for kind, payload in first.frames if kind == TEXT] == [5000]
    assert not first.damaged


def test_folder_and_files_are_the_users_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "host"
    writer = pen(folder)
    writer.log("a", 1.0, 1)
    end(writer)
    for path in (folder.parent, folder):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    files = list(folder.iterdir())
    assert len(files) == 3
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_nothing_is_made_before_the_first_record(tmp_path: Path) -> None:
    writer = pen(tmp_path / "run")
    assert writer.writer_id is None
    assert writer.heads() == ()
    assert writer.counts() == (0, 0, 0)
    end(writer)
    assert list(tmp_path.iterdir()) == []


def test_a_spare_segment_is_taken_when_there_is_one(tmp_path: Path) -> None:
    assert make_spares(tmp_path, 64) == 2
    writer = pen(tmp_path, slots_per_segment=64)
    writer.log("a", 1.0, 1)
    assert [path.name for path in tmp_path.glob("spare-*")] == ["spare-2.points"]
    for i in range(200):
        writer.log("a", float(i), i)
    assert make_spares(tmp_path, 32) == 2  # of another size: not to be used as they are
    for i in range(200):
        writer.log("a", float(i), i)
    end(writer)
    assert len(only(drain(tmp_path)).points) == 401


# ---- threads, forks, signals ------------------------------------------------------------------------------------


@both_ways
def test_no_record_of_many_threads_is_lost_and_each_keeps_its_order(tmp_path: Path, mapped: bool) -> None:
    writer = pen(tmp_path, slots_per_segment=1024, mapped=mapped)
    log = writer.log
    count = 20_000 if mapped else 3_000

    def work(number: int) -> None:
        for i in range(count):
            log(f"t{number}", float(number), i)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    end(writer)
    story = only(drain(tmp_path))
    for number in range(8):
        assert [i for name, _, i in story.points if name == f"t{number}"] == list(range(count))
    assert story.voids == 0
    assert writer.counts() == (8 * count, 10, 0)


def test_threads_that_log_while_the_run_ends_get_every_acknowledged_record_kept(tmp_path: Path) -> None:
    writer = pen(tmp_path, slots_per_segment=512)
    logged = [0] * 4

    def work(number: int) -> None:
        try:
            while True:
                writer.log(f"t{number}", 1.0, logged[number])
                logged[number] += 1
        except RunClosed:
            pass

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    limit = time.monotonic() + 10
    while sum(logged) < 50_000 and time.monotonic() < limit:
        time.sleep(0.001)
    end(writer)
    for thread in threads:
        thread.join()
    story = only(drain(tmp_path))
    assert len(story.points) == sum(logged)
    assert story.frames[-1][0] == ENDED
    assert story.ended


def _in_child(work: object) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()  # type: ignore[operator]
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@both_ways
def test_a_forked_child_gets_files_of_its_own_and_the_parents_stay_whole(tmp_path: Path, mapped: bool) -> None:
    writer = pen(tmp_path, slots_per_segment=64, mapped=mapped)
    os.register_at_fork(after_in_child=writer.after_fork_in_child)
    log = writer.log  # kept over the fork
    for i in range(100):
        log("a", 1.0, i)

    def child() -> None:
        assert writer.counts().points == 0
        assert writer.heads() == ()
        for i in range(100):
            log("a", 2.0, i)
        writer.frame(TEXT, b"child", 1)
        assert writer.counts().points == 100

    assert _in_child(child) == 0
    for i in range(100, 200):
        log("a", 1.0, i)
    end(writer)
    first, second = drain(tmp_path, dead=True).values()
    assert (first.role, second.role) == ("first", "child")
    assert first.points == [("a", 1.0, i) for i in range(200)]
    assert second.points == [("a", 2.0, i) for i in range(100)]
    assert first.ended
    assert not second.ended


def test_a_fork_while_another_thread_holds_the_lock_does_not_hang_the_child(tmp_path: Path) -> None:
    inside, go = threading.Event(), threading.Event()

    def slow_name(metric_id: int, name: str) -> tuple[int, bytes]:
        if name == "slow":
            inside.set()
            go.wait(20)
        return name_frame(metric_id, name)

    writer = pen(tmp_path, name_frame=slow_name)
    writer.log("a", 1.0, 1)
    thread = threading.Thread(target=lambda: writer.log("slow", 1.0, 1))
    thread.start()
    assert inside.wait(20)

    def child() -> None:
        signal.alarm(20)
        writer.after_fork_in_child()
        writer.log("b", 2.0, 2)

    assert _in_child(child) == 0
    go.set()
    thread.join()
    end(writer)
    first, second = drain(tmp_path, dead=True).values()
    assert first.points == [("a", 1.0, 1), ("slow", 1.0, 1)]
    assert second.points == [("b", 2.0, 2)]


@both_ways
def test_a_handler_that_logs_a_new_name_inside_the_writers_lock_goes_to_overflow(tmp_path: Path, mapped: bool) -> None:
    def interrupted(metric_id: int, name: str) -> tuple[int, bytes]:
        if name == "outer":
            os.kill(os.getpid(), signal.SIGUSR1)  # handled at once, in this thread, with the lock held
        return name_frame(metric_id, name)

    writer = pen(tmp_path, name_frame=interrupted, mapped=mapped)

    def handler(number: int, frame: object) -> None:
        writer.log("from the handler", 2.0, 2)
        writer.frame(TEXT, b"params", 1)

    old = signal.signal(signal.SIGUSR1, handler)
    try:
        signal.alarm(20)
        writer.log("outer", 1.0, 1)
        writer.log("from the handler", 3.0, 3)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGUSR1, old)
    assert len(writer.heads()) == 2
    assert len(writer.writer_ids()) == 2
    end(writer)
    stories = {story.role: story for story in drain(tmp_path).values()}
    assert stories["first"].points == [("outer", 1.0, 1), ("from the handler", 3.0, 3)]
    assert stories["overflow"].points == [("from the handler", 2.0, 2)]
    assert stories["overflow"].ended
    assert stories["first"].ended


def test_an_end_asked_inside_the_writers_lock_is_written_when_the_write_is_done(tmp_path: Path) -> None:
    def interrupted(metric_id: int, name: str) -> tuple[int, bytes]:
        if name == "outer":
            end(writer)
        return name_frame(metric_id, name)

    writer = pen(tmp_path, name_frame=interrupted)
    writer.log("a", 1.0, 1)
    writer.log("outer", 1.0, 1)
    with pytest.raises(RunClosed):
        writer.log("a", 1.0, 2)
    story = only(drain(tmp_path))
    assert story.points == [("a", 1.0, 1), ("outer", 1.0, 1)]
    assert story.frames[-1][0] == ENDED
    assert story.ended


def test_an_opening_that_is_interrupted_leaves_nothing_to_be_seen(tmp_path: Path) -> None:
    calls = [0]

    def interrupted(metric_id: int, name: str) -> tuple[int, bytes]:
        calls[0] += 1
        if calls[0] == 1:
            raise KeyboardInterrupt
        return name_frame(metric_id, name)

    writer = pen(tmp_path, name_frame=interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.log("a", 1.0, 1)
    writer.log("a", 2.0, 2)
    end(writer)
    assert only(drain(tmp_path)).points == [("a", 2.0, 2)]


# ---- refused ----------------------------------------------------------------------------------------------------


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "strict", False)


@both_ways
def test_beyond_max_bytes_points_are_counted_and_frames_raise(tmp_path: Path, mapped: bool, lenient: None) -> None:
    limit = 40_000
    writer = pen(tmp_path, slots_per_segment=256, max_bytes=limit, mapped=mapped)
    for i in range(5000):
        writer.log("a", 1.0, i)
    counts = writer.counts()
    assert counts.refused > 0
    assert counts.points + counts.refused == 5000
    assert usage(tmp_path) <= limit
    with pytest.raises(SpoolFull, match="TRACELET_MAX_BYTES"):
        writer.frame(TEXT, bytes(limit), 1)
    end(writer)
    assert [i for _, _, i in only(drain(tmp_path, dead=True)).points] == list(range(counts.points))


def test_a_folder_that_cannot_be_made_refuses_without_raising(tmp_path: Path, lenient: None) -> None:
    (tmp_path / "file").write_text("in the way")
    writer = pen(tmp_path / "file" / "run")
    for i in range(100):
        writer.log("a", 1.0, i)
    writer.log_many({"a": 1.0, "b": 2.0}, 1)
    assert writer.counts() == (0, 0, 102)
    with pytest.raises(SpoolError, match="TRACELET_DIR"):
        writer.frame(TEXT, b"", 1)
    end(writer)


def test_conversion_comes_before_the_slot(tmp_path: Path) -> None:
    heads: list[object] = []

    class Slow:
        def __float__(self) -> float:
            heads.append(writer.heads())
            return 1.0

    writer = pen(tmp_path, to_float=to_float)
    writer.log("a", 0.0, 0)
    before = writer.heads()
    writer.log("a", Slow(), 1)
    assert heads == [before]
    end(writer)


def test_a_slot_left_open_by_a_trace_function_is_void_after_the_end(tmp_path: Path) -> None:
    writer = pen(tmp_path)
    writer.log("a", 1.0, 1)
    segment = writer._sets[0].segment
    next(segment.slots)  # type: ignore[attr-defined]  # what no call of ours can leave
    writer.log("a", 2.0, 2)
    end(writer)
    story = only(drain(tmp_path))
    assert story.points == [("a", 1.0, 1), ("a", 2.0, 2)]
    assert story.voids == 1
    assert story.ended
    assert writer.counts().points == 2


def test_an_end_waits_for_a_thread_that_stands_in_a_slot_but_not_for_ever(tmp_path: Path) -> None:
    inside, go = threading.Event(), threading.Event()
    writer = pen(tmp_path)
    writer.log("a", 1.0, 1)

    def trace(frame: FrameType, event: str, arg: object) -> object:
        # The line of the store: the slot has been taken, nothing stands in it yet.
        if frame.f_code is writer.log.__code__ and frame.f_locals.get("offset"):  # type: ignore[attr-defined]
            sys.settrace(None)
            inside.set()
            go.wait(20)
        return trace

    def work() -> None:
        sys.settrace(trace)
        writer.log("a", 2.0, 2)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(20)
    end(writer)
    (name,) = writer.writer_ids()
    reader = SpoolReader(tmp_path)
    _, position = reader.poll(name, START, 100, dead=False)
    assert position.open == ((1, 3),)  # left open, for it may still be filled
    assert reader.ended(name)
    go.set()
    thread.join()
    ranges, position = reader.poll(name, position, 100, dead=False)
    assert ranges == (SlotRange(name, 1, 3, 4),)
    assert position.open == ()
    reader.close()
