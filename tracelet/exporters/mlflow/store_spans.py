"""OTLP spans as the entities that mlflow's own store takes, the way MLflow's server makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tracelet.exporters.mlflow.native import quiet_mlflow
from tracelet.exporters.mlflow.transport import Refused

__all__ = ["entities"]


def entities(resource_spans: Sequence[bytes]) -> tuple[list[Any], list[str]]:
    """mlflow's spans, and the ids of the traces whose root is among them.

    Raises:
        Refused: one of them can't be read or made into mlflow's; nothing is said about the others.
    """
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans

    with quiet_mlflow():
        from mlflow.entities import Span

    made: Any = Span
    spans: list[Any] = []
    for one in resource_spans:
        try:
            whole = ResourceSpans.FromString(one)
        except DecodeError as error:
            raise Refused("INVALID_PARAMETER_VALUE", f"these spans can't be read: {error}") from error
        for scope in whole.scope_spans:
            for span in scope.spans:
                try:
                    spans.append(made.from_otel_proto(span, resource=whole.resource))
                except Exception as error:
                    # mlflow decodes ids and attributes without a type of error of its own.
                    raise Refused("INVALID_PARAMETER_VALUE", f"mlflow can't take the span: {error}") from error
    return spans, sorted({span.trace_id for span in spans if span.parent_id is None})
