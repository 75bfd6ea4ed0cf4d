"""The experiment: what training code calls, from `start()` to `stop()`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from time import time_ns
from types import TracebackType
from typing import Any

from tracelet import choice, destinations, settings
from tracelet.core import process, spans, values
from tracelet.core.delivery import Stats
from tracelet.core.process import Ending
from tracelet.core.run import Run, closed_error
from tracelet.core.ticket import Ticket
from tracelet.errors import ConfigError, InvalidValue, SpoolError, TraceletError
from tracelet.guard import guard, logger
from tracelet.records import FAILED, FINISHED, KILLED, ParamsLogged, Scalar, TagsSet

__all__ = ["Experiment", "ExperimentConfig", "Stats"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """How a run is named and where it goes; `None` means not given, and the environment or the default decides.

    Arguments given to `Experiment` or `start_logging` win over these, these over the environment.

    Args:
        name: the run's name. Default: the script's or notebook's.
        project: groups runs; MLflow's experiment, OpenTelemetry's `service.name`. Default: `MLFLOW_EXPERIMENT_NAME`,
            else the git checkout's or the folder's name.
        backend_name: `"mlflow"`, `"otlp"`, `"console"`, `"file"`, several with commas or as a list, or
            specifications such as `tracelet.MLflow(tracking_uri=...)`.
        tags: words about the run, searchable in the backends.
        tracking_uri: of MLflow; relative database addresses are made absolute at the start.
        run_id: resumes this run, or names a new one.
        dir: the spool's root folder.
        shipper: `"process"`; `"thread"` of this program, where no process may be started; or `"off"`, and ship later
            with `tracelet ship`.
        ranks: of a launch of several processes, which of them log: `"zero"` (only rank 0 does), `"all"`, or
            `"separate"`, where each is a run of its own.
        keep, max_bytes, grace: see the settings page.

    Examples:
        >>> from tracelet.core.experiment import ExperimentConfig
        >>> config = ExperimentConfig(name="baseline", project="vision", tags={"team": "ml"})
        >>> config.name
        'baseline'
    """

    name: str | None = None
    project: str | None = None
    backend_name: object = None
    tags: Mapping[str, object] = dataclasses.field(default_factory=dict)
    tracking_uri: str | None = None
    run_id: str | None = None
    dir: str | os.PathLike[str] | None = None
    shipper: str | None = None
    keep: str | None = None
    max_bytes: int | str | None = None
    ranks: str | None = None
    grace: float | str | None = None

    def as_settings(self) -> dict[str, object]:
        """The fields under the names the settings have."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "tags"}
        return {_SETTING.get(name, name): value for name, value in fields.items()}


_SETTING = {"name": "experiment_name", "backend_name": "backend"}


