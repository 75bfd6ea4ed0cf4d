"""The page of settings says what the table of settings says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tracelet.gateway.options import GATEWAY_SETTINGS
from tracelet.settings import SETTINGS, Setting

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "settings.md"
GATEWAY_PAGE = PAGE.with_name("gateway.md")


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_setting_stands_on_its_page_with_name_variable_default_and_use(setting: Setting) -> None:
    rows = [line for line in PAGE.read_text().splitlines() if f"| `{setting.name}` |" in line]
    assert len(rows) == 1
    variable, _, use, default = (cell.strip() for cell in rows[0].strip("|").split("|"))
    assert variable == (f"`{setting.env}`" if setting.env is not None else "(none)")
    assert (use, default) == (setting.doc, setting.default)


def test_the_page_has_no_row_for_a_setting_that_is_gone() -> None:
    names = {f"| `{setting.name}` |" for setting in SETTINGS}
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith(("| `TRACELET_", "| (none)"))]
    assert [row for row in rows if not any(name in row for name in names)] == []


def test_the_gateways_page_has_exactly_its_settings_with_variable_option_default_and_use() -> None:
    rows = [line for line in GATEWAY_PAGE.read_text().splitlines() if line.startswith("| `TRACELET_")]
    found = [tuple(cell.strip() for cell in row.strip("|").split("|")) for row in rows]
    options = [f"`--{setting.name.replace('prefixes', 'prefix').replace('_', '-')}`" for setting in GATEWAY_SETTINGS]
    assert found == [
        (f"`{setting.env}`", option, setting.doc, setting.default)
        for setting, option in zip(GATEWAY_SETTINGS, options, strict=True)
    ]
