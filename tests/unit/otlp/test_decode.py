"""What a request says of runs, and that nothing a stranger sends makes the reader fail."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue, KeyValueList

from tests.otlp_batches import MS, RUN, START, opened, points
from tests.sinks import REQUESTS
from tracelet import ids
from tracelet.errors import Malformed
from tracelet.otlp import semconv
from tracelet.otlp.decode import Arrival, Decoded, decode_logs, decode_metrics, decode_traces, parse, whole
from tracelet.otlp.decode_rows import rows_of
from tracelet.otlp.encode import PointsLoad, any_value, resource_bytes
from tracelet.records import ArtifactLogged, ErrorInfo, ParamsLogged, RunStarted, SpansReceived, TagsSet

GOLDEN = Path(__file__).parents[2] / "golden" / "wire-1.0"
DECODERS: dict[str, Any] = {"metrics": decode_metrics, "logs": decode_logs, "traces": decode_traces}
FIELDS = {
    "metrics": ("resource_metrics", "scope_metrics", "metrics"),
    "logs": ("resource_logs", "scope_logs", "log_records"),
    "traces": ("resource_spans", "scope_spans", "spans"),
}


def request(signal: str, resource: dict[str, Any] | None = None, scope: str = "tracelet") -> tuple[Any, Any]:
    """A request of one Resource and scope, and the list its items go into."""
    message = REQUESTS[signal]()
    resources, scopes, items = FIELDS[signal]
    one = getattr(message, resources).add()
    for key, value in {**opened().resource, **(resource or {})}.items():
        attribute = one.resource.attributes.add(key=key)
        attribute.value.CopyFrom(value if isinstance(value, AnyValue) else any_value(value))
    inner = getattr(one, scopes).add()
    inner.scope.name = scope
    return message, getattr(inner, items)


def event(records: Any, name: str, values: dict[str, Any], body: str = "text", time: int = START) -> None:
    record = records.add(event_name=name, time_unix_nano=time)
    record.body.string_value = body
    for key, value in {"tracelet.event": name, **values}.items():
        attribute = record.attributes.add(key=key)
        attribute.value.CopyFrom(value if isinstance(value, AnyValue) else any_value(value))


def logs(*events: tuple[str, dict[str, Any]]) -> Decoded:
    message, records = request("logs")
    for name, values in events:
        event(records, name, values)
    return decode_logs(message)


def gauge(items: Any, name: str, *rows: tuple[int, float, Any]) -> None:
    metric = items.add(name=name)
    for time, value, iteration in rows:
        point = metric.gauge.data_points.add(time_unix_nano=time, as_double=value)
        attribute = point.attributes.add(key="tracelet.iteration")
        attribute.value.CopyFrom(iteration if isinstance(iteration, AnyValue) else any_value(iteration))


def only(decoded: Decoded) -> Arrival:
    assert (decoded.foreign, decoded.unknown, decoded.reasons) == (0, {}, {})
    (arrival,) = decoded.arrivals
    return arrival


# ---- what was released -------------------------------------------------------------------------------------------


def golden_bodies(signal: str) -> list[bytes]:
    """The requests of wire 1.0 in protobuf."""
    requests = json.loads((GOLDEN / f"{signal}.json").read_text(encoding="utf-8"))
    return [parse(signal, json.dumps(one).encode(), "application/json").SerializeToString() for one in requests]


def golden(signal: str) -> list[Arrival]:
    requests = json.loads((GOLDEN / f"{signal}.json").read_text(encoding="utf-8"))
    return [only(DECODERS[signal](parse(signal, json.dumps(one).encode(), "application/json"))) for one in requests]


def test_metrics_of_wire_1_0_are_read() -> None:
    arrivals = golden("metrics")
    (first,) = (arrival for arrival in arrivals if arrival.points is not None)
    assert (first.run, first.attempt_key, first.rank, first.instance_id) == (RUN, "a" * 16, 0, "instance-0")
    assert first.points is not None
    assert list(first.points.names.values()) == ["train/loss", "验证 acc@5"]
    assert list(first.points.time_unix_nano) == [START + i * MS for i in range(6)]
    assert list(first.points.iterations) == [0, 1, 2, -3, 2**63 - 1, 100]
    assert math.isnan(first.points.values[2])
    assert first.points.dense == {4}
    assert first.first_unix_nano == START
    assert [arrival.started_unix_nano for arrival in arrivals].count(START) == 1
    (ended,) = (arrival.ended for arrival in arrivals if arrival.ended)
    assert (ended.status, ended.told_by, ended.error) == ("FAILED", "status", None)


def test_logs_of_wire_1_0_are_read() -> None:
    first, last = golden("logs")
    assert first.started_unix_nano == START
    assert first.pieces == ()
    started, params, second, classes, tags, artifact = first.records
    assert isinstance(started, RunStarted)
    assert (started.environment["process.pid"], started.mlflow_tags["mlflow.user"]) == (4711, "ada")
    assert params == ParamsLogged(
        START + MS, {"lr": 0.001, "model.num_layers": 3, "augment": True, "optimizer": "adam"}
    )
    assert second == ParamsLogged(START + 2 * MS, {"lr": 0.01})
    assert classes == ParamsLogged(START + 2 * MS, {"classes": ",".join(f"class-{i}" for i in range(250))})
    assert tags == TagsSet(START + 3 * MS, {"team": "ml"})
    assert artifact == ArtifactLogged(
        START + 6 * MS, "plots/a b.png", "", None, 12345, "ab" * 32, "image/png", uri="file:///data/a%20b.png"
    )
    assert last.ended is not None
    assert (last.ended.status, last.ended.told_by) == ("FAILED", "event")
    assert last.ended.error is not None
    assert last.ended.error.message == "loss is NaN"


def test_traces_of_wire_1_0_are_read() -> None:
    first, last = golden("traces")
    assert [type(record) for record in first.records] == [SpansReceived]
    kinds = [type(record) for record in last.records]
    assert kinds == [SpansReceived, RunStarted, ParamsLogged, TagsSet]
    assert last.started_unix_nano == START
    assert last.ended is not None
    assert (last.ended.status, last.ended.told_by) == ("FAILED", "span")
    params = last.records[2]
    assert isinstance(params, ParamsLogged)
    assert "classes" not in params.params  # the span has only its beginning
    assert params.params["lr"] == 0.01


# ---- whose it is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", sorted(DECODERS))
def test_another_service_s_telemetry_is_counted(signal: str) -> None:
    message, items = request(signal)
    del getattr(message, FIELDS[signal][0])[0].resource.attributes[:]
    items.add()
    if signal == "metrics":
        items[0].histogram.data_points.add(count=3)
    decoded = DECODERS[signal](message)
    assert (decoded.arrivals, decoded.foreign, decoded.reasons) == ((), 1, {"no run id": 1})


@pytest.mark.parametrize(
    "run_id", ["", "..", "../x", "a/b", "a\0b", "x" * 10_000, ".hidden", 7, True, "ä", "a\n", AnyValue()]
)
def test_a_run_id_that_cannot_name_a_folder_is_foreign(run_id: Any) -> None:
    message, items = request("metrics", {semconv.RUN_ID: run_id})
    gauge(items, "loss", (START, 0.5, 1))
    decoded = decode_metrics(message)
    assert (decoded.arrivals, decoded.foreign) == ((), 1)
    assert list(decoded.reasons) == ["run id that can't name a run"]


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({semconv.RUN_ATTEMPT: "../x"}, "attempt key that can't be one"),
        ({semconv.RUN_ATTEMPT: 3}, "attempt key that can't be one"),
        ({semconv.RANK: "first"}, "rank that can't be one"),
        ({semconv.RANK: -1}, "rank that can't be one"),
        ({semconv.RANK: True}, "rank that can't be one"),
        ({semconv.RANK: 2**40}, "rank that can't be one"),
    ],
)
def test_a_resource_whose_place_in_a_run_is_unclear_is_foreign(attributes: dict[str, Any], reason: str) -> None:
    message, items = request("metrics", attributes)
    gauge(items, "loss", (START, 0.5, 1))
    assert decode_metrics(message).reasons == {reason: 1}


def test_a_resource_with_a_run_id_alone_is_a_run_s() -> None:
    message, items = request("metrics")
    del message.resource_metrics[0].resource.attributes[:]
    message.resource_metrics[0].resource.attributes.add(key=semconv.RUN_ID).value.string_value = "r1"
    message.resource_metrics[0].resource.attributes.add(key="service.name").value.string_value = "shop"
    gauge(items, "loss", (START, 0.5, 1))
    arrival = only(decode_metrics(message))
    assert (arrival.run.run_id, arrival.run.project, arrival.run.experiment_name) == ("r1", "shop", "shop")
    assert (arrival.attempt_key, arrival.rank) == ("0" * 16, 0)
    assert arrival.instance_id == ids.instance_id("r1", "0" * 16, 0)


def test_a_rank_from_a_variable_is_a_text() -> None:
    message, items = request("metrics", {semconv.RANK: "3"})
    gauge(items, "loss", (START, 0.5, 1))
    assert only(decode_metrics(message)).rank == 3


@pytest.mark.parametrize(
    ("version", "known"), [("1.0", True), ("1.99", True), ("1", True), ("2.0", False), ("10.1", False)]
)
def test_every_minor_of_the_major_is_read_and_another_major_set_aside_by_name(version: str, known: bool) -> None:
    message, items = request("metrics", {semconv.RESOURCE_WIRE_VERSION: version, "tracelet.news": "kept"})
    gauge(items, "loss", (START, 0.5, 1), (START + MS, 0.25, 2))
    decoded = decode_metrics(message)
    assert decoded.unknown == ({} if known else {version: 2})
    assert decoded.foreign == 0
    assert [arrival.resource["tracelet.news"] for arrival in decoded.arrivals] == ["kept"] * known


def test_a_thousand_made_up_versions_are_a_few_names() -> None:
    message = REQUESTS["metrics"]()
    for number in range(1_000):
        other, items = request("metrics", {semconv.RESOURCE_WIRE_VERSION: f"{number + 2}" * 100})
        gauge(items, "loss", (START, 0.5, 1))
        message.MergeFrom(other)
    decoded = decode_metrics(message)
    assert sum(decoded.unknown.values()) == 1_000
    assert len(decoded.unknown) <= 20
    assert all(len(name) <= 32 for name in decoded.unknown)


def test_what_a_collector_merged_is_an_arrival_each() -> None:
    message = REQUESTS["metrics"]()
    for rank in (0, 1):
        other, items = request("metrics", {semconv.RANK: rank, "k8s.pod.name": f"pod-{rank}"})
        gauge(items, "loss", (START, float(rank), 1))
        message.MergeFrom(other)
    found = decode_metrics(message).arrivals
    assert [(a.rank, a.resource["k8s.pod.name"], list(a.points.values)) for a in found if a.points] == [
        (0, "pod-0", [0.0]),
        (1, "pod-1", [1.0]),
    ]


# ---- points ------------------------------------------------------------------------------------------------------


def test_what_is_no_gauge_of_numbers_is_counted_and_the_rest_taken() -> None:
    message, items = request("metrics")
    gauge(items, "loss", (START, 0.5, 1))
    items.add(name="h").histogram.data_points.add(count=1)
    items.add(name="e").exponential_histogram.data_points.add(count=1)
    items.add(name="s").summary.data_points.add(count=1)
    items.add(name="total").sum.data_points.add(as_int=1)
    items.add(name="nothing")
    items.add(name="empty").gauge.data_points.add(time_unix_nano=START)
    gauge(items, "", (START, 0.5, 1))
    gauge(items, "tracelet.iteration", (START, 0.5, 1))
    gauge(items, "wrong", (START, 0.5, "seven"), (START, 0.5, 2.5), (START, 0.5, AnyValue()), (START + 1, 1.5, 4))
    decoded = decode_metrics(message)
    assert decoded.reasons == {
        "metric that is no gauge": 4,
        "point without a value": 1,
        "metric's name that is nobody's": 2,
        "iteration that is no integer": 3,
    }
    (arrival,) = decoded.arrivals
    assert arrival.points is not None
    assert (list(arrival.points.values), arrival.items) == ([0.5, 1.5], 2)


def test_integers_are_values_and_a_missing_iteration_is_zero() -> None:
    message, items = request("metrics")
    points_ = items.add(name="steps").gauge.data_points
    points_.add(time_unix_nano=START, as_int=-7)
    points_.add(time_unix_nano=START, as_int=0)
    points_.add(time_unix_nano=START, as_double=-0.0)
    arrival = only(decode_metrics(message))
    assert arrival.points is not None
    assert [str(value) for value in arrival.points.values] == ["-7.0", "0.0", "-0.0"]
    assert list(arrival.points.iterations) == [0, 0, 0]


def test_the_sdk_s_overflow_is_no_value_at_iteration_zero() -> None:
    message, items = request("metrics")
    point = items.add(name="loss").gauge.data_points.add(time_unix_nano=START, as_double=0.5)
    point.attributes.add(key="otel.metric.overflow").value.bool_value = True
    assert decode_metrics(message).reasons == {"the SDK's overflow": 1}


def test_the_end_of_a_series_is_no_value() -> None:
    message, items = request("metrics")
    items.add(name="loss").gauge.data_points.add(time_unix_nano=START, flags=1)
    arrival = only(decode_metrics(message))
    assert (arrival.points, arrival.items, arrival.first_unix_nano) == (None, 1, 0)


WIDTHS = [0, 1, 127, 128, 16_383, 16_384, 2**31, 2**62, 2**63 - 1, -1, -(2**63)]


@given(
    rows=st.lists(st.tuples(st.floats(), st.sampled_from(WIDTHS), st.integers(1, 40)), min_size=1, max_size=12),
    names=st.integers(1, 3),
    spoil=st.sampled_from(["", "time", "dense", "flag", "integer", "attribute", "order"]),
    at=st.integers(0, 2**16),
)
@settings(max_examples=200, deadline=None)
def test_rows_in_bulk_say_what_they_say_one_by_one(rows: Any, names: int, spoil: str, at: int) -> None:
    flat = [
        (f"m{i % names}", value, iteration) for i, (value, iteration, times) in enumerate(rows) for _ in range(times)
    ]
    batch = points(flat, dense=[at % len(flat)] if spoil == "dense" else [])
    load = PointsLoad.of(resource_bytes(opened().resource), batch)
    message = parse("metrics", load.encode(), "application/x-protobuf")
    chosen = message.resource_metrics[0].scope_metrics[0].metrics[0].gauge.data_points
    point = chosen[at % len(chosen)]
    if spoil == "time":
        point.time_unix_nano = 0
    elif spoil == "flag":
        point.flags = 1
    elif spoil == "integer":
        point.as_int = 5
    elif spoil == "attribute":
        point.attributes.add(key="k8s.pod").value.string_value = "p"
    elif spoil == "order":
        point.attributes.add().CopyFrom(point.attributes[0])
        point.attributes[0].key = "another"
    arrival = only(decode_metrics(message))
    expected = []
    for metric in message.resource_metrics[0].scope_metrics[0].metrics:
        for each in metric.gauge.data_points:
            if not each.flags:
                iteration = next(a.value.int_value for a in each.attributes if a.key == "tracelet.iteration")
                value = each.as_double if each.WhichOneof("value") == "as_double" else float(each.as_int)
                expected.append((metric.name, each.time_unix_nano, repr(value), iteration, len(each.attributes) == 2))
    found = []
    if arrival.points is not None:
        own = arrival.points
        found = [
            (own.names[m], own.time_unix_nano[i], repr(own.values[i]), own.iterations[i], i in own.dense)
            for i, m in enumerate(own.metric_ids)
        ]
    if spoil in ("attribute", "order"):
        expected = [(*row[:4], False) for row in expected]
    assert found == expected


def test_usual_rows_are_read_in_bulk() -> None:
    load = PointsLoad.of(resource_bytes({}), points([("loss", 0.5, i) for i in range(20_000)]))
    gauge_ = (
        parse("metrics", load.encode(), "application/x-protobuf").resource_metrics[0].scope_metrics[0].metrics[0].gauge
    )
    found = rows_of(gauge_, 20_000)
    assert found is not None
    assert list(found[2]) == list(range(20_000))


# ---- log events --------------------------------------------------------------------------------------------------


def test_values_of_any_type_are_params_and_tags() -> None:
    listed = AnyValue(array_value=ArrayValue(values=[AnyValue(int_value=1), AnyValue(string_value="ü")]))
    mapped = AnyValue(kvlist_value=KeyValueList(values=[KeyValue(key="k", value=AnyValue(bool_value=True))]))
    arrival = only(
        logs(
            (
                "tracelet.params",
                {
                    "tracelet.param.list": listed,
                    "tracelet.param.map": mapped,
                    "tracelet.param.bytes": AnyValue(bytes_value=b"\x00\xff"),
                    "tracelet.param.none": AnyValue(),
                    "other": 1,
                },
            ),
            ("tracelet.tags", {"tracelet.tag.n": 3, "tracelet.tag.b": True}),
        )
    )
    params, tags = arrival.records
    assert params == ParamsLogged(START, {"list": '[1, "ü"]', "map": '{"k": true}', "bytes": "AP8=", "none": ""})
    assert tags == TagsSet(START, {"n": "3", "b": "True"})


def test_an_event_is_known_by_its_attribute_too() -> None:
    message, records = request("logs")
    event(records, "tracelet.tags", {"tracelet.tag.a": "b"})
    records[0].event_name = ""  # a store between us that knows no EventName
    assert only(decode_logs(message)).records == (TagsSet(START, {"a": "b"}),)


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../../b", "..", "", "a\0b", 5, AnyValue()])
def test_an_artifact_that_would_leave_its_folder_is_refused(name: Any) -> None:
    decoded = logs(("tracelet.artifact", {"tracelet.artifact.name": name}))
    assert (decoded.arrivals, decoded.reasons) == ((), {"artifact without a usable name": 1})


def test_an_artifact_of_wrong_types_is_one_without_these() -> None:
    values = {"tracelet.artifact.name": "a.txt", "tracelet.artifact.size": "big", "tracelet.artifact.digest": "md5:1"}
    (record,) = only(logs(("tracelet.artifact", {**values, "tracelet.artifact.uri": 5}))).records
    assert record == ArtifactLogged(START, "a.txt", "", None, 0, None, "", uri=None)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"tracelet.run.state": "RUNNING"},
        {"tracelet.run.state": 5},
        {"tracelet.run.state": "DONE"},
    ],
)
def test_an_end_without_a_state_is_none(values: dict[str, Any]) -> None:
    assert logs(("tracelet.run.ended", values)).reasons == {"end without a state": 1}


PIECE = {
    "tracelet.chunk.key": "tracelet.param.x",
    "tracelet.chunk.index": 1,
    "tracelet.chunk.count": 2,
    "tracelet.chunk.digest": "sha256:" + "0" * 64,
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"tracelet.chunk.index": 0},
        {"tracelet.chunk.index": 3},
        {"tracelet.chunk.index": "1"},
        {"tracelet.chunk.count": True},
        {"tracelet.chunk.count": 2**60},
        {"tracelet.chunk.digest": "nonsense"},
        {"tracelet.chunk.digest": 7},
        {"tracelet.chunk.key": 7},
    ],
)
def test_a_piece_that_is_none_is_counted(wrong: dict[str, Any]) -> None:
    assert logs(("tracelet.params", {**PIECE, **wrong})).reasons == {"piece that is none": 1}


def test_pieces_of_another_digest_are_counted_and_make_no_value() -> None:
    decoded = logs(("tracelet.params", PIECE), ("tracelet.params", {**PIECE, "tracelet.chunk.index": 2}))
    assert (decoded.arrivals, decoded.reasons) == ((), {"pieces of another digest": 2})


def test_a_piece_alone_waits_for_the_others() -> None:
    (piece,) = only(logs(("tracelet.params", PIECE))).pieces
    assert (piece.key, piece.index, piece.count, piece.digest, piece.text) == (
        "tracelet.param.x",
        1,
        2,
        "0" * 64,
        "text",
    )
    assert whole(piece.event, piece.key, "both", START) == ParamsLogged(START, {"x": "both"})
    assert whole("tracelet.tags", "tracelet.tag.x", "t", START) == TagsSet(START, {"x": "t"})
    assert whole("tracelet.run.started", "process.command", "c", START) == RunStarted(
        START, "", {"process.command": "c"}, {}
    )
    own = whole("tracelet.run.started", "tracelet.mlflow.tag.mlflow.note", "n", START)
    assert own == RunStarted(START, "", {}, {"mlflow.note": "n"})
    assert whole("tracelet.span", "anything", "t", START) is None


def test_what_is_no_event_of_ours_is_counted() -> None:
    assert logs(("tracelet.of.tomorrow", {}), ("", {})).reasons == {"log record that is no event of ours": 2}
    message, records = request("logs", scope="my.logger")
    event(records, "tracelet.tags", {"tracelet.tag.a": "b"})
    assert decode_logs(message).reasons == {"another scope": 1}


# ---- spans -------------------------------------------------------------------------------------------------------


def span_of(items: Any, span_id: str, **more: Any) -> Any:
    trace = bytes.fromhex(ids.trace_id(RUN.run_id, "a" * 16))
    return items.add(trace_id=trace, span_id=bytes.fromhex(span_id), name="n", start_time_unix_nano=START, **more)


def test_every_scope_s_spans_below_a_run_are_the_run_s() -> None:
    message, items = request("traces", scope="torch")
    span_of(items, "1" * 16)
    arrival = only(decode_traces(message))
    assert [type(record) for record in arrival.records] == [SpansReceived]
    assert (arrival.items, arrival.ended, arrival.started_unix_nano) == (1, None, None)


@pytest.mark.parametrize("span_id", [ids.root_span_id(RUN.run_id, "a" * 16), ids.rank_span_id(RUN.run_id, "a" * 16, 1)])
def test_the_end_of_one_rank_s_span_is_not_the_attempt_s(span_id: str) -> None:
    message, items = request("traces", {semconv.RANK: 1})
    state = KeyValue(key="tracelet.run.state", value=AnyValue(string_value="KILLED"))
    span_of(items, span_id, end_time_unix_nano=START + MS, attributes=[state])
    arrival = only(decode_traces(message))
    assert (arrival.ended, arrival.started_unix_nano) == (None, None)


def test_the_root_span_tells_the_attempt_s_end_and_no_other_span_does() -> None:
    message, items = request("traces")
    state = KeyValue(key="tracelet.run.state", value=AnyValue(string_value="KILLED"))
    span_of(items, ids.rank_span_id(RUN.run_id, "a" * 16, 1), end_time_unix_nano=START + MS, attributes=[state])
    assert only(decode_traces(message)).ended is None
    span = span_of(items, ids.root_span_id(RUN.run_id, "a" * 16), end_time_unix_nano=START + MS, attributes=[state])
    arrival = only(decode_traces(message))
    assert arrival.ended is not None
    assert (arrival.ended.status, arrival.ended.end_unix_nano) == ("KILLED", START + MS)
    exception = span.events.add(name="exception")
    exception.attributes.add(key="exception.type").value.string_value = "Boom"
    ended = only(decode_traces(message)).ended
    assert ended is not None
    assert ended.error == ErrorInfo("Boom", "", "")


# ---- strangers' bytes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", sorted(DECODERS))
@given(seed=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_damaged_requests_are_malformed_or_decoded(signal: str, seed: int) -> None:
    chance = random.Random(seed)
    made = json.loads((GOLDEN / f"{signal}.json").read_text(encoding="utf-8"))
    body = bytearray(parse(signal, json.dumps(chance.choice(made)).encode(), "application/json").SerializeToString())
    how = chance.randrange(4)
    if how == 0:
        del body[chance.randrange(len(body)) :]
    elif how == 1:
        for _ in range(chance.randrange(1, 20)):
            body[chance.randrange(len(body))] = chance.randrange(256)
    elif how == 2:
        start = chance.randrange(len(body))
        del body[start : start + chance.randrange(1, 50)]
    else:
        body = bytearray(chance.randbytes(chance.randrange(200)))
    kind = chance.choice(["application/x-protobuf", "application/json"])
    try:
        message = parse(signal, bytes(body), kind)
    except Malformed:
        return
    DECODERS[signal](message)


VALUES: list[Any] = [None, True, -1, 2**70, 1e400, "", "x", "NaN", [], {}, [1], {"stringValue": 5}, {"intValue": "x"}]


@pytest.mark.parametrize("signal", sorted(DECODERS))
@given(seed=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_json_of_wrong_types_is_malformed_or_decoded(signal: str, seed: int) -> None:
    chance = random.Random(seed)
    made = chance.choice(json.loads((GOLDEN / f"{signal}.json").read_text(encoding="utf-8")))
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            walk(value[key])

    walk(made)
    for _ in range(chance.randrange(1, 4)):
        holder, key = chance.choice(places)
        holder[key] = chance.choice(VALUES)
    try:
        message = parse(signal, json.dumps(made).encode(), "application/json")
    except Malformed:
        return
    DECODERS[signal](message)


@pytest.mark.parametrize("signal", sorted(DECODERS))
def test_a_hundred_thousand_attributes_are_only_many(signal: str) -> None:
    many = {f"attribute.{i}": i for i in range(100_000)}
    message, items = request(signal, many)
    items.add()
    if signal == "metrics":
        del items[:]
        gauge(items, "loss", (START, 0.5, 1))
    if signal == "logs":
        event(items, "tracelet.params", {f"tracelet.param.{i}": i for i in range(100_000)})
    (arrival,) = DECODERS[signal](message).arrivals
    assert len(arrival.resource) > 100_000


def test_a_deeply_nested_value_is_cut_not_fatal() -> None:
    value = AnyValue(string_value="deep")
    for _ in range(45):  # protobuf's own limit is a hundred messages in one another
        value = AnyValue(array_value=ArrayValue(values=[value]))
    (record,) = only(logs(("tracelet.params", {"tracelet.param.x": value}))).records
    assert isinstance(record, ParamsLogged)
    assert "..." in str(record.params["x"])


@pytest.mark.parametrize("kind", ["text/plain", "", "application/jsonp", "multipart/form-data"])
def test_another_content_type_is_no_fault_of_the_body(kind: str) -> None:
    with pytest.raises(ValueError, match="content type") as caught:
        parse("logs", b"{}", kind)
    assert not isinstance(caught.value, Malformed)
