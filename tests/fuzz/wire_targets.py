"""What others send: requests to the gateway, the answers of receivers, of Prometheus and of MLflow.

None of it is ours, so each decoder takes any bytes: it gives a value, or the error that its caller waits for.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, get_args

import grpc
import requests
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from tests.fuzz.target import Target
from tests.otlp_batches import START, batch
from tracelet.errors import Malformed
from tracelet.exporters.mlflow.connection import Reply
from tracelet.exporters.mlflow.rest import RestTransport
from tracelet.exporters.mlflow.transport import NotNow, Refused, Unclear
from tracelet.exporters.otlp_grpc import GrpcSender, _retry_delay
from tracelet.exporters.otlp_http import HttpSender, accepted
from tracelet.exporters.prometheus_http import PrometheusSender
from tracelet.exporters.retry_after import retry_after
from tracelet.gateway import limits
from tracelet.otlp import decode, measure
from tracelet.otlp.message_json import message_dict
from tracelet.otlp.plan import Ledger, plan
from tracelet.records import (
    ArtifactLogged,
    AttemptEnded,
    ErrorInfo,
    ParamsLogged,
    RunStarted,
    SpanEnded,
    SpanStarted,
    TagsSet,
)

__all__ = ["WIRE_TARGETS"]

DECODERS: Mapping[str, Callable[[Any], Any]] = {
    "metrics": decode.decode_metrics,
    "logs": decode.decode_logs,
    "traces": decode.decode_traces,
}
MAX_BODY = 100_000


# ---- requests ----------------------------------------------------------------------------------------------------


def _request(signal: str, content_type: str) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        if measure.holds_more(signal, data, content_type, 10_000):  # the gateway refuses it before it is read
            return
        try:
            message = decode.parse(signal, data, content_type)
        except Malformed:
            return
        found = DECODERS[signal](message)
        # What is ours of it is kept as it is: the decoded request said again decodes to the same.
        again = decode.parse(signal, message.SerializeToString(), "application/x-protobuf")
        assert repr(DECODERS[signal](again)) == repr(found)

    return run


def _requests() -> dict[str, bytes]:
    """A request of each signal, as our own exporter makes them of a run."""
    records = (
        RunStarted(START, "r", {"os.type": "linux"}, {}, None),
        ParamsLogged(START + 1, {"lr": 0.1, "long": "x" * 5000, "on": True}),
        TagsSet(START + 2, {"stage": "final"}),
        SpanStarted("00000000000000b1", "00000000000000b0", "phase", START, {"k": 1}),
        SpanEnded("00000000000000b1", START + 9, ErrorInfo("E", "m", "s")),
        ArtifactLogged(START, "m/model.bin", "/m", "artifacts/1", 5, "ab" * 32, "application/octet-stream"),
    )
    end = AttemptEnded("FAILED", START, START + 10, True, ErrorInfo("E", "m", "s"), {"lr": 0.1}, {"a": "b"}, (), {})
    rows = [("loss", i / 3, i) for i in range(5)] + [("acc", float("nan"), -1)]
    planned = plan(batch(rows, (*records, end)), Ledger(), None)
    found: dict[str, bytes] = {}
    for load in planned.loads:
        found.setdefault(load.signal, load.encode())
    return found


def _inflated(data: bytes) -> None:
    for encoding in get_args(limits.Encoding):
        with suppress(limits.Refused):
            assert len(limits.inflate(data, encoding, MAX_BODY)) <= MAX_BODY


# ---- answers -----------------------------------------------------------------------------------------------------

KINDS = (
    "application/x-protobuf",
    "application/json",
    "text/html",
    "text/plain; charset=nonsense",
    "",
    "application/json; charset=utf-16",
)
SIGNALS = ("metrics", "logs", "traces")


def _answer(data: bytes) -> requests.Response:
    """Any answer: the first bytes choose status and type, a line the `Retry-After`, the rest is the body."""
    made = requests.Response()
    head, _, rest = data[2:].partition(b"\n")
    choice = (data + b"\0\0")[:2]
    made.status_code = 200 + 2 * choice[0] % 400
    made._content = rest
    made.url = "http://receiver.example:4318/v1/metrics"
    made.reason = head.decode("latin-1")
    made.headers["Content-Type"] = KINDS[choice[1] % len(KINDS)]
    made.headers["Retry-After"] = made.headers["Location"] = head.decode("latin-1")
    return made


def _http_answer(kind: type[HttpSender]) -> Callable[[bytes], None]:
    sender = kind.__new__(kind)  # without the connection, of which reading an answer needs nothing
    sender._signal, sender._sieve = "metrics", str

    def run(data: bytes) -> None:
        answer = _answer(data)
        reply = sender._advised(answer) if isinstance(sender, PrometheusSender) else sender._read(answer)
        assert reply.kind in ("accepted", "refused", "too_large", "later", "fault")
        assert len(reply.reason) < 3000
        if not 200 <= answer.status_code < 300:
            assert reply.kind != "accepted"
        assert reply.after_s is None or 1.0 <= reply.after_s <= 3600.0

    return run


def _success(data: bytes) -> None:
    for signal in SIGNALS:
        for kind in KINDS[:3]:
            reply = accepted(signal, data, kind, str, "http://receiver.example")
            assert reply.kind in ("accepted", "later")


class _Call(Exception):
    """A call's end as gRPC has it."""

    def __init__(self, code: grpc.StatusCode, details: str, trailers: list[tuple[str, bytes]]) -> None:
        self._end = code, details, trailers

    def code(self) -> grpc.StatusCode:
        return self._end[0]

    def details(self) -> str:
        return self._end[1]

    def trailing_metadata(self) -> list[tuple[str, bytes]]:
        return self._end[2]


