"""The experiment as training code meets it; no shipper, what was logged is read back from the spool."""

from __future__ import annotations

import decimal
import logging
import math
import multiprocessing
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

import tracelet
from tests.shipping import until
from tests.spooled import folder_of, read
from tracelet.core.experiment import Experiment, ExperimentConfig
from tracelet.records import (
    ArtifactLogged,
    ParamsLogged,
    RunStarted,
    SpanEnded,
    SpanStarted,
    TagsSet,
    WriterEnded,
    WriterOpened,
)
from tracelet.spool import store


@pytest.fixture
def spool(clean_environment: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A spool no shipper serves, and a working folder of its own."""
    monkeypatch.setenv("TRACELET_SHIPPER", "off")
    monkeypatch.chdir(tmp_path)
    return clean_environment


def test_start_and_stop_may_be_called_again_without_harm(spool: Path) -> None:
    exp = tracelet.start_logging(exp_name="twice", backend="file")
    assert exp.start() is exp
    exp.stop()
    exp.stop()
    tracelet.stop_logging()
    tracelet.stop_logging()
    assert len(read(folder_of(spool)).of(WriterEnded)) == 1


def test_start_after_stop_names_the_way_to_resume(spool: Path) -> None:
    exp = Experiment("once", backend="file")
    exp.log_metric("loss", 1.0, iteration=0)
    exp.stop()
    for call in (exp.start, lambda: exp.log_metric("loss", 1.0, iteration=1), lambda: exp.log_params({"a": 1})):
        with pytest.raises(tracelet.RunClosed, match=f"run_id='{exp.id}'"):
            call()


def test_resumed_run_is_a_second_attempt_in_the_same_folder(spool: Path) -> None:
    first = Experiment("resumed", backend="file")
    first.log_metric("loss", 1.0, iteration=0)
    first.stop()
    second = Experiment("resumed", backend="file", run_id=first.id)
    second.log_metric("loss", 0.5, iteration=1)
    second.stop()
    found = read(folder_of(spool, first.id))
    assert found.values("loss") == [(0, 1.0), (1, 0.5)]
    assert len({opened.attempt_key for opened in found.of(WriterOpened)}) == 2


def test_constructed_experiment_starts_at_its_first_log_call(spool: Path) -> None:
    exp = Experiment("lazy", backend="file")
    assert not list(spool.glob("*/*"))
    exp.log_metric("loss", 1.0, iteration=0)
    assert read(folder_of(spool)).values("loss") == [(0, 1.0)]
    exp.stop()


def test_arguments_win_over_config_and_config_over_environment(spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACELET_EXPERIMENT_NAME", "from environment")
    monkeypatch.setenv("TRACELET_PROJECT", "from environment")
    monkeypatch.setenv("TRACELET_BACKEND", "console")
    config = ExperimentConfig(name="from config", project="from config", backend_name="file")
    with Experiment(name="argument", config=config):
        pass
    resource = read(folder_of(spool)).of(WriterOpened)[0].resource
    assert resource["tracelet.run.name"] == "argument"
    assert resource["tracelet.project"] == "from config"
    assert resource["service.name"] == "from config"


def test_second_start_logging_ends_the_first_with_a_warning(spool: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = tracelet.start_logging(exp_name="first", backend="file")
    second = tracelet.start_logging(exp_name="second", backend="file")
    assert not first.running
    assert second.running
    assert tracelet.get_active_experiment() is second
    assert first.id in caplog.text
    tracelet.stop_logging()
    assert tracelet.get_active_experiment() is None


def test_wrong_second_start_leaves_the_first_running(spool: Path) -> None:
    first = tracelet.start_logging(exp_name="first", backend="file")
    with pytest.raises(tracelet.ConfigError, match="mlflow"):
        tracelet.start_logging(exp_name="second", backend="mlfow")
    assert tracelet.get_active_experiment() is first
    tracelet.stop_logging()


def test_iterations_given_current_and_default(spool: Path) -> None:
    with Experiment("iterations", backend="file") as exp:
        exp.log_metric("before", 1.0)
        exp.set_iteration(5)
        exp.log_metric("loss", 1.0)
        exp.log_metric("val_loss", 2.0, iteration=10)
        exp.log_metric("loss", 3.0)
        exp.log_metric("zero", 4.0, iteration=0)
        exp.log_metric("negative", 5.0, iteration=-(2**63))
        exp.log_metrics({"a": 1, "b": 2})
        assert exp.iteration == 5
        with pytest.raises(tracelet.InvalidValue):
            exp.log_metric("far", 1.0, iteration=2**63)
        with pytest.raises(tracelet.InvalidValue):
            exp.set_iteration(2**63)
    found = read(folder_of(spool))
    assert found.values("before") == [(0, 1.0)]
    assert found.values("loss") == [(5, 1.0), (5, 3.0)]
    assert found.values("val_loss") == [(10, 2.0)]
    assert found.values("zero") == [(0, 4.0)]
    assert found.values("negative") == [(-(2**63), 5.0)]
    assert found.values("a") == [(5, 1.0)]
    assert found.values("far") == []


def test_iteration_set_before_the_start_holds(spool: Path) -> None:
    exp = Experiment("early", backend="file")
    exp.set_iteration(7)
    assert exp.iteration == 7
    exp.log_metric("loss", 1.0)
    exp.stop()
    assert read(folder_of(spool)).values("loss") == [(7, 1.0)]


def test_name_logged_again_without_any_iteration_is_warned_of_once(
    spool: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Experiment("forgot", backend="file") as exp:
        for value in range(5):
            exp.log_metric("loss", value)
            exp.log_metric("other", value)
    warnings = [r.getMessage() for r in caplog.records if "iteration=" in r.getMessage()]
    assert len(warnings) == 1
    assert len(read(folder_of(spool)).values("loss")) == 5


def test_set_iteration_needs_no_warning(spool: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Experiment("kept", backend="file") as exp:
        for step in range(3):
            exp.set_iteration(step)
            exp.log_metric("loss", step)
    assert "iteration=" not in caplog.text


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (1, 1.0),
        (True, 1.0),
        (decimal.Decimal("0.5"), 0.5),
        (np.float32(0.25), 0.25),
        (np.int64(3), 3.0),
        (np.array(2.5), 2.5),
        (math.inf, math.inf),
        (-math.inf, -math.inf),
    ],
)
def test_number_like_values_are_kept(spool: Path, value: object, stored: float) -> None:
    with Experiment("values", backend="file") as exp:
        exp.log_metric("m", value, iteration=0)
    assert read(folder_of(spool)).values("m") == [(0, stored)]


def test_nan_is_kept(spool: Path) -> None:
    with Experiment("nan", backend="file") as exp:
        exp.log_metric("m", math.nan, iteration=0)
    ((_, value),) = read(folder_of(spool)).values("m")
    assert math.isnan(value)


@pytest.mark.parametrize("value", ["0.5", None, b"1", 1j, [1.0], np.zeros(2), object()])
def test_what_is_no_number_is_refused_with_name_and_type(spool: Path, value: object) -> None:
    with Experiment("refused", backend="file") as exp:
        with pytest.raises(tracelet.InvalidValue, match=r"my_metric.*" + type(value).__name__):
            exp.log_metric("my_metric", value, iteration=0)
        with pytest.raises(tracelet.InvalidValue):
            exp.log_metrics({"good": 1.0, "my_metric": value}, iteration=0)
    assert read(folder_of(spool)).points == []


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_what_a_conversion_raises_passes_through_unchanged(spool: Path, raised: type[BaseException]) -> None:
    class Tensor:
        def __float__(self) -> float:
            raise raised("CUDA error")

    with Experiment("raising", backend="file") as exp:
        with pytest.raises(raised, match="CUDA error"):
            exp.log_metric("loss", Tensor(), iteration=0)
        exp.log_metric("loss", 1.0, iteration=1)
    found = read(folder_of(spool))
    assert found.values("loss") == [(1, 1.0)]
    assert found.open_slots == 0


def test_params_are_flattened_and_kept_as_they_are(spool: Path) -> None:
    with Experiment("params", backend="file") as exp:
        exp.log_params({"lr": 0.001, "optimizer": "adam", "augment": True, "none": None})
        exp.log_params({"model": {"num_layers": 4, "head": {"dim": 64}}, "sizes": [1, 2]})
    params = {k: v for record in read(folder_of(spool)).of(ParamsLogged) for k, v in record.params.items()}
    assert params["lr"] == 0.001
    assert params["augment"] is True
    assert params["none"] == "None"
    assert params["model.num_layers"] == 4
    assert params["model.head.dim"] == 64
    assert params["sizes"] == "[1, 2]"


def test_tags_of_config_argument_and_call_are_joined(spool: Path) -> None:
    config = ExperimentConfig(name="tags", tags={"team": "ml", "version": "v1"}, backend_name="file")
    with Experiment(config=config, tags={"version": "v2"}) as exp:
        exp.set_tags({"stage": "final"})
        assert exp.tags == {"team": "ml", "version": "v2", "stage": "final"}
    tags = {k: v for record in read(folder_of(spool)).of(TagsSet) for k, v in record.tags.items()}
    assert tags == {"team": "ml", "version": "v2", "stage": "final"}


def test_artifact_is_copied_at_the_call(spool: Path, tmp_path: Path) -> None:
    source = tmp_path / "model_checkpoint.pth"
    source.write_bytes(b"first")
    with Experiment("artifact", backend="file") as exp:
        exp.log_artifact("model_checkpoint.pth", "models/checkpoint_epoch_10.pth")
        source.write_bytes(b"rewritten")
        exp.log_artifact(source)
    folder = folder_of(spool)
    named, alone = read(folder).of(ArtifactLogged)
    assert named.path == "models/checkpoint_epoch_10.pth"
    assert named.stored is not None
    assert (folder / named.stored).read_bytes() == b"first"
    assert alone.path == "model_checkpoint.pth"


def test_missing_artifact_raises_at_once(spool: Path) -> None:
    with Experiment("missing", backend="file") as exp, pytest.raises(tracelet.TraceletError, match=r"nowhere\.bin"):
        exp.log_artifact("nowhere.bin")


def test_exception_in_a_with_block_ends_the_run_as_failed_and_is_recorded(spool: Path) -> None:
    with pytest.raises(ZeroDivisionError), Experiment("failing", backend="file"):
        1 / 0  # noqa: B018
    (ended,) = read(folder_of(spool)).of(WriterEnded)
    assert ended.status == "FAILED"
    assert ended.error is not None
    assert ended.error.type == "ZeroDivisionError"
    assert "1 / 0" in ended.error.stacktrace


@pytest.mark.parametrize(
    ("raised", "status"), [(KeyboardInterrupt(), "KILLED"), (SystemExit(0), "FINISHED"), (SystemExit(3), "FAILED")]
)
def test_what_leaves_a_with_block_decides_the_status(spool: Path, raised: BaseException, status: str) -> None:
    with pytest.raises(type(raised)), Experiment("leaving", backend="file"):
        raise raised
    (ended,) = read(folder_of(spool)).of(WriterEnded)
    assert ended.status == status


def test_spans_nest_and_record_their_exception(spool: Path) -> None:
    with Experiment("spans", backend="file") as exp:
        with exp.span("epoch", {"n": 1}), exp.span("validate"):
            pass
        with pytest.raises(ValueError, match="bad"), exp.span("failing"):
            raise ValueError("bad")
    found = read(folder_of(spool))
    epoch, validate, failing = found.of(SpanStarted)
    assert validate.parent_span_id == epoch.span_id
    assert failing.parent_span_id == epoch.parent_span_id
    assert epoch.attributes == {"n": 1}
    errors = {record.span_id: record.error for record in found.of(SpanEnded)}
    assert errors[epoch.span_id] is None
    assert errors[failing.span_id] is not None


def test_span_stays_out_of_opentelemetrys_context_unless_attached(spool: Path) -> None:
    with Experiment("attach", backend="file") as exp:
        with exp.span("private"):
            assert not trace.get_current_span().get_span_context().is_valid
        with exp.span("shared", attach=True):
            context = trace.get_current_span().get_span_context()
        assert not trace.get_current_span().get_span_context().is_valid
    started = read(folder_of(spool)).of(SpanStarted)[1]
    assert f"{context.span_id:016x}" == started.span_id
    assert context.trace_flags.sampled


def test_attached_span_follows_the_surrounding_spans_sampling(spool: Path) -> None:
    tracer = TracerProvider(sampler=ALWAYS_OFF).get_tracer("app")
    with (
        Experiment("sampling", backend="file") as exp,
        tracer.start_as_current_span("unsampled"),
        exp.span("shared", attach=True),
    ):
        assert not trace.get_current_span().get_span_context().trace_flags.sampled


def test_16_threads_lose_and_mix_nothing(spool: Path) -> None:
    threads, each = 16, 5_000
    with Experiment("threads", backend="file") as exp:

        def work(number: int) -> None:
            for i in range(each):
                exp.log_metric(f"m{number}", number * each + i, iteration=i)

        workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    found = read(folder_of(spool))
    assert len(found.points) == threads * each
    for n in range(threads):
        assert found.values(f"m{n}") == [(i, float(n * each + i)) for i in range(each)]


def test_threads_that_log_first_at_once_start_one_run(spool: Path) -> None:
    exp = Experiment("one", backend="file")
    together = threading.Barrier(16)

    def log_first(number: int) -> None:
        together.wait()
        exp.log_metric("x", number, iteration=number)

    threads = [threading.Thread(target=log_first, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    exp.stop()
    assert sorted(read(folder_of(spool)).values("x")) == [(n, float(n)) for n in range(16)]


def test_log_metric_of_a_subclass_is_called_after_the_start_too(spool: Path) -> None:
    class Doubling(Experiment):
        def log_metric(self, name: str, value: float, iteration: int | None = None) -> None:
            super().log_metric(name, 2 * value, iteration)

    with Doubling("subclass", backend="file") as exp:
        exp.log_metric("x", 1.0, iteration=0)
        exp.log_metric("x", 2.0, iteration=1)
    assert read(folder_of(spool)).values("x") == [(0, 2.0), (1, 4.0)]


def test_stopped_experiment_unpickles_and_refuses_what_is_logged(spool: Path) -> None:
    with Experiment("in a checkpoint", backend="file") as exp:
        exp.log_metric("x", 1.0, iteration=0)
    loaded = pickle.loads(pickle.dumps(exp))
    assert (loaded.id, loaded.running) == (exp.id, False)
    assert "stopped" in repr(loaded)
    with pytest.raises(tracelet.RunClosed, match=f"run_id='{exp.id}'"):
        loaded.log_metric("x", 2.0, iteration=1)
    assert pickle.loads(pickle.dumps(loaded)).id == exp.id


def test_stop_logging_in_the_middle_of_start_logging_does_not_wait_for_itself(spool: Path) -> None:
    class Interrupts(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tracelet.stop_logging()  # as a signal handler would

    handler = Interrupts()
    logger = logging.getLogger("tracelet")
    tracelet.start_logging("first", backend="file")
    logger.addHandler(handler)
    try:
        thread = threading.Thread(target=tracelet.start_logging, args=("second", None, "file"), daemon=True)
        thread.start()  # it warns of the first run
        thread.join(30)
        assert not thread.is_alive()
    finally:
        logger.removeHandler(handler)
        tracelet.stop_logging()


@pytest.mark.parametrize("tags", ["text", ["a"], {"a": None}])
def test_tags_that_are_no_dict_of_values_are_refused_by_name(spool: Path, tags: object) -> None:
    with pytest.raises(tracelet.InvalidValue, match="tag"):
        Experiment("tags", tags=tags)  # type: ignore[arg-type]


def test_config_of_another_kind_is_refused_and_tags_of_none_are_not_given(spool: Path) -> None:
    with pytest.raises(tracelet.ConfigError, match="ExperimentConfig, not dict"):
        Experiment("wrong", config={"name": "x"})  # type: ignore[arg-type]
    assert Experiment("none", ExperimentConfig(tags=None)).tags == {}  # type: ignore[arg-type]


def test_two_experiments_at_once_keep_their_points_apart(spool: Path) -> None:
    a, b = Experiment("a", backend="file"), Experiment("b", backend="file")
    for i in range(10):
        a.log_metric("loss", i, iteration=i)
        b.log_metric("loss", -i, iteration=i)
    a.stop()
    b.log_metric("loss", -10, iteration=10)
    b.stop()
    assert read(folder_of(spool, a.id)).values("loss") == [(i, float(i)) for i in range(10)]
    assert read(folder_of(spool, b.id)).values("loss") == [(i, float(-i)) for i in range(11)]


def _log_in_child(exp: Experiment, number: int) -> None:
    exp.log_metric("child", number, iteration=number)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_log_into_the_same_attempt(spool: Path, method: str) -> None:
    context = multiprocessing.get_context(method)
    with Experiment("workers", backend="file") as exp:
        exp.log_metric("parent", 1.0, iteration=0)
        workers = [context.Process(target=_log_in_child, args=(exp, n)) for n in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
            assert worker.exitcode == 0
        exp.log_metric("parent", 2.0, iteration=1)
    found = read(folder_of(spool))
    assert sorted(found.values("child")) == [(0, 0.0), (1, 1.0)]
    assert found.values("parent") == [(0, 1.0), (1, 2.0)]
    assert sorted(found.roles()) == ["child", "child", "first"]
    assert len({record.attempt_key for record in found.of(WriterOpened)}) == 1
    assert [record.status for record in found.of(WriterEnded) if record.status] == ["FINISHED"]


def test_kept_log_function_stays_right_over_start_roll_fork_and_stop(spool: Path) -> None:
    exp = Experiment("kept", backend="file")
    early = exp.log_metric  # before the start: the method
    early("early", 1.0, iteration=0)
    log = exp.log_metric  # after it: the closure itself
    for i in range(70_000):  # two segments are passed
        log("loss", i, iteration=i)
    child = multiprocessing.get_context("fork").Process(target=log, args=("child", 1.0, 1))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    log("loss", 70_000, iteration=70_000)
    early("early", 2.0, iteration=1)
    exp.stop()
    for function in (log, early):
        with pytest.raises(tracelet.RunClosed):
            function("late", 1.0, iteration=0)
    found = read(folder_of(spool))
    assert found.values("loss") == [(i, float(i)) for i in range(70_001)]
    assert found.values("early") == [(0, 1.0), (1, 2.0)]
    assert found.values("child") == [(1, 1.0)]


def test_pickled_experiment_carries_no_secret(spool: Path) -> None:
    backend = tracelet.OTLP(endpoint="http://127.0.0.1:1", headers={"authorization": "Bearer hunter2"})
    with Experiment("secret", backend=backend) as exp:
        assert b"hunter2" not in pickle.dumps(exp)
    for path in spool.rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes()


def test_stats_count_what_was_logged(spool: Path) -> None:
    with Experiment("stats", backend="file") as exp:
        for i in range(10):
            exp.log_metric("loss", i, iteration=i)
        exp.log_params({"a": 1})
        stats = exp.stats
    assert (stats.logged, stats.shipped, stats.waiting, stats.refused) == (10, 0, 10, 0)


def test_what_had_no_room_is_in_the_stats_and_a_run_begins_in_its_records_once_there_is_room(spool: Path) -> None:
    folder = store.make_folder(store.run_folder(spool, "full"))
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(4_000_000))
    with Experiment("full", backend="file", run_id="full", max_bytes="4MB", tags={"team": "ml"}) as exp:
        exp.log_params({"lost": 1})
        exp.set_tags({"lost": "too"})
        assert exp.stats.refused == 2
        ballast.unlink()

        def has_room() -> bool:  # its size is looked at once a second
            before = exp.stats.refused
            exp.log_params({"kept": 1})
            return exp.stats.refused == before

        until(has_room)
        refused = exp.stats.refused
    assert exp.stats.refused == refused
    found = read(folder)
    assert [record.run_name for record in found.of(RunStarted)] == ["full"]
    assert {"team": "ml"} in [record.tags for record in found.of(TagsSet)]
    assert [record.params for record in found.of(ParamsLogged)] == [{"kept": 1}]


def test_a_run_that_never_had_room_to_begin_counts_that_too(spool: Path) -> None:
    folder = store.make_folder(store.run_folder(spool, "full"))
    (folder / "ballast").write_bytes(bytes(4_000_000))
    exp = Experiment("full", backend="file", run_id="full", max_bytes="4MB", tags={"team": "ml"}).start()
    exp.stop()
    assert exp.stats.refused == 2


def test_run_started_holds_mlflows_own_tags(spool: Path) -> None:
    with Experiment("tags", backend="file"):
        pass
    (started,) = read(folder_of(spool)).of(RunStarted)
    assert {"mlflow.user", "mlflow.source.name", "mlflow.source.type"} <= started.mlflow_tags.keys()


def test_unknown_status_is_refused(spool: Path) -> None:
    exp = Experiment("status", backend="file").start()
    with pytest.raises(tracelet.InvalidValue, match="DONE"):
        exp.stop("DONE")
    exp.stop("FAILED")
    assert read(folder_of(spool)).of(WriterEnded)[0].status == "FAILED"


def test_log_messages_of_a_run_come_from_the_tracelet_logger(
    spool: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO), Experiment("quiet", backend="file"):
        pass
    assert {record.name.split(".")[0] for record in caplog.records} == {"tracelet"}
    assert capsys.readouterr() == ("", "")


def dirty_kb_of_points(folder: Path) -> int:
    """How much of this process's mapped segments the disk has not seen, as the kernel has it."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            ours = line.endswith(".points") and str(folder) in line
        elif ours and line.startswith(("Shared_Dirty:", "Private_Dirty:")):
            total += int(line.split()[1])
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells which pages are dirty")
def test_flush_brings_what_was_logged_to_the_disk_itself(spool: Path) -> None:
    with Experiment("power", backend="file") as exp:
        exp.log_metric("loss", 1.0, iteration=0)
        before = dirty_kb_of_points(spool)
        exp.flush(timeout=0)
        after = dirty_kb_of_points(spool)
    assert before > 0
    assert after == 0


@pytest.mark.parametrize("iteration", [3.0, "3", np.float64(3), 2**63, -(2**63) - 1, [3]])
def test_iteration_that_is_no_integer_of_64_bits_is_refused_and_leaves_no_open_slot(
    spool: Path, iteration: object
) -> None:
    with Experiment("iteration", backend="file") as exp:
        exp.log_metric("loss", 0.0, iteration=0)
        with pytest.raises(tracelet.InvalidValue, match="iteration"):
            exp.log_metric("loss", 1.0, iteration=iteration)  # type: ignore[arg-type]
        with pytest.raises(tracelet.InvalidValue, match="iteration"):
            exp.log_metric("new", 1.0, iteration=iteration)  # type: ignore[arg-type]
    found = read(folder_of(spool))
    assert found.values("loss") == [(0, 0.0)]
    assert found.values("new") == []
    assert found.open_slots == 0


def test_what_the_index_of_an_iteration_raises_passes_through_unchanged(spool: Path) -> None:
    class Tensor:
        def __index__(self) -> int:
            raise RuntimeError("CUDA error")

    with Experiment("index", backend="file") as exp:
        exp.log_metric("loss", 0.0, iteration=np.int64(7))  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="CUDA error"):
            exp.log_metric("loss", 1.0, iteration=Tensor())  # type: ignore[arg-type]
        exp.log_metric("loss", 2.0, iteration=True)
    found = read(folder_of(spool))
    assert found.values("loss") == [(7, 0.0), (1, 2.0)]
    assert found.open_slots == 0


def test_an_artifact_that_a_flush_could_not_bring_to_the_disk_is_told_by_every_flush_from_then_on(
    spool: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model.bin"
    model.write_bytes(b"weights")
    with Experiment("power", backend="file", shipper="off") as exp:
        exp.log_artifact(model)
        (copy,) = [path for path in (folder_of(spool) / "artifacts").rglob("*") if path.is_file()]
        whole = copy.rename(copy.with_suffix(".whole"))
        copy.symlink_to("/dev/zero")  # a flush of it fails, as on a disk that does
        with pytest.raises(tracelet.SpoolError, match="Invalid argument"):
            exp.flush(timeout=0)
        whole.replace(copy)  # as what the disk has refused once looks well at the next try
        with pytest.raises(tracelet.SpoolError, match="Invalid argument"):
            exp.flush(timeout=0)
