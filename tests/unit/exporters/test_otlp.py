"""The OTLP exporter against a real receiver: what arrives, and what each answer leads to."""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from tests.otlp_batches import MS, RUN, START, batch, opened, otlp_spec
from tests.sinks import HttpSink, Received, Say, attributes, certificate
from tracelet.errors import ConfigError
from tracelet.exporters.base import Delivered, Rejected, RetryLater
from tracelet.exporters.otlp import OTLPExporter
from tracelet.records import Heartbeat, ParamsLogged, RunStarted, SpanEnded, SpanStarted


@pytest.fixture
def sink() -> Iterator[HttpSink]:
    with HttpSink() as running:
        yield running


def exporter(endpoint: str | None, secrets: dict[str, Any] | None = None, **spec: Any) -> OTLPExporter:
    made = OTLPExporter(otlp_spec(endpoint, **spec), secrets or {}, os.environ)
    made.open(RUN, {})
    return made


def rows(count: int, names: int = 1) -> list[tuple[str, float, int]]:
    return [(f"m{i % names}", i / 8, i // names) for i in range(count)]


def bad_point(iteration: int, say: Say) -> Any:
    """A rule: a request with a point of this iteration gets `say`, others pass."""

    def rule(received: Received) -> Say | None:
        if received.signal != "metrics":
            return None
        inside = any(
            attributes(point).get("tracelet.iteration") == iteration
            for resource in received.message.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            for point in metric.gauge.data_points
        )
        return say if inside else None

    return rule


# ---- what arrives -----------------------------------------------------------------------------------------------


def test_points_arrive_with_their_own_time_and_iteration_in_order(sink: HttpSink) -> None:
    delivery = exporter(sink.endpoint).begin(batch(rows(1000, 3)))
    assert delivery.attempt() == Delivered()
    assert sorted(sink.points(), key=lambda p: p.time_unix_nano) == [
        (name, value, iteration, START + i * MS) for i, (name, value, iteration) in enumerate(rows(1000, 3))
    ]


def test_one_request_has_one_resource_and_one_metric_for_each_name(sink: HttpSink) -> None:
    exporter(sink.endpoint).begin(batch(rows(1000, 3), [ParamsLogged(START, {"lr": 0.1})])).attempt()
    for received in sink.stored:
        assert len(received.message.ListFields()[0][1]) == 1
    assert [metric.name for _, scope, metric in sink.metrics() if scope == "tracelet"] == ["m0", "m1", "m2"]


def test_requests_stay_below_900000_bytes(sink: HttpSink) -> None:
    exporter(sink.endpoint).begin(batch([("m" * 100, 0.5, -i) for i in range(40_000)])).attempt()
    assert len(sink.points()) == 40_000
    assert len(sink.stored) > 1
    assert max(len(received.body) for received in sink.stored) <= 900_000


def test_a_heartbeat_carries_state_and_info(sink: HttpSink) -> None:
    made = exporter(sink.endpoint)
    made.beat(batch(), Heartbeat(START, "RUNNING", START - 5 * 10**9, {"mlflow-12345678": "abc"}, START - 60 * 10**9))
    found = {
        (metric.name, attributes(p).get("tracelet.run.state")): p
        for _, _, metric in sink.metrics()
        for p in metric.gauge.data_points
    }
    assert {scope for _, scope, _ in sink.metrics()} == {"tracelet.run"}
    assert found["tracelet.run.status", "RUNNING"].as_double == 1
    assert found["tracelet.run.status", "FAILED"].as_double == 0
    assert found["tracelet.run.last_iteration.time", None].as_double == START / 1e9 - 5
    assert found["tracelet.run.start.time", None].as_double == START / 1e9 - 60
    assert found["tracelet.run.attempt.start.time", None].as_double == START / 1e9
    assert attributes(found["tracelet.run.info", None])["service.name"] == "vision"
    assert attributes(found["tracelet.run.info", None])["tracelet.mlflow.run_id"] == "abc"


@pytest.mark.parametrize("headers", [None, {"x-key": "value"}])
def test_every_request_says_which_wire_version_it_speaks(sink: HttpSink, headers: dict[str, str] | None) -> None:
    whole = [ParamsLogged(START, {"a": 1}), SpanStarted("1" * 16, "2" * 16, "s", START), SpanEnded("1" * 16, START + 1)]
    made = exporter(sink.endpoint, None if headers is None else {"headers": headers})
    assert made.begin(batch(rows(2), whole)).attempt() == Delivered()
    assert {received.signal for received in sink.stored} == {"metrics", "logs", "traces"}
    assert {received.headers["tracelet.wire.version"] for received in sink.stored} == {"1.0"}


# ---- addresses, headers, compression: as OTel's own exporters have it -------------------------------------------


def test_endpoint_and_headers_come_from_otels_variables(sink: HttpSink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", sink.endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20base,x-team=ml")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_HEADERS", "authorization=Bearer%20metrics")
    exporter(None).begin(batch(rows(2), [ParamsLogged(START, {"lr": 0.1})])).attempt()
    by_signal = {received.signal: received.headers for received in sink.stored}
    assert by_signal["metrics"]["authorization"] == "Bearer metrics"
    assert by_signal["logs"]["authorization"] == "Bearer base"
    assert by_signal["logs"]["x-team"] == "ml"


def test_a_signals_own_endpoint_is_used_as_it_is(sink: HttpSink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", f"{sink.endpoint}/elsewhere/metrics")
    assert exporter(None).begin(batch(rows(2))).attempt() == Delivered()


def test_an_argument_wins_and_the_address_of_training_time_stands_behind(
    sink: HttpSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    assert exporter(sink.endpoint + "/v1/metrics").begin(batch(rows(1))).attempt() == Delivered()
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT")
    remembered = {"OTEL_EXPORTER_OTLP_ENDPOINT": sink.endpoint + "/"}
    assert exporter(None, environment=remembered).begin(batch(rows(1))).attempt() == Delivered()


@pytest.mark.parametrize("how", ["argument", "variable", "remembered"])
def test_a_query_stays_behind_the_path(sink: HttpSink, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    at = f"{sink.endpoint}/base?token=x&b=1"
    if how == "variable":
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", at)
    made = exporter(
        at if how == "argument" else None,
        environment={"OTEL_EXPORTER_OTLP_ENDPOINT": at} if how == "remembered" else {},
    )
    assert made.begin(batch(rows(1))).attempt() == Delivered()
    assert [received.path for received in sink.stored] == ["/base/v1/metrics?token=x&b=1"]


@pytest.mark.parametrize(("compression", "smaller"), [("gzip", True), ("deflate", True), ("none", False)])
def test_compression_is_the_variables(
    sink: HttpSink, monkeypatch: pytest.MonkeyPatch, compression: str, smaller: bool
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", compression)
    exporter(sink.endpoint).begin(batch(rows(1000))).attempt()
    (received,) = sink.stored
    assert (received.size < len(received.body)) is smaller
    assert len(sink.points()) == 1000


def test_only_the_chosen_signals_leave(sink: HttpSink) -> None:
    records = [
        ParamsLogged(START, {"lr": 0.1}),
        SpanStarted("1" * 16, "2" * 16, "epoch", START),
        SpanEnded("1" * 16, START + MS),
    ]
    delivery = exporter(sink.endpoint, signals=["metrics"]).begin(batch(rows(1), records))
    assert delivery.attempt() == Delivered()
    assert [received.signal for received in sink.requests] == ["metrics"]


def test_an_unknown_protocol_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    with pytest.raises(ConfigError, match="http/json"):
        exporter(None)


# ---- answers that are not a plain yes ---------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504, 500])
def test_passing_trouble_is_tried_later_and_nothing_goes_twice(sink: HttpSink, status: int) -> None:
    delivery = exporter(sink.endpoint).begin(batch(rows(3), [ParamsLogged(START, {"lr": 0.1})]))
    sink.script.extend([Say(), Say(status, message="busy")])
    answer = delivery.attempt()
    assert isinstance(answer, RetryLater)
    assert not answer.loud
    assert "busy" in answer.reason
    assert delivery.attempt() == Delivered()
    assert [received.signal for received in sink.stored] == ["metrics", "logs"]


@pytest.mark.parametrize("status", [301, 307, 401, 403, 404, 405, 418])
def test_what_a_person_must_mend_is_loud_and_loses_nothing(sink: HttpSink, status: int) -> None:
    delivery = exporter(sink.endpoint).begin(batch(rows(3)))
    sink.script.append(Say(status, message="no", headers={"Location": "http://other.example/"}))
    answer = delivery.attempt()
    assert isinstance(answer, RetryLater)
    assert answer.loud
    assert str(status) in answer.reason
    assert delivery.attempt() == Delivered()
    assert len(sink.points()) == 3


def test_a_receiver_of_metrics_only_still_gets_the_metrics(sink: HttpSink) -> None:
    sink.rule = lambda received: Say(404) if received.signal == "traces" else None
    records = [SpanStarted("1" * 16, "2" * 16, "epoch", START), SpanEnded("1" * 16, START + MS)]
    delivery = exporter(sink.endpoint).begin(batch(rows(3), [*records, ParamsLogged(START, {"a": 1})]))
    answer = delivery.attempt()
    assert isinstance(answer, RetryLater)
    assert answer.loud
    assert {received.signal for received in sink.stored} == {"metrics", "logs"}


def test_retry_after_is_read_as_seconds_and_as_a_date(sink: HttpSink) -> None:
    import time

    delivery = exporter(sink.endpoint).begin(batch(rows(1)))
    sink.script.append(Say(503, headers={"Retry-After": "60"}))
    assert delivery.attempt() == RetryLater(f"HTTP 503 from {sink.endpoint}/v1/metrics: Service Unavailable", 60.0)
    sink.script.append(Say(429, headers={"Retry-After": formatdate(time.time() + 100, usegmt=True)}))
    answer = delivery.attempt()
    assert isinstance(answer, RetryLater)
    assert answer.after_s == pytest.approx(100, abs=5)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("text/html", b"<html>log in</html>"),
        ("text/html; charset=utf-8", b""),
        ("text/plain", b"Please log in"),
        ("text/plain; charset=utf-8", b"ok"),
        ("application/x-protobuf", b"\xff\xfe\x00garbage"),
        ("application/octet-stream", b"\xff\xfe\x00garbage"),
        ("application/json", b"not json"),
        ("application/json", b"[1, 2]"),
        ("application/json", b'"ok"'),
    ],
)
def test_a_success_in_words_that_are_not_otlp_is_no_delivery(sink: HttpSink, kind: str, body: bytes) -> None:
    delivery = exporter(sink.endpoint).begin(batch(rows(1)))
    sink.script.append(Say(200, body=body, headers={"Content-Type": kind}))
    answer = delivery.attempt()
    assert isinstance(answer, RetryLater)
    assert answer.loud
    assert "is no OTLP receiver" in answer.reason
    assert delivery.attempt() == Delivered()


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [
        (200, "application/x-protobuf", b""),
        (202, "text/plain", b""),
        (204, "", b""),
        (200, "application/json", b""),
        (200, "application/json; charset=utf-8", b"{}"),
        (200, "application/json", b'{"partialSuccess": {}, "more": 1}'),
        (200, "application/octet-stream", b""),
    ],
)
def test_a_receivers_own_success_is_one_in_each_of_its_forms(
    sink: HttpSink, status: int, kind: str, body: bytes
) -> None:
    sink.script.append(Say(status, body=body, headers={"Content-Type": kind}))
    assert exporter(sink.endpoint).begin(batch(rows(1))).attempt() == Delivered()


def test_nobody_there_and_no_answer_in_time_are_tried_later(sink: HttpSink) -> None:
    away = exporter("http://127.0.0.1:1").begin(batch(rows(1))).attempt()
    assert away == RetryLater(
        "the OTLP receiver at http://127.0.0.1:1/v1/metrics can't be reached: [Errno 111] Connection refused"
    )
    slow = exporter(sink.endpoint, timeout_s=0.2).begin(batch(rows(1)))
    sink.script.append(Say(hang_s=2.0))
    answer = slow.attempt()
    assert isinstance(answer, RetryLater)
    assert "in time" in answer.reason


def test_a_connection_that_was_reset_is_tried_again_at_once(sink: HttpSink) -> None:
    sink.script.append(Say(reset=True, keep=False))
    assert exporter(sink.endpoint).begin(batch(rows(1))).attempt() == Delivered()


def test_a_400_is_halved_to_the_point_at_fault(sink: HttpSink) -> None:
    sink.rule = bad_point(77, Say(400, message="too old sample"))
    answer = exporter(sink.endpoint).begin(batch(rows(300))).attempt()
    assert isinstance(answer, Rejected)
    (refusal,) = answer.items
    assert refusal.what == "point"
    assert "too old sample" in refusal.reason
    assert refusal.facts == {"name": "m0", "iteration": 77, "value": 77 / 8, "time_unix_nano": START + 77 * MS}
    assert sorted(p.iteration for p in sink.points()) == [i for i in range(300) if i != 77]


def test_a_413_is_halved_until_it_fits(sink: HttpSink) -> None:
    sink.rule = lambda received: Say(413) if len(received.body) > 5_000 else None
    assert exporter(sink.endpoint).begin(batch(rows(1000))).attempt() == Delivered()
    assert len(sink.points()) == 1000


def test_a_partial_success_is_located(sink: HttpSink) -> None:
    rule = bad_point(5, Say(rejected=1, message="duplicate"))
    sink.rule = rule
    answer = exporter(sink.endpoint).begin(batch(rows(40))).attempt()
    assert isinstance(answer, Rejected)
    (refusal,) = answer.items
    assert (refusal.facts["iteration"], refusal.reason) == (5, "duplicate")


def test_of_a_partial_success_that_can_not_be_located_every_value_is_kept(sink: HttpSink) -> None:
    sink.script.append(Say(rejected=3, message="sampled"))
    sink.rule = lambda _: Say(rejected=1)
    answer = exporter(sink.endpoint).begin(batch(rows(40))).attempt()
    assert isinstance(answer, Rejected)
    (refusal,) = answer.items
    assert (refusal.what, refusal.reason) == ("point", "sampled (not said which)")
    assert (refusal.facts["count"], refusal.facts["of"]) == (3, 40)
    assert refusal.facts["items"] == [
        {"name": "m0", "iteration": i, "value": i / 8, "time_unix_nano": START + i * MS} for i in range(40)
    ]


def test_a_warning_without_a_rejection_is_no_refusal(sink: HttpSink) -> None:
    sink.script.append(Say(message="deprecated"))
    assert exporter(sink.endpoint).begin(batch(rows(1))).attempt() == Delivered()


def test_a_500_that_repeats_while_others_pass_is_pinned_on_its_point(sink: HttpSink) -> None:
    sink.rule = bad_point(3, Say(500, message="no letter"))
    delivery = exporter(sink.endpoint).begin(batch(rows(8)))
    answers = [delivery.attempt() for _ in range(5)]
    assert all(isinstance(answer, RetryLater) for answer in answers[:4])
    assert isinstance(answers[4], Rejected)
    assert [item.facts["iteration"] for item in answers[4].items] == [3]
    assert {p.iteration for p in sink.points()} == set(range(8)) - {3}  # controls repeat what passed


def test_a_server_that_answers_500_to_everything_loses_nothing(sink: HttpSink) -> None:
    sink.rule = lambda _: Say(500)
    delivery = exporter(sink.endpoint).begin(batch(rows(8)))
    for _ in range(20):
        assert isinstance(delivery.attempt(), RetryLater)
    sink.rule = None
    assert delivery.attempt() == Delivered()
    assert len(sink.points()) == 8


def test_a_server_that_dies_while_a_request_is_looked_into_loses_nothing(sink: HttpSink) -> None:
    for healthy in range(1, 12):
        poison = bad_point(3, Say(500))
        sink.requests.clear()
        sink.stored.clear()
        sink.rule = poison
        delivery = exporter(sink.endpoint).begin(batch(rows(8)))
        for _ in range(4):
            delivery.attempt()
        answered = len(sink.requests) + healthy

        def dying(received: Received, poison: Any = poison, answered: int = answered) -> Say | None:
            return Say(500) if len(sink.requests) > answered else poison(received)

        sink.rule = dying
        for _ in range(10):
            answer = delivery.attempt()
        refused = answer.items if isinstance(answer, Rejected) else ()
        assert {item.facts["iteration"] for item in refused} <= {3}
        sink.rule = None
        delivery.attempt()
        assert {p.iteration for p in sink.points()} >= set(range(8)) - {3}


def test_a_lone_point_with_500_is_given_up_only_when_others_are_answered(sink: HttpSink) -> None:
    sink.rule = bad_point(0, Say(500))
    made = exporter(sink.endpoint)
    delivery = made.begin(batch(rows(1)))
    for _ in range(10):
        assert isinstance(delivery.attempt(), RetryLater)
    made.beat(batch(), Heartbeat(START, "RUNNING", None, {}))
    assert isinstance(delivery.attempt(), Rejected)


# ---- repeats ----------------------------------------------------------------------------------------------------


def test_a_repeat_after_a_restart_is_the_same_bytes(sink: HttpSink) -> None:
    first = exporter(sink.endpoint)
    early = [SpanStarted("1" * 16, "2" * 16, "epoch", START), RunStarted(START, "r", {}, {})]
    first.begin(batch([("loss", float("nan"), 0)], early)).attempt()
    memory = first.memory()
    late = batch([("loss", float("inf"), 1)], [SpanEnded("1" * 16, START + MS)], number=2, start=START + 10 * MS)
    delivery = first.begin(late)
    delivery.attempt()
    sent = {received.body for received in sink.requests[-3:]}
    # The ledger may have been kept before or after the batch; the note makes both the same.
    for kept in (memory, first.memory()):
        sink.requests.clear()
        second = OTLPExporter(otlp_spec(sink.endpoint), {}, os.environ)
        second.open(RUN, kept)
        assert second.begin(late, delivery.note).attempt() == Delivered()
        assert {received.body for received in sink.requests} == sent
        assert second.memory()["nonfinite"] == {"instance-0": {"loss": [2, START + 10 * MS]}}


def test_a_span_that_began_before_a_restart_ends_after_it(sink: HttpSink) -> None:
    first = exporter(sink.endpoint)
    begun = SpanStarted("1" * 16, "2" * 16, "epoch", START, {"n": 1})
    first.begin(batch((), [begun])).attempt()
    second = OTLPExporter(otlp_spec(sink.endpoint), {}, os.environ)
    second.open(RUN, first.memory())
    second.begin(batch((), [SpanEnded("1" * 16, START + MS)], number=2)).attempt()
    (span,) = sink.spans()
    assert (span.name, span.start_time_unix_nano, span.end_time_unix_nano) == ("epoch", START, START + MS)


# ---- secrets and instrumentation --------------------------------------------------------------------------------


def test_no_secret_is_in_an_answer_or_a_log(
    sink: HttpSink, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer hunter2,hunter2-without-a-name")
    made = exporter(sink.endpoint, {"headers": {"X-Key": "topsecret"}})
    sink.script.append(Say(403, message="Bearer hunter2 with topsecret is not allowed"))
    with caplog.at_level(logging.DEBUG):
        answer = made.begin(batch(rows(1))).attempt()
    assert isinstance(answer, RetryLater)
    assert sink.requests[0].headers["x-key"] == "topsecret"
    for text in (answer.reason, caplog.text):
        assert "hunter2" not in text
        assert "topsecret" not in text
    address = exporter(None, {"endpoint": "http://me:hunter2@127.0.0.1:1"}).begin(batch(rows(1))).attempt()
    assert isinstance(address, RetryLater)
    assert "hunter2" not in address.reason


def test_a_header_that_is_not_legal_is_said_without_its_value(sink: HttpSink) -> None:
    answer = exporter(sink.endpoint, {"headers": {"x-key": "hunter2\nhunter3"}}).begin(batch(rows(1))).attempt()
    assert isinstance(answer, RetryLater)
    assert answer.loud
    assert "hunter" not in answer.reason


def test_a_missing_certificate_file_is_named(sink: HttpSink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", "/nowhere/ca.pem")
    answer = exporter("https://127.0.0.1:1").begin(batch(rows(1))).attempt()
    assert isinstance(answer, RetryLater)
    assert answer.loud
    assert "/nowhere/ca.pem" in answer.reason


def test_tls_with_the_variables_certificate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    public, key = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(public, key)
    # A machine-wide bundle must not win over the certificate that was named for OTLP.
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(public))
    with HttpSink(context) as secure:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", secure.endpoint)
        other = tmp_path / "other"
        other.mkdir()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", str(certificate(other)[0]))
        refused = exporter(None).begin(batch(rows(1))).attempt()
        assert isinstance(refused, RetryLater)
        assert refused.loud
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(other / "cert.pem"))
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", str(public))
        assert exporter(None).begin(batch(rows(1))).attempt() == Delivered()


def test_a_credential_provider_signs_what_we_send(
    sink: HttpSink, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "provider_of_a_test.py").write_text(
        "import requests\n\n\ndef session():\n    made = requests.Session()\n"
        "    made.headers['x-signed'] = 'yes'\n    return made\n"
    )
    installed = tmp_path / "provider_of_a_test-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: provider-of-a-test\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(
        "[opentelemetry_otlp_credential_provider]\nof_a_test = provider_of_a_test:session\n"
    )
    monkeypatch.setenv("OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER", "of_a_test")
    missing = exporter(sink.endpoint).begin(batch(rows(1))).attempt()
    assert isinstance(missing, RetryLater)
    assert "of_a_test" in missing.reason
    monkeypatch.syspath_prepend(tmp_path)
    assert exporter(sink.endpoint).begin(batch(rows(1))).attempt() == Delivered()
    assert sink.stored[0].headers["x-signed"] == "yes"


def test_our_own_posts_are_not_instrumented(sink: HttpSink) -> None:
    from opentelemetry import context

    seen: list[object] = []
    made = exporter(sink.endpoint)
    made.begin(batch(rows(1))).attempt()
    relay = made._senders["metrics"]._relay  # type: ignore[attr-defined]
    post = relay._post

    def look(*given: Any) -> Any:
        seen.append(context.get_value(context._SUPPRESS_INSTRUMENTATION_KEY))
        return post(*given)

    relay._post = look
    made.begin(batch(rows(1))).attempt()
    assert seen == [True]
    assert context.get_value(context._SUPPRESS_INSTRUMENTATION_KEY) is None


def test_an_sdk_that_ignores_its_session_is_noticed(sink: HttpSink) -> None:
    made = exporter(sink.endpoint)
    made.begin(batch(rows(1))).attempt()
    made._senders["metrics"]._exporter.export = lambda _: None  # type: ignore[attr-defined]
    answer = made.begin(batch(rows(1))).attempt()
    assert isinstance(answer, RetryLater)
    assert answer.loud


def test_changed_certificate_files_are_read_again(
    sink: HttpSink, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "ca.pem"
    file.write_text("first")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", str(file))
    made = exporter(sink.endpoint)
    delivery = made.begin(batch(rows(1)))
    sink.script.extend([Say(503), Say(503)])
    delivery.attempt()
    before = made._senders["metrics"]
    file.write_text("the second one")
    delivery.attempt()
    assert "metrics" not in made._senders
    assert delivery.attempt() == Delivered()
    assert made._senders["metrics"] is not before


def test_closing_twice_and_a_child_rank_are_fine(sink: HttpSink) -> None:
    made = exporter(sink.endpoint)
    assert made.begin(batch(rows(1), opening=opened(rank=3))).attempt() == Delivered()
    made.close()
    made.close()