CODES = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]


def _grpc_answer(data: bytes) -> None:
    sender = GrpcSender.__new__(GrpcSender)
    sender._signal, sender._sieve, sender._hint = "metrics", str, ""
    choice, rest = (data + b"\0")[0], data[1:]
    for name in ("grpc-status-details-bin", "google.rpc.retryinfo-bin"):
        end = _Call(CODES[choice % len(CODES)], rest.decode("utf-8", "replace"), [(name, rest)])
        reply = sender._read(end)
        assert reply.kind in ("refused", "too_large", "later", "fault")
        wish = _retry_delay(end)
        assert wish is None or 1.0 <= wish <= 3600.0


def _wish(data: bytes) -> None:
    for text in (data.decode("latin-1"), data.decode("utf-8", "replace")):
        granted = retry_after(text, now_s=1.8e9)
        assert granted is None or 1.0 <= granted <= 3600.0


class _MlflowServer:
    """A connection whose every answer is the same."""

    origin, prefix = "http://mlflow.example", ""

    def __init__(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self._answer = Reply(status, body, headers)

    def request(self, *_: object, **__: object) -> Reply:
        return self._answer


STATUSES = (200, 200, 200, 200, 301, 400, 401, 403, 404, 408, 429, 500, 503)


def _mlflow_answer(data: bytes) -> None:
    status, body = STATUSES[(data + b"\0")[0] % len(STATUSES)], data[1:]
    server: Any = _MlflowServer(status, body, {"retry-after": body[:20].decode("latin-1"), "location": "x?y"})
    rest = RestTransport(server)
    calls: tuple[Callable[[], Any], ...] = (
        lambda: rest.experiment_by_name("e"),
        lambda: rest.create_experiment("e"),
        lambda: rest.runs_with_tag("1", "k", "v"),
        lambda: rest.run("r"),
        lambda: rest.log_params("r", [("a", "b")]),
        lambda: rest.has_metric_row("r", ("a", 1.0, 2, 3)),
        lambda: rest.update_run("r", "FINISHED", 1),
    )
    for call in calls:
        with suppress(NotNow, Refused, Unclear):
            call()


def _mlflow_seeds() -> tuple[bytes, ...]:
    run = {
        "info": {
            "run_id": "r",
            "experiment_id": "1",
            "start_time": 5,
            "status": "RUNNING",
            "lifecycle_stage": "active",
        },
        "data": {
            "metrics": [{"key": "a", "value": 1.5, "timestamp": 2, "step": 3}],
            "params": [{"key": "a", "value": "b"}],
            "tags": [{"key": "a", "value": "b"}],
        },
    }
    answers = (
        {"experiment": {"experiment_id": "1", "lifecycle_stage": "active"}},
        {"runs": [run]},
        {"run": run},
        {"metrics": [{"key": "a", "value": "NaN", "timestamp": "2", "step": "3"}]},
        {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no"},
    )
    return tuple(bytes((kind,)) + json.dumps(answer).encode() for answer in answers for kind in (0, 5))


def _status_seed() -> bytes:
    status = Status(code=14, message="busy")
    wish = RetryInfo()
    wish.retry_delay.seconds = 7
    status.details.add().Pack(wish)
    return bytes(status.SerializeToString())


def _made() -> dict[str, Target]:
    made: dict[str, Target] = {}
    for signal, request in _requests().items():
        made[f"{signal} protobuf"] = Target(_request(signal, "application/x-protobuf"), (request,))
        plain = message_dict(decode.parse(signal, request, "application/x-protobuf"))
        made[f"{signal} json"] = Target(_request(signal, "application/json"), (json.dumps(plain).encode(),))
    partial = ExportTraceServiceResponse()
    partial.partial_success.rejected_spans = 3
    partial.partial_success.error_message = "too old"
    text = b'{"partialSuccess": {"rejectedDataPoints": "3", "errorMessage": "too old"}}'
    made["inflate"] = Target(_inflated, (gzip.compress(b"points" * 50), zlib.compress(b"points" * 50)))
    made["otlp success"] = Target(_success, (partial.SerializeToString(), text))
    made["otlp http answer"] = Target(
        _http_answer(HttpSender), (b"\0\0120\n" + text, b"\x96\x011\n{}", b"\x64\x02\n<h1>")
    )
    made["prometheus answer"] = Target(
        _http_answer(PrometheusSender), (b"\x64\x03120\nout of order sample", b"\x66\0\n")
    )
    made["otlp grpc answer"] = Target(_grpc_answer, tuple(bytes((i,)) + _status_seed() for i in (0, 7, 13)))
    made["Retry-After"] = Target(_wish, (b"120", b"Fri, 15 Jan 2027 08:00:00 GMT", b"Fri, 15 Jan 2027 08:00:00 -0000"))
    made["mlflow answer"] = Target(_mlflow_answer, _mlflow_seeds())
    return made


WIRE_TARGETS: dict[str, Target] = _made()