class Experiment:
    """One run of an experiment: log metrics, params, tags, artifacts and phases; they are on disk when a call returns.

    It starts at its first log call, at `start()`, or as a `with` block; `stop()`, the end of the block or of the
    program ends it. All methods may be called from any thread, from forked children, and from spawned workers that
    were handed the experiment (it pickles).

    Guarantees:
        * What was logged survives the death of this process from the moment the call returns (not the loss of power).
        * No call waits for a network. `log_metric` makes no system call but at a segment's end, every 32,768 points.
        * Wrong use raises a `TraceletError` at once; a full disk or a lost destination never does.

    Args:
        name: the run's name.
        config: an `ExperimentConfig`; what is given as an argument wins over it.
        backend: where the run goes; see `ExperimentConfig.backend_name`.
        project, run_id, tags, tracking_uri, dir, shipper, keep, max_bytes, ranks, grace: as in `ExperimentConfig`.

    Raises:
        ConfigError: at `start()` or the first log call, for a setting that can't be right.

    Examples:
        >>> from tracelet.core.experiment import Experiment
        >>> with Experiment("doc-example", project="docs", backend="file") as exp:
        ...     exp.log_params({"lr": 0.1, "model": {"layers": 2}})
        ...     for epoch in range(3):
        ...         exp.set_iteration(epoch)
        ...         exp.log_metric("loss", 1 / (epoch + 1))
        >>> exp.stats.logged
        3
    """

    def __init__(
        self,
        name: str | None = None,
        config: ExperimentConfig | None = None,
        backend: object = None,
        *,
        project: str | None = None,
        run_id: str | None = None,
        tags: Mapping[str, object] | None = None,
        tracking_uri: str | None = None,
        dir: str | os.PathLike[str] | None = None,
        shipper: str | None = None,
        keep: str | None = None,
        max_bytes: int | str | None = None,
        ranks: str | None = None,
        grace: float | str | None = None,
    ) -> None:
        if config is not None and not isinstance(config, ExperimentConfig):
            raise ConfigError(f"config has to be an ExperimentConfig, not {type(config).__name__}", setting="config")
        self.config = ExperimentConfig() if config is None else config
        self._arguments: dict[str, object] = {
            "experiment_name": name,
            "backend": backend,
            "project": project,
            "run_id": run_id,
            "tracking_uri": tracking_uri,
            "dir": dir,
            "shipper": shipper,
            "keep": keep,
            "max_bytes": max_bytes,
            "ranks": ranks,
            "grace": grace,
        }
        self._tags = values.check_tags(self.config.tags or {}) | values.check_tags(tags or {})
        self._run: Run | None = None
        self._ticket: Ticket | None = None  # of an experiment that came here pickled
        self._was_closed = False  # before it was pickled
        self._first_iteration: int | None = None  # set before the start
        self._beginning = 0  # the process that is in the middle of `start`; a child is not
        self._early: list[Callable[[], object]] = []

    # ---- life ---------------------------------------------------------------------------------------------------

    def start(self) -> Experiment:
        """Begin the run, if it has not begun: settings are read, the folder is made, the shipper started.

        Returns:
            the experiment itself. Called again on a running experiment it does nothing.

        Raises:
            ConfigError: a setting that can't be right.
            RunClosed: the run was stopped; the message names `run_id=`, which resumes it.
            SpoolError: the spool folder can't be used.

        Cost: about 10 ms, most of it the start of the shipper process.
        """
        with process.starting():
            if self._beginning == os.getpid():  # a signal's handler, in the middle of this thread's own call
                return self
            if self._run is None:
                if self._beginning:  # forked while another thread was at it: what handlers asked for is the parent's
                    self._early.clear()
                self._beginning = os.getpid()
                try:
                    self._begin()
                finally:
                    self._beginning = 0
                self._make_up()
            elif self._run.closed:
                raise self._run.closed_error()
        return self

    def _make_up(self) -> None:
        """Do what signals' handlers asked for while the run was being started."""
        while self._early:
            call = self._early.pop(0)
            try:
                with guard("make up for a handler's call"):
                    call()
            except TraceletError as error:
                guard.limited("make up a handler's call", "a call of a signal's handler comes to nothing: %s", error)

    def _comes_later(self, call: Callable[[], object]) -> bool:
        """Whether `call` was put off, since a signal's handler makes it in the middle of its own thread's `start`.

        There is no run yet that it could go to, and to begin another one would be two runs, or a wait for oneself.
        """
        if self._run is not None:
            return False
        with process.starting():  # whoever gets in is this thread, or comes before or after a start
            if self._beginning != os.getpid():
                return False
            self._early.append(call)
            return True

    def _begin(self) -> None:
        if self._ticket is not None:
            if self._was_closed:
                raise closed_error(self._ticket.run_id)
            self._adopt(Run.join(self._ticket))
            return
        resolved, chosen = self.check()
        run = Run.begin(resolved, destinations=chosen.destinations, secrets=chosen.secrets, tags=self._tags)
        self._adopt(run)
        logger.info("run %s (%s): %s", run.ticket.run_id, resolved.experiment_name, chosen.why)

    def check(self) -> tuple[settings.Settings, choice.Chosen]:
        """Read the settings and choose the destinations, without starting anything.

        Raises:
            ConfigError: a setting that can't be right.
        """
        resolved = settings.from_process(self._arguments, self.config.as_settings())
        chosen = choice.choose(
            resolved.backend,
            tracking_uri=resolved.tracking_uri,
            environ=resolved.environ,
            cwd=resolved.cwd,
            settings=resolved,
        )
        return resolved, chosen

    def _adopt(self, run: Run) -> None:
        self._run = run
        self._ticket = run.ticket
        if self._first_iteration is not None:
            run.writer.set_iteration(self._first_iteration)
        if type(self).log_metric is Experiment.log_metric:  # a subclass's own stays
            self.log_metric = run.log  # type: ignore[method-assign]

    def stop(self, status: str | None = None, *, timeout: float | None = None) -> None:
        """End the run as FINISHED, or as `status` ("FAILED", "KILLED"), and let it be delivered.

        Where the shipper outlives the program this waits at most 2 s; where it can't (a container, SLURM), while data
        moves, giving up after 30 s without progress. What is left is then named on `logging`, and stays in the
        spool. `timeout` (s) overrides either. Called again, or before the start, it does nothing.
        """
        run = self._run
        if run is None:
            return
        run.end(Ending(_checked_status(status), "stop"), timeout_s=timeout)

    def __enter__(self) -> Experiment:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._run is not None:
            self._run.end(Ending(FINISHED, "with") if error is None else process.ending_of(error, "with"))

    # ---- logging ------------------------------------------------------------------------------------------------

    def log_metric(self, name: str, value: Any, iteration: int | None = None) -> None:
        """Log one value of a metric, at `iteration`, or at the current one.

        Args:
            name: any text that is not empty and does not begin with `tracelet.`; backends that can't take it get a
                legal form, and the original beside it.
            value: an int, float, bool, Decimal, numpy scalar, or 0-d array or tensor (moved to the host once). NaN
                and infinities are kept.
            iteration: an integer of 64 bits, negative ones too. Default: that of `set_iteration`, else 0.

        Raises:
            InvalidValue: a string, None, a longer array, an iteration beyond 64 bits. Nothing is written.
            RunClosed: after `stop()`.
            BaseException: whatever the conversion of a tensor raises, unchanged.

        Cost: about 0.3 us; no lock, no system call but at a segment's end.
        Durability: survives the death of this process; power loss from the next flush on.

        Examples:
            >>> exp.log_metric("loss", 0.25, iteration=100)
        """
        if self._run is not None or not self._comes_later(lambda: self.log_metric(name, value, iteration)):
            self._started().log(name, value, iteration)

    def log_metrics(self, metrics: Mapping[str, Any], iteration: int | None = None) -> None:
        """Log several metrics at one time and iteration; if one value can't be logged, none is.

        Raises:
            InvalidValue, RunClosed: as `log_metric`.

        Examples:
            >>> exp.log_metrics({"loss": 0.25, "accuracy": 0.9}, iteration=100)
        """
        if self._run is not None or not self._comes_later(lambda: self.log_metrics(metrics, iteration)):
            self._started().log_many(metrics, iteration)

    def set_iteration(self, iteration: int) -> None:
        """Make `iteration` the current one: that of every value logged without its own.

        Raises:
            InvalidValue: not an integer of 64 bits.

        Examples:
            >>> exp.set_iteration(3)
            >>> exp.iteration
            3
        """
        number = values.to_iteration(iteration)
        if self._run is None:
            self._first_iteration = number
        else:
            self._run.writer.set_iteration(number)
            self._run.look_after()

    @property
    def iteration(self) -> int:
        """The current iteration; 0 before any `set_iteration`."""
        return (self._first_iteration or 0) if self._run is None else self._run.writer.iteration

    def log_params(self, params: Any) -> None:
        """Log params: a mapping, nested ones flattened to dotted keys.

        Scalars are kept as they are, None as "None", anything else as JSON. A key logged again with another value:
        the root span holds the last, MLflow keeps the first and gets the change as a tag. Nothing is cut: what
        exceeds a backend's limit goes there whole in another form.

        Raises:
            InvalidValue: a key that is not text, or a mapping that contains itself. Nothing is written.
            RunClosed: after `stop()`.

        Examples:
            >>> exp.log_params({"learning_rate": 0.001, "model": {"num_layers": 4}})
        """
        if self._comes_later(lambda: self.log_params(params)):
            return
        run = self._started()
        flat = values.flatten_params(params)
        if flat:
            run.log_record(ParamsLogged(time_ns(), flat))

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Set tags of the run; the last value of a key stands.

        Raises:
            InvalidValue, RunClosed: as `log_params`.

        Examples:
            >>> exp.set_tags({"stage": "final"})
            >>> exp.tags["stage"]
            'final'
        """
        checked = values.check_tags(tags)
        if self._comes_later(lambda: self.set_tags(checked)):
            return
        self._started().log_record(TagsSet(time_ns(), checked))
        self._tags.update(checked)

    @property
    def tags(self) -> dict[str, str]:
        """The tags set in this process; a copy."""
        return dict(self._tags)

    def log_artifact(
        self,
        path: str | os.PathLike[str],
        artifact_path: str | None = None,
        *,
        copy: bool | None = None,
    ) -> None:
        """Log a file, or a folder with all that is in it, as it is now.

        Args:
            path: the file or folder.
            artifact_path: what it shall be called in the run: the *file's* path, not its folder's. Default: the
                file's own name.
            copy: True takes a copy at once, False a reference that is compared before and after the upload. Default:
                a copy (a reflink where the file system can), but a reference above 1 GB without reflinks.

        Raises:
            InvalidValue: nothing there, or an `artifact_path` that is absolute or leads outside the run.
            RunClosed: after `stop()`.

        Cost: a copy and a SHA-256 of the file, on the calling thread.

        Examples:
            >>> exp.log_artifact("model.bin", "models/epoch_10.bin")
        """
        if not self._comes_later(lambda: self.log_artifact(path, artifact_path, copy=copy)):
            self._started().take_artifact(path, artifact_path, copy)

    def span(
        self, name: str, attributes: Mapping[str, Scalar] | None = None, *, attach: bool = False
    ) -> AbstractContextManager[None]:
        """A phase of the run, as a child span: nested calls nest, an exception marks it and goes on.

        With `attach=True` it also becomes the current span of OpenTelemetry's own context, so that the application's
        spans land in the run's trace. For phases and epochs, not for millions of steps.

        Examples:
            >>> with exp.span("validate"):
            ...     exp.log_metric("val_loss", 0.3, iteration=1)
        """
        return spans.span(self._started(), name, attributes or {}, attach=attach)

    # ---- what became of it --------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """The run's id; starts the run if it has not begun."""
        return (self._ticket or self._started().ticket).run_id

    @property
    def running(self) -> bool:
        """Whether it has started and not been stopped."""
        return self._run is not None and not self._run.closed

    @property
    def stats(self) -> Stats:
        """How many points were logged, shipped, are waiting, were refused; see `Stats`. Reads small files."""
        run = self._run
        if run is None:
            return Stats(0, 0, 0, 0)
        stats = run.delivery.stats()
        return dataclasses.replace(stats, refused=stats.refused + run.refused_records, left_out=run.left_out)

    def flush(self, timeout: float | None = 30.0) -> bool:
        """Wait until all that was logged before is delivered everywhere; whether it was, within `timeout` seconds.

        False at once for a run without a destination. None waits without limit. In any case it is on the disk itself
        when this returns, with the files logged as artifacts, and survives the loss of power.

        Raises:
            SpoolError: the disk would not take all of it, now or at an earlier flush, and it was not delivered either.
        """
        return True if self._run is None else self._run.flush(timeout)

    def links(self, timeout: float = 0) -> dict[str, str]:
        """Each destination's address of the run, as far as known within `timeout` seconds: {"mlflow": "http://..."}."""
        return {} if self._run is None else self._run.delivery.links(timeout)

    def backend_run_id(self, backend: str = "mlflow", timeout: float = 30) -> str | None:
        """The run's id at a backend, None if it is not known within `timeout` seconds."""
        return self._started(closed=True).delivery.backend_run_id(backend, timeout)

    @contextmanager
    def mlflow(self, timeout: float = 120) -> Iterator[Any]:
        """Make the run MLflow's active run for a block, so that `mlflow.sklearn.log_model(...)` and the like go to it.

        Yields MLflow's own `ActiveRun`. The run's status stays ours; MLflow's own active run and tracking address
        are put back. Imports mlflow, which takes seconds the first time.

        Raises:
            ConfigError: the run doesn't go to MLflow, or MLflow does not know it within `timeout` seconds.
            IntegrationUnavailable: mlflow is not installed.
        """
        run = self._started()
        found = [d for d in run.ticket.destinations if d["kind"] == "mlflow"]
        if not found:
            raise ConfigError(f"exp.mlflow(): run {run.ticket.run_id} goes to no MLflow", run_id=run.ticket.run_id)
        active = import_module("tracelet.exporters.mlflow.active")
        active.need_mlflow()  # while the shipper, which imports it too, makes the run
        run_id = run.delivery.backend_run_id("mlflow", timeout)
        if run_id is None:
            raise ConfigError(
                f"exp.mlflow(): run {run.ticket.run_id} is not known to MLflow after {timeout} s;"
                f" `tracelet ship {run.folder}` says why",
                run_id=run.ticket.run_id,
            )
        uri = destinations.tracking_uri(found[0], run.ticket.secrets)
        with active.active_run(uri, run_id) as theirs:
            yield theirs

    # ---- the rest -----------------------------------------------------------------------------------------------

    def _started(self, *, closed: bool = False) -> Run:
        run = self._run
        if run is None:
            self.start()
            run = self._run
            if run is None:
                raise SpoolError("a signal's handler asks for the run while its own thread is just starting it")
        if run.closed and not closed:
            raise run.closed_error()
        return run

    def __getstate__(self) -> dict[str, Any]:
        """An experiment that is handed to another process begins, so that both write into the same attempt."""
        if self._ticket is None:
            self.start()
        assert self._ticket is not None
        return {
            "config": self.config,
            "ticket": self._ticket.without_secrets(),
            "tags": self._tags,
            "iteration": self.iteration,
            "closed": self._was_closed or (self._run is not None and self._run.closed),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.config = state["config"]
        self._arguments = {}
        self._tags = state["tags"]
        self._run = None
        self._ticket = state["ticket"]
        self._was_closed = state["closed"]  # refused when something is logged: a checkpoint that holds it has to load
        self._first_iteration = state["iteration"] or None
        self._beginning, self._early = 0, []

    def __repr__(self) -> str:
        if self._ticket is None:
            return f"<Experiment {self._arguments.get('experiment_name') or self.config.name or ''!r}, not started>"
        stopped = self._was_closed if self._run is None else self._run.closed
        return f"<Experiment run {self._ticket.run_id}, {'stopped' if stopped else 'running'}>"


def _checked_status(status: str | None) -> str:
    if status is None:
        return FINISHED
    if status not in (FINISHED, FAILED, KILLED):
        raise InvalidValue(f"stop(status={status!r}): a run ends as {FINISHED}, {FAILED} or {KILLED}", value=status)
    return status
