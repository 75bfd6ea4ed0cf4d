"""The HTTP door, in process: what is acknowledged, what is refused, and how each client is told."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.json_format import MessageToDict
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.gateway_fakes import Answer, Doorway, points_request, service_request
from tests.shipping import until
from tracelet.gateway.callers import Caller, Forbidden, Full, IntakeInfo
from tracelet.gateway.limits import Limits
from tracelet.guard import guard
from tracelet.otlp.decode import Decoded

OURS = {"tracelet.wire.version": "1.0"}
TOKENS = '[[token]]\nname = "a"\ntoken = "sesame-token"\nprojects = ["*"]\n'
POINTS = points_request().SerializeToString()


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Doorway]:
    doorway = Doorway(tmp_path)
    yield doorway
    doorway.close()


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Doorway]:
    doorway = Doorway(tmp_path, tokens=TOKENS)
    yield doorway
    doorway.close()


@pytest.fixture(autouse=True)
def _fresh_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_logged_at", {})


def test_points_are_taken_and_acknowledged_with_an_empty_response(door: Doorway) -> None:
    answer = door.post("metrics", POINTS)
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["content-type"] == "application/x-protobuf"
    assert not ExportMetricsServiceResponse.FromString(answer.body).HasField("partial_success")
    ((decoded, caller),) = door.intake.taken
    assert [arrival.run.run_id for arrival in decoded.arrivals] == ["run-1"]
    assert caller == Caller()
    assert door.number('items_taken_total{signal="metrics"}') == 3


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [
        ("gzip", gzip.compress(POINTS)),
        ("deflate", zlib.compress(POINTS)),
        ("identity", POINTS),
        ("GZIP", gzip.compress(POINTS)),
    ],
)
def test_each_compression_is_understood(door: Doorway, encoding: str, packed: bytes) -> None:
    assert door.post("metrics", packed, {"content-encoding": encoding}).status == 200
    assert door.intake.taken[0][0].arrivals[0].items == 3


def test_json_is_answered_with_json(door: Doorway) -> None:
    body = json.dumps(MessageToDict(points_request())).encode()
    answer = door.post("metrics", body, {"content-type": "application/json; charset=utf-8"})
    assert (answer.status, answer.body) == (200, b"{}")
    assert answer.headers["content-type"] == "application/json"
    assert door.intake.taken[0][0].arrivals[0].items == 3


@pytest.mark.parametrize(
    ("signal", "request_"), [("logs", ExportLogsServiceRequest()), ("traces", ExportTraceServiceRequest())]
)
def test_an_empty_request_is_full_success(door: Doorway, signal: str, request_: ExportLogsServiceRequest) -> None:
    assert door.post(signal, request_.SerializeToString()).status == 200
    assert door.post(signal, b"{}", {"content-type": "application/json"}).status == 200


def test_what_is_no_runs_is_counted_and_acknowledged_with_full_success(door: Doorway) -> None:
    answer = door.post("metrics", service_request(2).SerializeToString())
    assert (answer.status, answer.body) == (200, b"")
    assert door.intake.taken == []
    assert door.number('items_foreign_total{signal="metrics"}') == 2


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"\xff\xff\xff", {}),
        (POINTS[:-5], {}),
        (b"{", {"content-type": "application/json"}),
        (b'"text"', {"content-type": "application/json"}),
        (b"\xff", {"content-type": "application/json"}),
        (b'{"resourceMetrics": [{"resource": 1}]}', {"content-type": "application/json"}),
        (POINTS, {"content-encoding": "gzip"}),
        (gzip.compress(POINTS)[:-10], {"content-encoding": "gzip"}),
        (b"", {"content-encoding": "gzip"}),
    ],
)
def test_what_is_malformed_is_400_with_a_status_that_says_why(
    door: Doorway, body: bytes, headers: dict[str, str]
) -> None:
    answer = door.post("metrics", body, headers)
    assert answer.status == 400
    if headers.get("content-type") == "application/json":
        status = json.loads(answer.body)
        assert (status["code"], bool(status["message"])) == (3, True)
    else:
        found = Status.FromString(answer.body)
        assert (found.code, bool(found.message)) == (3, True)
    assert "retry-after" not in answer.headers
    assert door.post("metrics", POINTS).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": ""},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-encoding": "zstd"},
        {"content-encoding": "gzip, gzip"},
    ],
)
def test_a_content_type_or_encoding_that_is_not_otlps_is_415(door: Doorway, headers: dict[str, str]) -> None:
    assert door.post("metrics", POINTS, headers).status == 415
    assert door.intake.taken == []


def test_another_method_is_405_and_another_path_404(door: Doorway) -> None:
    assert door.get("/v1/metrics").status == 405
    assert door.post("profiles", POINTS).status == 404


def test_a_body_that_says_it_is_too_long_is_refused_before_it_is_read(tmp_path: Path) -> None:
    door = Doorway(tmp_path, limits=Limits(max_body=1000, max_compressed=500))
    announced = {"content-length": "100000000"}
    assert door.post("metrics", [], announced, stalls=True).status == 413
    assert door.post("metrics", [bytes(600)] * 3, {}, stalls=True).status == 413  # one that doesn't say
    assert door.post("metrics", gzip.compress(bytes(100_000)), {"content-encoding": "gzip"}).status == 413
    assert door.post("metrics", [bytes(600)], {"content-encoding": "gzip"}).status == 413
    door.close()


def test_requests_in_flight_are_bounded_together(tmp_path: Path) -> None:
    door = Doorway(tmp_path, limits=Limits(max_in_flight=100))
    answer = door.post("metrics", bytes(101))
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")
    assert door.reception.budget.in_flight == 0
    door.close()


def test_a_request_whose_task_is_cancelled_holds_memory_only_as_long_as_the_work_goes_on(door: Doorway) -> None:
    entered, may_go = threading.Event(), threading.Event()

    def wait(decoded: Decoded, caller: Caller) -> None:
        entered.set()
        assert may_go.wait(30)

    door.intake.rule = wait
    budget = door.reception.budget

    async def leave() -> None:
        headers = {"content-type": "application/x-protobuf"}
        asking = asyncio.create_task(door.answered("POST", "/v1/metrics", headers, [POINTS]))
        assert await asyncio.to_thread(entered.wait, 30)
        asking.cancel()  # uvicorn does so when its time of grace is over
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert budget.in_flight == len(POINTS)
        may_go.set()

    asyncio.run(leave())
    until(lambda: budget.in_flight == 0)


def test_a_request_of_very_many_messages_is_413_before_it_is_decoded(tmp_path: Path) -> None:
    decoded: list[object] = []
    door = Doorway(tmp_path, limits=Limits(max_body=8_000), decoders={"metrics": decoded.append})  # type: ignore[dict-item]
    json_ = {"content-type": "application/json"}
    assert door.post("metrics", b"\x0a\x00" * 1001).status == 413
    answer = door.post("metrics", b'{"resourceMetrics":[' + b"{}," * 1000 + b"{}]}", json_)
    assert (answer.status, "1000 messages or objects" in answer.body.decode()) == (413, True)
    assert decoded == []
    assert door.number('refused_total{reason="too large"}') == 2
    door.close()


def test_a_body_that_stops_arriving_is_408_to_our_client_and_503_to_others(tmp_path: Path) -> None:
    door = Doorway(tmp_path, limits=Limits(idle_timeout_s=0.05))
    assert door.post("metrics", POINTS[:10], OURS, stalls=True).status == 408
    other = door.post("metrics", POINTS[:10], stalls=True)
    assert (other.status, other.headers["retry-after"]) == (503, "5")
    assert door.intake.taken == []
    door.close()


@pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer sesame-wrong", "Basic c2VzYW1l"])
def test_credentials_that_wont_do_are_401_to_our_client_and_503_to_a_collector(
    guarded: Doorway, authorization: str, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"authorization": authorization}
    ours = guarded.post("metrics", POINTS, {**given, **OURS})
    assert (ours.status, ours.headers["www-authenticate"]) == (401, "Bearer")
    collector = guarded.post("metrics", POINTS, given)
    assert (collector.status, collector.headers["retry-after"]) == (503, "30")
    assert guarded.intake.taken == []
    assert "REFUSED" in caplog.text
    reason = "wrong token" if "wrong" in authorization else "no token"
    assert guarded.number(f'refused_total{{reason="{reason}"}}') == 2


def test_credentials_are_looked_at_before_the_body(guarded: Doorway) -> None:
    assert guarded.post("metrics", [], OURS, stalls=True).status == 401


def test_a_listed_token_names_the_caller(guarded: Doorway) -> None:
    assert guarded.post("metrics", POINTS, {"authorization": "Bearer sesame-token", **OURS}).status == 200
    assert guarded.intake.taken[0][1] == Caller("a", None, ours=True)


def test_a_run_of_another_token_is_403_to_our_client_and_503_to_a_collector(door: Doorway) -> None:
    def forbid(decoded: Decoded, caller: Caller) -> None:
        raise Forbidden("run-1", "b", "it belongs to another token")

    door.intake.rule = forbid
    assert door.post("metrics", POINTS, OURS).status == 403
    collector = door.post("metrics", POINTS)
    assert (collector.status, collector.headers["retry-after"]) == (503, "30")


@pytest.mark.parametrize("error", [Full("no room"), OSError(28, "No space left on device")])
def test_a_full_spool_is_503_with_a_time_to_come_again(door: Doorway, error: Exception) -> None:
    def refuse(decoded: Decoded, caller: Caller) -> None:
        raise error

    door.intake.rule = refuse
    answer = door.post("metrics", POINTS)
    assert answer.status == 503
    assert int(answer.headers["retry-after"]) >= 1


def test_a_fault_of_ours_is_503_and_not_500(door: Doorway) -> None:
    def fail(decoded: Decoded, caller: Caller) -> None:
        raise KeyError("bug")

    door.intake.rule = fail
    assert door.post("metrics", POINTS).status == 503
    assert door.number('refused_total{reason="fault"}') == 1


def test_an_unknown_major_is_set_aside_as_it_came_and_acknowledged(
    door: Doorway, caplog: pytest.LogCaptureFixture
) -> None:
    strange = points_request(wire="2.0").SerializeToString()
    for _ in range(2):  # a repeat is the same file
        assert door.post("metrics", strange).status == 200
    (file,) = door.aside.iterdir()
    assert file.read_bytes() == strange
    assert file.name.endswith(".metrics.pb")
    assert "'2.0'" in caplog.text
    assert door.number('set_aside_total{reason="unknown wire version"}') == 2
    assert door.number('items_unknown_wire_total{signal="metrics"}') == 6
    assert door.intake.taken == []


def test_what_is_known_beside_an_unknown_major_is_taken(door: Doorway) -> None:
    mixed = points_request()
    mixed.MergeFrom(points_request("run-2", wire="2.0"))
    assert door.post("metrics", mixed.SerializeToString()).status == 200
    assert [a.run.run_id for a in door.intake.taken[0][0].arrivals] == ["run-1"]
    assert len(list(door.aside.iterdir())) == 1


def test_the_folder_for_what_is_set_aside_is_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = points_request("run-1", wire="2.0").SerializeToString()
    door = Doorway(tmp_path, aside_bytes=len(one) + 10)
    assert door.post("metrics", one).status == 200
    assert door.post("metrics", points_request("run-2", wire="2.0").SerializeToString()).status == 200
    assert len(list(door.aside.iterdir())) == 1
    assert "LOST" in caplog.text
    assert door.number("set_aside_lost_total") == 1
    door.close()


def test_a_request_whose_decoding_fails_is_kept_aside_so_that_no_queue_stops_over_it(tmp_path: Path) -> None:
    def fail(message: object) -> Decoded:
        raise RuntimeError("bug")

    door = Doorway(tmp_path, decoders={"metrics": fail})
    assert door.post("metrics", POINTS).status == 200
    assert [file.read_bytes() for file in door.aside.iterdir()] == [POINTS]
    door.close()


def test_while_it_stops_nothing_is_taken_and_it_is_not_ready(door: Doorway) -> None:
    assert door.get("/readyz").status == 200
    door.reception.stopping.set()
    assert door.get("/readyz").status == 503
    assert door.get("/healthz").status == 200
    answer = door.post("metrics", POINTS)
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")


def test_a_spool_without_room_for_one_more_run_is_not_ready(door: Doorway) -> None:
    door.intake.info = IntakeInfo(is_full=True)
    answer = door.get("/readyz")
    assert (answer.status, b"TRACELET_GATEWAY_MAX_BYTES" in answer.body) == (503, True)
    assert door.get("/healthz").status == 200


def test_beyond_so_many_requests_at_once_one_has_to_come_again_and_a_probe_has_not(tmp_path: Path) -> None:
    door = Doorway(tmp_path, limits=Limits(max_requests=2, idle_timeout_s=30))
    headers = {"content-type": "application/x-protobuf"}

    async def crowd() -> list[Answer]:
        stuck = [
            asyncio.create_task(door.answered("POST", "/v1/metrics", headers, [POINTS[:10]], stalls=True))
            for _ in range(2)
        ]
        while door.reception.budget.in_flight < 20:
            await asyncio.sleep(0)
        answers = [
            await door.answered("POST", "/v1/metrics", headers, [POINTS]),
            await door.answered("GET", "/healthz", {}, []),
            await door.answered("GET", "/readyz", {}, []),
            await door.answered("GET", "/metrics", {}, []),
        ]
        for one in stuck:
            one.cancel()
        await asyncio.gather(*stuck, return_exceptions=True)
        return answers

    refused, *others = asyncio.run(crowd())
    assert (refused.status, refused.headers["retry-after"]) == (503, "5")
    assert [answer.status for answer in others] == [200] * 3
    assert door.number('refused_total{reason="busy"}') == 1
    assert door.post("metrics", POINTS).status == 200
    door.close()


def test_a_spool_that_is_gone_is_not_ready(tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    folder.mkdir()
    door = Doorway(folder)
    folder.rmdir()
    assert door.get("/readyz").status == 503
    door.close()


@pytest.mark.parametrize("run_id", ["nowhere", "..", ".hidden", "%00", "a" * 300])
def test_a_link_to_a_run_that_is_not_there_is_404(door: Doorway, run_id: str) -> None:
    assert door.get(f"/runs/{run_id}").status == 404


def test_tokens_stand_in_no_log_metric_or_answer(guarded: Doorway, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    seen = b""
    for token in ("sesame-token", "sesame-wrong", "sesame-token sesame"):
        for extra in ({}, OURS):
            answer = guarded.post("metrics", POINTS, {"authorization": f"Bearer {token}", **extra})
            seen += answer.body + str(answer.headers).encode()
    seen += guarded.get("/metrics").body + caplog.text.encode()
    assert b"sesame" not in seen


def test_every_metric_has_the_gateways_prefix_and_stands_on_its_page(door: Doorway) -> None:
    page = (Path(__file__).parents[3] / "docs" / "reference" / "gateway.md").read_text()
    door.post("metrics", POINTS)
    names = [line.split()[2] for line in door.get("/metrics").body.decode().splitlines() if line.startswith("# TYPE")]
    assert names
    for name in names:
        if name.endswith("_created"):
            continue
        assert name.startswith("tracelet_gateway_")
        assert f"`{name.removeprefix('tracelet_gateway_')}`" in page, name
