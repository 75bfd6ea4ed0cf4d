"""What the shipper knows of a run in MLflow: read when the destination is opened, then kept up by what is sent."""

from __future__ import annotations

from collections.abc import Sequence

from tracelet.exporters.mlflow.mapping import attempt_order, highest
from tracelet.exporters.mlflow.transport import Latest, MetricRow, RunView
from tracelet.records import Batch, Part, RunInfo, RunStarted

__all__ = ["RunState", "first_sign", "starts_in"]


class RunState:
    """One run in one MLflow. `view` is None until the run is made."""

    def __init__(self, info: RunInfo, experiment_id: str, view: RunView | None) -> None:
        self.info = info
        self.experiment_id = experiment_id
        self.view: RunView | None = None
        self.latest: dict[str, Latest] = {}
        self.params: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.create_is_unclear = False
        self.noted_unix_nano = 0  # when the state that MLflow shows was noted
        self.takes_no_spans = False  # said once, by one refusal
        if view is not None:
            self.learn(view)

    def learn(self, view: RunView) -> None:
        """Take over what MLflow says."""
        self.view = view
        self.latest = dict(view.latest)
        self.params = dict(view.params)
        self.tags = dict(view.tags)

    def stored(self, rows: Sequence[MetricRow]) -> None:
        """These rows are in MLflow now."""
        for key, (order, _) in highest(rows).items():
            if key not in self.latest or order > self.latest[key]:
                self.latest[key] = order


def starts_in(batch: Batch) -> list[tuple[Part, RunStarted]]:
    """The attempts that begin in this batch, the earliest first."""
    found = [(part, record) for part in batch.parts for record in part.records if isinstance(record, RunStarted)]
    return sorted(found, key=lambda start: attempt_order(start[0].opened))


def first_sign(batch: Batch) -> int:
    """The earliest start that the batch tells of, in nanoseconds."""
    times = [part.opened.attempt_started_unix_nano for part in batch.parts]
    times += [record.time_unix_nano for _, record in starts_in(batch)]
    return min((time for time in times if time > 0), default=times[0])
