"""The page of the wire contract names everything that goes on the wire."""

from __future__ import annotations

from pathlib import Path

import pytest

from tracelet.otlp import semconv

PAGE = (Path(__file__).parents[3] / "docs" / "reference" / "wire.md").read_text()
NAMES = {name: value for name, value in vars(semconv).items() if name.isupper() and isinstance(value, str)}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_on_the_wire_stands_in_the_contract(name: str) -> None:
    value = NAMES[name]
    if name == "SCHEMA_URL":
        value = value.rpartition("/")[2]
    # Names that share a beginning are listed in short: `tracelet.artifact.name`, `.uri`, ...
    short = f"`.{value.rpartition('.')[2]}`"
    assert f"`{value}" in PAGE or value in PAGE or (short in PAGE and value.startswith("tracelet.artifact.")), value


def test_every_state_stands_in_the_contract() -> None:
    assert all(f"`{state}`" in PAGE for state in semconv.STATES)


def test_the_contract_is_of_this_version() -> None:
    assert f"Version **{semconv.WIRE_VERSION}**" in PAGE


def test_user_metrics_can_not_be_mistaken_for_our_own() -> None:
    assert all(
        name.startswith("tracelet.")
        for name in (semconv.RUN_INFO, semconv.RUN_STATUS, semconv.RUN_HEARTBEAT, semconv.NONFINITE)
    )
