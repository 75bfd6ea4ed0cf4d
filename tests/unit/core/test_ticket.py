"""What of an attempt travels to another process, and what has to stay."""

from __future__ import annotations

import pickle
from threading import Lock

from tracelet.core.ticket import Ticket

OTLP = {"id": "otlp-1", "kind": "otlp", "spec": {}}
LIVE = {"id": "live-1", "kind": "live", "spec": {}, "in_process": True}


def ticket(secrets: dict[str, dict[str, object]]) -> Ticket:
    return Ticket(
        folder="/spool/run/host-1",
        run_id="run",
        attempt_key="a" * 16,
        attempt_started_unix_nano=1,
        attempt_number=1,
        rank=0,
        leaves_out=False,
        alone=True,
        resource={"tracelet.run.attempt.order": 1},
        destinations=(OTLP, LIVE),
        shipper="process",
        max_bytes=None,
        grace_s=25.0,
        environ={"OTEL_EXPORTER_OTLP_HEADERS": "Authorization=s3cret"},
        secrets=secrets,
    )


def test_neither_secrets_nor_environment_nor_an_exporter_object_travel() -> None:
    made = ticket({"otlp-1": {"headers": {"a": "s3cret"}}, "live-1": {"exporter": Lock()}})
    sent = pickle.dumps(made.without_secrets())
    assert b"s3cret" not in sent
    assert pickle.loads(sent).secrets_left_out


def test_an_exporter_object_that_stays_behind_keeps_no_worker_from_starting_a_shipper() -> None:
    assert not ticket({"live-1": {"exporter": Lock()}}).without_secrets().secrets_left_out
