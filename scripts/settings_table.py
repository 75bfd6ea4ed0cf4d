"""Writes the table of docs/reference/settings.md from `tracelet.settings`; `--check` only says whether it is right."""

from __future__ import annotations

import sys
from pathlib import Path

from tracelet.settings import SETTINGS

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "settings.md"
BEGIN, END = "<!-- table: made by scripts/settings_table.py -->\n", "<!-- end of table -->\n"


def table() -> str:
    """The Markdown table of all settings."""
    rows = ["| variable | in code and pyproject.toml | what it is for | default |", "|---|---|---|---|"]
    for setting in SETTINGS:
        variable = f"`{setting.env}`" if setting.env else "(none)"
        rows.append(f"| {variable} | `{setting.name}` | {setting.doc} | {setting.default} |")
    return "\n".join(rows) + "\n"


def with_table(text: str) -> str:
    """The page with the table of today."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.partition(END)[2]


def main() -> int:
    """0 if the page is, or has been put, right."""
    text = PAGE.read_text()
    if "--check" in sys.argv:
        return int(with_table(text) != text)
    PAGE.write_text(with_table(text))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
