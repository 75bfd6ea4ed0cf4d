"""Who sends, what they are told, and what a gateway knows of itself: the values that cross the intake's face."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tracelet.errors import SpoolError

__all__ = ["Caller", "Forbidden", "Full", "IntakeInfo", "Taken"]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request: the name of the token, and the projects that it may write.

    `name` is empty where the gateway asks for no token. `ours`: the client names tracelet's wire version, so it knows
    what a refusal means.
    """

    name: str = ""
    projects: tuple[str, ...] | None = None  # None: all of them
    ours: bool = False


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of a request: all of it is in the spool, and on the disk itself."""

    items: int = 0  # data points, log records and spans that were ours
    points: int = 0  # of them: values of metrics, stored now
    repeats: int = 0  # arrivals that were stored before, and not again


class Full(SpoolError):
    """The spool has no room: nothing is acknowledged; send it again later."""


class Forbidden(SpoolError):
    """The caller may not write this run: it belongs to another token, or its project isn't one of the caller's."""

    def __init__(self, run_id: str, owner: str, reason: str) -> None:
        super().__init__(f"run {run_id}: {reason}", run_id=run_id, owner=owner)
        self.run_id = run_id
        self.owner = owner


@dataclass(frozen=True, slots=True)
class IntakeInfo:
    """Numbers of a gateway, since its start where they count."""

    runs: int = 0  # known: with a folder in the spool
    running: int = 0  # neither ended nor lost
    lost: int = 0
    open_runs: int = 0  # on their way to their destinations now
    waiting_runs: int = 0  # have something to deliver, and wait for their turn
    points: int = 0  # taken
    items: int = 0  # taken
    repeats: int = 0  # arrivals not stored again
    delivered: int = 0  # points, by all destinations
    refused: int = 0  # things that a destination will never take
    undelivered: int = 0  # slots of runs on their way that no destination has acknowledged
    bytes: int = 0  # of the spool, as last measured
    is_full: bool = False  # there is no room for the files of one more run
    trouble: Mapping[str, str] = field(default_factory=dict)  # run id -> why its destination doesn't get on
