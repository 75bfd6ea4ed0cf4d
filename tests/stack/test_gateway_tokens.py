"""The real collector before the real gateway, with a token that won't do for a while: it keeps what it holds."""

from __future__ import annotations

from pathlib import Path

from tests.gateway_fakes import points_request
from tests.gateway_process import GatewayProcess, wait_until
from tests.stack.collectors import Collector, send

TOKENS = '[[token]]\nname = "collector"\ntoken = "{}"\nprojects = ["*"]\n'


def test_a_collectors_backlog_survives_a_wrong_token_and_arrives_once_it_is_right(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(TOKENS.format("sesame-new"))
    options = ("--tokens", str(path), "--grace", "0s")
    with (
        GatewayProcess(tmp_path / "gateway", "http://127.0.0.1:9", *options) as gateway,
        Collector(tmp_path / "collector", gateway=gateway.http, TRACELET_GATEWAY_TOKEN="sesame-old") as collector,
    ):
        bodies = [points_request(f"run-{number}", count=100).SerializeToString() for number in range(3)]
        assert set(send(collector.http, bodies)) == {200}
        wait_until(lambda: gateway.number('refused_total{reason="wrong token"}') >= 3)
        assert gateway.number("points_total") == 0
        path.write_text(TOKENS.format("sesame-new") + TOKENS.format("sesame-old"))
        wait_until(lambda: gateway.number("points_total") == 300, 90)
        assert gateway.number("repeats_total") == 0
        log = gateway.log + collector.log.read_text(errors="replace")
        assert "REFUSED (wrong token)" in log
        assert "Dropping data" not in log
        assert "sesame" not in log
