"""The active experiment of a program: `start_logging`, `stop_logging`, `get_active_experiment`."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path

from tracelet.core import process, waiting
from tracelet.core.experiment import Experiment, ExperimentConfig
from tracelet.guard import logger

__all__ = ["get_active_experiment", "start_logging", "stop_logging"]

_active: Experiment | None = None
_told_what_waits = False  # a sweep's hundredth start need not look again
# Re-entrant: a signal handler that calls stop_logging() may interrupt a start_logging() of its own thread.
_lock = threading.RLock()


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()  # a thread of the parent may have held it


process.renew_after_fork(_after_fork_in_child)


def start_logging(
    exp_name: str | None = None,
    project: str | None = None,
    backend: object = None,
    *,
    config: ExperimentConfig | None = None,
    run_id: str | None = None,
    tags: Mapping[str, object] | None = None,
    tracking_uri: str | None = None,
    dir: str | os.PathLike[str] | None = None,
    shipper: str | None = None,
    keep: str | None = None,
    max_bytes: int | str | None = None,
    ranks: str | None = None,
    grace: float | str | None = None,
) -> Experiment:
    """Start a run and make it the program's active one; a run that is still active is ended first, with a warning.

    Arguments win over `config`, `config` over the environment; each is explained at `ExperimentConfig`.

    Returns:
        the started `Experiment`.

    Raises:
        ConfigError: a setting that can't be right; the active run, if any, goes on.
        SpoolError: the spool folder can't be used.

    Examples:
        >>> import tracelet
        >>> exp = tracelet.start_logging(exp_name="metrics_demo", project="examples", backend="file")
        >>> exp.log_metric("loss", 0.1, iteration=100)
        >>> tracelet.stop_logging()
    """
    global _active
    experiment = Experiment(
        exp_name,
        config,
        backend,
        project=project,
        run_id=run_id,
        tags=tags,
        tracking_uri=tracking_uri,
        dir=dir,
        shipper=shipper,
        keep=keep,
        max_bytes=max_bytes,
        ranks=ranks,
        grace=grace,
    )
    with _lock:
        before = _active
        if before is not None and before.running:
            experiment.check()
            logger.warning(
                "start_logging() was called while run %s was active; that run is ended now."
                " Call stop_logging() first, or use Experiment for two runs at once",
                before.id,
            )
            before.stop()
        _active = experiment.start()
    _tell_what_waits(experiment)
    return experiment


def _tell_what_waits(started: Experiment) -> None:
    """Say once in a program which earlier runs wait, where this one is delivered: after a week offline, for example."""
    global _told_what_waits
    ticket = started._ticket
    if _told_what_waits or ticket is None or ticket.shipper == "off" or ticket.rank != 0:
        return
    _told_what_waits = True
    waiting.tell(Path(ticket.folder).parent.parent, ticket.run_id)


def stop_logging() -> None:
    """End the active run, if there is one; see `Experiment.stop`. May be called again without harm."""
    global _active
    with _lock:
        experiment, _active = _active, None
    if experiment is not None:
        experiment.stop()


def get_active_experiment() -> Experiment | None:
    """The experiment that `start_logging` made active, None if there is none or it has been stopped."""
    experiment = _active
    return experiment if experiment is not None and experiment.running else None
