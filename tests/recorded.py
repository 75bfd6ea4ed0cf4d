"""What real runs send, recorded by a real OTLP receiver, to be handed to a gateway in any order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tracelet
from tests.sinks import HttpSink, Received
from tracelet.otlp import decode
from tracelet.otlp.arrival import Decoded

LONG = "long " * 20_000
DECODERS: dict[str, Any] = {
    "metrics": decode.decode_metrics,
    "logs": decode.decode_logs,
    "traces": decode.decode_traces,
}


def record(
    folder: Path, run_id: str, *, points: int = 300, first: int = 0, name: str = "", fails: bool = False
) -> list[Received]:
    """Train for a moment and give the requests that its own shipper sent, all of them acknowledged."""
    with HttpSink() as sink:
        exp = tracelet.start_logging(
            exp_name=name or f"name of {run_id}",
            project="gateway",
            run_id=run_id,
            backend=[tracelet.OTLP(sink.endpoint)],
            dir=folder,
        )
        exp.log_params({"lr": 0.1, "long": LONG})
        exp.set_tags({"mood": "early"})
        with exp.span("warm-up"):
            for i in range(first, first + points):
                exp.log_metric("loss", 1.0 / (i + 1), iteration=i)
        exp.set_tags({"mood": "late"})
        exp.stop(status="FAILED" if fails else "FINISHED", timeout=30)
        return list(sink.stored)


def decoded(received: Received) -> Decoded:
    """What the gateway makes of a request."""
    made: Decoded = DECODERS[received.signal](received.message)
    return made
