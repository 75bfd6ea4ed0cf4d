"""Golden files: what each released wire version puts on the wire for one small run, as OTLP JSON.

A file of a released version is never changed: what it holds is what deployed gateways and dashboards read. The
encoder of today has to make the files of its own version; a reader of today has to read those of every minor version
of its major one. `python -m tests.golden.test_wire` writes the files of a version that has none yet.
"""

from __future__ import annotations

import json
import math
from array import array
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict

from tests.otlp_batches import MS, RUN, START, opened
from tests.otlp_decode import decode
from tests.sinks import REQUESTS
from tracelet import ids
from tracelet.otlp import semconv
from tracelet.otlp.encode import SIGNALS
from tracelet.otlp.encode_json import json_line
from tracelet.otlp.plan import Ledger, heartbeat_load, plan
from tracelet.records import (
    ArtifactLogged,
    AttemptEnded,
    Batch,
    ErrorInfo,
    Heartbeat,
    ParamsLogged,
    Part,
    PointBatch,
    Record,
    RunStarted,
    SpanEnded,
    SpanStarted,
    TagsSet,
)

FOLDER = Path(__file__).parent
END = START + 10**10
BASE64 = ("traceId", "spanId", "parentSpanId")


def batches() -> tuple[Batch, Heartbeat, Batch]:
    """A run with one of everything: two batches, and the heartbeat between them."""
    root = ids.root_span_id(RUN.run_id, resource_of_this_version().attempt_key)
    error = ErrorInfo("ValueError", "loss is NaN", 'Traceback (most recent call last):\n  File "train.py", line 7\n')
    records: tuple[Record, ...] = (
        RunStarted(
            START,
            RUN.run_name,
            {"process.pid": 4711, "process.owner": "ada", "vcs.ref.head.name": "main"},
            {"mlflow.user": "ada", "mlflow.source.name": "train.py"},
            "00-" + "c" * 32 + "-" + "d" * 16 + "-01",
        ),
        ParamsLogged(START + MS, {"lr": 0.001, "model.num_layers": 3, "augment": True, "optimizer": "adam"}),
        ParamsLogged(START + 2 * MS, {"classes": ",".join(f"class-{i}" for i in range(250)), "lr": 0.01}),
        TagsSet(START + 3 * MS, {"team": "ml"}),
        SpanStarted("0" * 15 + "1", root, "validate", START + 4 * MS, {"split": "test"}),
        SpanEnded("0" * 15 + "1", START + 5 * MS),
        ArtifactLogged(START + 6 * MS, "plots/a b.png", "/data/a b.png", "artifacts/1", 12345, "ab" * 32, "image/png"),
    )
    points = PointBatch(
        {0: "train/loss", 1: "验证 acc@5"},
        array("Q", [START + i * MS for i in range(6)]),
        array("d", [0.5, 0.25, math.nan, math.inf, 0.125, 1.0]),
        array("q", [0, 1, 2, -3, 2**63 - 1, 100]),
        array("I", [0, 0, 0, 0, 0, 1]),
        frozenset((4,)),
    )
    none = PointBatch({}, array("Q"), array("d"), array("q"), array("I"))
    ended = AttemptEnded(
        "FAILED",
        START,
        END,
        True,
        error,
        {"lr": 0.01, "model.num_layers": 3, "augment": True, "optimizer": "adam", "classes": "class-0," * 300},
        {"team": "ml"},
        (SpanStarted("0" * 15 + "2", root, "train", START + 7 * MS),),
        {"w" * 16: (("train/loss", START + 4 * MS), ("验证 acc@5", START + 5 * MS))},
    )
    part = Part("w" * 16, resource_of_this_version(), records, points)
    return (
        Batch(1, RUN, "/nowhere", (part,)),
        Heartbeat(START + 30_000 * MS, "RUNNING", START + 5 * MS, {"mlflow-1a2b3c4d": "0123456789abcdef"}),
        Batch(2, RUN, "/nowhere", (Part("w" * 16, part.opened, (ended,), none),)),
    )


def resource_of_this_version() -> Any:
    """The opening of the writer, its Resource with every attribute of the contract."""
    opening = opened()
    assert isinstance(opening.resource, dict)
    opening.resource.update(
        {
            "service.namespace": "tracelet",
            semconv.ATTEMPT_ORDER: START,
            semconv.RESOURCE_WIRE_VERSION: semconv.WIRE_VERSION,
            "telemetry.sdk.name": "tracelet",
            "telemetry.sdk.language": "python",
            "telemetry.sdk.version": "0.0.0",  # the release is not the wire's version
        }
    )
    return opening


def made() -> dict[str, list[dict[str, Any]]]:
    """What today's encoder makes of the run: requests as JSON, by signal, in the order of sending."""
    first, heartbeat, last = batches()
    begun = plan(first, Ledger())
    ledger = begun.after
    beat = heartbeat_load(first, heartbeat, ledger)
    ledger.beaten(heartbeat)
    loads = (*begun.loads, beat, *plan(last, ledger).loads)
    return {signal: [json.loads(json_line(load)) for load in loads if load.signal == signal] for signal in SIGNALS}


def versions() -> list[Path]:
    return sorted(FOLDER.glob("wire-*"))


def kept(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {signal: json.loads((folder / f"{signal}.json").read_text(encoding="utf-8")) for signal in SIGNALS}


@pytest.mark.parametrize("signal", SIGNALS)
def test_the_encoder_makes_what_was_released(signal: str) -> None:
    assert made()[signal] == kept(FOLDER / f"wire-{semconv.WIRE_VERSION}")[signal]


def base64_ids(value: Any) -> Any:
    """OTLP's JSON has ids in hexadecimal, protobuf's own in base64."""
    if isinstance(value, list):
        return [base64_ids(each) for each in value]
    if not isinstance(value, dict):
        return value
    import base64

    return {
        key: base64.b64encode(bytes.fromhex(each)).decode() if key in BASE64 else base64_ids(each)
        for key, each in value.items()
    }


@pytest.mark.parametrize("folder", versions(), ids=lambda folder: str(folder.name))
def test_a_run_is_read_from_what_was_released(folder: Path) -> None:
    requests = [
        (signal, ParseDict(base64_ids(request), REQUESTS[signal]()))
        for signal, requests in kept(folder).items()
        for request in requests
    ]
    (run,) = decode(requests).values()
    assert run.status == "FAILED"
    assert run.params["lr"] == 0.01
    assert run.params["classes"].endswith("class-249")
    assert run.tags == {"team": "ml"}
    assert [artifact.source for artifact in run.artifacts] == ["/data/a b.png"]
    (names,) = run.samples.values()
    assert [iteration for _, _, iteration, _ in names["train/loss"]] == [0, 1, 2, -3, 2**63 - 1]
    assert run.nonfinite == {"train/loss": 2}
    assert {phase.name for phase in run.phases.values()} == {"run bold-hawk", "validate", "train"}


def write() -> None:
    folder = FOLDER / f"wire-{semconv.WIRE_VERSION}"
    folder.mkdir(exist_ok=True)
    for signal, requests in made().items():
        file = folder / f"{signal}.json"
        if not file.exists():
            file.write_text(json.dumps(requests, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
