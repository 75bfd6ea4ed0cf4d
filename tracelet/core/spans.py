"""Phases of a run: spans in tracelet's own context, and in OpenTelemetry's when asked."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from tracelet import ids
from tracelet.core import process, values
from tracelet.errors import RunClosed
from tracelet.records import Scalar, SpanEnded, SpanStarted

if TYPE_CHECKING:
    from tracelet.core.run import Run

__all__ = ["span"]

# (run id, span id): two runs may be open at once in one context, and neither nests in the other.
_current: ContextVar[tuple[tuple[str, str], ...]] = ContextVar("tracelet_spans", default=())


@contextmanager
def span(run: Run, name: str, attributes: Mapping[str, Scalar], *, attach: bool) -> Iterator[None]:
    """Write the phase's start, run the block, write its end; an exception is recorded and goes on."""
    ticket = run.ticket
    open_spans = _current.get()
    mine = [span_id for run_id, span_id in open_spans if run_id == ticket.run_id]
    parent = mine[-1] if mine else ids.rank_span_id(ticket.run_id, ticket.attempt_key, ticket.rank)
    span_id = ids.new_span_id()
    run.put(SpanStarted(span_id, parent, values.check_name(name), time.time_ns(), values.flatten_params(attributes)))
    token = _current.set((*open_spans, (ticket.run_id, span_id)))
    error = None
    try:
        with ExitStack() as stack:
            if attach:
                trace_id = ids.trace_id(ticket.run_id, ticket.attempt_key)
                stack.enter_context(_attached(name, trace_id, span_id))
            yield
    except BaseException as raised:  # recorded and raised again, whatever it is
        error = run.sieved(process.describe(raised))
        raise
    finally:
        try:
            _current.reset(token)
        except ValueError:  # a generator that another context finishes: in this one the phase was never open
            pass
        if not run.closed:
            with suppress(RunClosed):  # stopped by another thread in this very moment
                run.put(SpanEnded(span_id, time.time_ns(), error))


def _attached(name: str, trace_id: str, span_id: str) -> Any:
    """OpenTelemetry's context with this span as the current one.

    Its sampled flag is the surrounding span's, else what the application's own sampler says of this trace, else 1:
    a fixed flag would force or kill the application's sampling (a parent-based sampler follows it blindly).
    """
    from opentelemetry import trace  # 56 ms, paid by those who attach

    around = trace.get_current_span().get_span_context()
    if around.is_valid:
        flags = around.trace_flags
    else:
        sampler = getattr(trace.get_tracer_provider(), "sampler", None)
        sampled = sampler is None or sampler.should_sample(None, int(trace_id, 16), name).decision.is_sampled()
        flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if sampled else trace.TraceFlags.DEFAULT)
    context = trace.SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=False, trace_flags=flags)
    # The phase's exception is already recorded by us; a non-recording span would take none anyway.
    return trace.use_span(
        trace.NonRecordingSpan(context), end_on_exit=False, record_exception=False, set_status_on_exception=False
    )
