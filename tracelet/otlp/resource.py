"""A run's Resource for programs that build their own OpenTelemetry pipeline."""

from __future__ import annotations

from tracelet import ids
from tracelet.otlp import semconv
from tracelet.records import Scalar

__all__ = ["resource_attributes"]


def resource_attributes(
    project: str,
    experiment_name: str | None = None,
    *,
    run_name: str | None = None,
    run_id: str | None = None,
    attempt_key: str | None = None,
    rank: int = 0,
) -> dict[str, Scalar]:
    """The attributes by which a Resource is that of a run (docs/reference/wire.md), for the SDK's `Resource.create`.

    Each call without `run_id` begins a new run, each without `attempt_key` a new attempt: call it once, and give the
    same Resource to all providers of the program. The processes of one run share both, and differ by `rank`.

    Raises:
        ConfigError: a `run_id` that can't name a run.

    Examples:
        >>> from tracelet.otlp import resource_attributes
        >>> resource_attributes("vision", "resnet", run_id="r1", attempt_key="a1")["service.instance.id"]
        'ef2bf926-e889-5e63-8f20-a582f850655d'
    """
    run = ids.new_run_id() if run_id is None else ids.valid_run_id(run_id)
    attempt = attempt_key or ids.new_attempt_key()
    experiment = experiment_name or project
    return {
        "service.name": project,
        semconv.SERVICE_INSTANCE_ID: ids.instance_id(run, attempt, rank),
        semconv.PROJECT: project,
        semconv.EXPERIMENT_NAME: experiment,
        semconv.RUN_ID: run,
        semconv.RUN_NAME: run_name or experiment,
        semconv.RUN_ATTEMPT: attempt,
        semconv.RANK: rank,
        semconv.RESOURCE_WIRE_VERSION: semconv.WIRE_VERSION,
    }
