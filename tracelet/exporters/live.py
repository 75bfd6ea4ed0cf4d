"""The exporter for live objects: hands what a run logs to an OpenTelemetry SDK exporter of the training program.

The object stays the program's own: it is never shut down here, and what it does with a fork is its own business. It is
called by one thread of the process that made it, and by nobody else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from tracelet.errors import ConfigError
from tracelet.exporters.base import Answer, Delivered, RetryLater
from tracelet.otlp.encode import EventsLoad, Load, MetricsLoad, PointsLoad, SpansLoad, fitting
from tracelet.otlp.plan import Ledger, heartbeat_load, plan
from tracelet.otlp.sdk_objects import log_records, metrics_data, readable_spans
from tracelet.records import Batch, Heartbeat, RunInfo

__all__ = ["LiveExporter"]


class LiveExporter:
    """Calls `export` of the object in `secrets["exporter"]`, for the signals in `spec["signals"]`.

    Its SUCCESS is Delivered, its FAILURE or an exception of its own RetryLater: the same again, until it takes it.

    Raises:
        ConfigError: there is no object; it lived in another process.
    """

    max_points = 4_000  # a call of the object holds the interpreter's lock for about 20 ms then
    linger_s = 1.0
    rising_limit_s: float | None = 60.0  # as over OTLP: what it hands on may end in Prometheus

    def __init__(self, spec: Mapping[str, Any], secrets: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        self._name = str(spec.get("exporter", "?")).rpartition(".")[2]
        self._exporter: Any = secrets.get("exporter")
        if self._exporter is None:
            raise ConfigError(
                f"{self._name} was an exporter object of the training program, and can't be had anywhere else: start"
                " the run again with it by run_id=, or deliver to another destination"
            )
        self._signals = frozenset(spec.get("signals", ()))
        self._ledger = Ledger()

    def open(self, run: RunInfo, memory: Mapping[str, Any]) -> Answer:
        """The object is there already; `memory` is what later batches need of earlier ones."""
        self._ledger = Ledger.from_json(memory)
        return Delivered()

    def memory(self) -> Mapping[str, Any]:
        """What later batches need of those that are through: see `tracelet.otlp.plan.Ledger`."""
        return self._ledger.to_json()

    def begin(self, batch: Batch, note: Mapping[str, Any] | None = None) -> _LiveDelivery:
        """Prepare a batch; with `note`, the same content that was prepared before."""
        planned = plan(batch, self._ledger, note)
        mine = [load for load in planned.loads if load.signal in self._signals]
        sized = [part for load in mine for part, _ in fitting(load)]

        def done() -> None:
            self._ledger = self._ledger.after(planned)

        return _LiveDelivery(sized, planned.note, self._export, done)

    def beat(self, batch: Batch, heartbeat: Heartbeat) -> None:
        """The run's state, once."""
        if "metrics" in self._signals and self._export(heartbeat_load(batch, heartbeat, self._ledger)) is None:
            self._ledger.beaten(heartbeat)

    def close(self) -> None:
        """Nothing: whoever made the object shuts it down."""

    def _export(self, load: Load) -> str | None:
        """None once the object has taken it, else why not."""
        try:
            objects = _objects(load)
            if not objects:
                return None
            result = self._exporter.export(objects)
        except Exception as error:  # noqa: BLE001
            # Somebody else's code. What it raises is its way to say no, as in the SDK's own processors.
            return f"{self._name}.export raised {type(error).__name__}: {error}"
        # Three enumerations, one a signal, with the same two names.
        outcome = getattr(result, "name", result)
        return None if outcome == "SUCCESS" else f"{self._name}.export answered {outcome}"


def _objects(load: Load) -> Any:
    if isinstance(load, (PointsLoad, MetricsLoad)):
        return metrics_data(load)
    if isinstance(load, EventsLoad):
        return log_records(load)
    assert isinstance(load, SpansLoad)
    return readable_spans(load)


class _LiveDelivery:
    """The loads of one batch on their way into the object; what it took is not handed over twice."""

    def __init__(
        self,
        loads: list[Load],
        note: Mapping[str, Any],
        export: Callable[[Load], str | None],
        done: Callable[[], None],
    ) -> None:
        self._loads = deque(loads)
        self._note = note
        self._export = export
        self._done = done

    @property
    def note(self) -> Mapping[str, Any]:
        """What a repeat after a restart needs to have the same content."""
        return self._note

    def attempt(self) -> Answer:
        """Hand over what has not been taken yet."""
        while self._loads:
            why = self._export(self._loads[0])
            if why is not None:
                return RetryLater(why)
            self._loads.popleft()
        self._done()
        return Delivered()
