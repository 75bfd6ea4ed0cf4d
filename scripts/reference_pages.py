"""Writes what pages take from elsewhere (settings, commands, decisions); `--check` only says if it is right."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tracelet.cli.main import EXIT_CODES, parser
from tracelet.gateway.options import GATEWAY_SETTINGS
from tracelet.settings import SETTINGS

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- made by scripts/reference_pages.py -->\n", "<!-- end of what is made -->\n"


def settings() -> str:
    """The table of all settings."""
    rows = ["| variable | in code and pyproject.toml | what it is for | default |", "|---|---|---|---|"]
    for setting in SETTINGS:
        variable = f"`{setting.env}`" if setting.env else "(none)"
        rows.append(f"| {variable} | `{setting.name}` | {setting.doc} | {setting.default} |")
    return "\n".join(rows) + "\n"


def gateway_settings() -> str:
    """The table of the gateway's own settings."""
    rows = ["| variable | option | what it is for | default |", "|---|---|---|---|"]
    for setting in GATEWAY_SETTINGS:
        option = f"--{setting.name.replace('prefixes', 'prefix').replace('_', '-')}"
        rows.append(f"| `{setting.env}` | `{option}` | {setting.doc} | {setting.default} |")
    return "\n".join(rows) + "\n"


def commands() -> str:
    """A section for each command, as its `--help` has it, and the exit codes."""
    os.environ["COLUMNS"] = "100"  # argparse wraps its help at the terminal's width
    parts = []
    for action in parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                help_text = command.format_help().strip()
                parts.append(f"## tracelet {name}\n\n```text\n{help_text}\n```\n")
    rows = ["| exit code | meaning |", "|---|---|", *(f"| {code} | {text} |" for code, text in EXIT_CODES.items())]
    return "\n".join(parts) + "\n## Exit codes\n\n" + "\n".join(rows) + "\n"


def decisions() -> str:
    """A line for each decision, from its heading."""
    rows = ["| | decision |", "|---|---|"]
    for page in sorted((DOCS / "decisions").glob("[0-9]*.md")):
        number, _, title = page.read_text().splitlines()[0].removeprefix("# ").partition(" ")
        number = number.removesuffix(":")
        rows.append(f"| [{number}]({page.name}) | {title} |")
    return "\n".join(rows) + "\n"


def with_made(text: str, made: str) -> str:
    """The page with what is made today."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + "\n" + made + "\n" + END + rest.partition(END)[2]


def main() -> int:
    """0 if the pages are, or have been put, right."""
    wrong = 0
    pages = {
        "reference/settings.md": settings(),
        "reference/gateway.md": gateway_settings(),
        "reference/commands.md": commands(),
        "decisions/index.md": decisions(),
    }
    for name, made in pages.items():
        page = DOCS / name
        text = page.read_text()
        new = with_made(text, made)
        if new != text:
            wrong = 1
            if "--check" not in sys.argv:
                page.write_text(new)
    return wrong if "--check" in sys.argv else 0


if __name__ == "__main__":
    raise SystemExit(main())
