"""How the commands write: aligned columns, numbers, sizes, ages and times a person reads at a glance."""

from __future__ import annotations

import time
from collections.abc import Sequence

__all__ = ["age", "count", "instant", "number", "plain", "size", "table"]


def table(rows: Sequence[Sequence[str]], *, header: Sequence[str] = (), right: str = "", indent: str = "") -> str:
    """Columns as wide as their widest cell, two spaces apart; the last one is not padded.

    `right` has an `r` for each column that is aligned to the right, as in "llr".

    Examples:
        >>> from tracelet.cli.text import table
        >>> print(table([["loss", "1,200"], ["accuracy", "30"]], right="lr"))
        loss      1,200
        accuracy     30
    """
    lines = [list(header), *map(list, rows)] if header else [list(row) for row in rows]
    widths: list[int] = []
    for line in lines:
        for column, cell in enumerate(line):
            if column == len(widths):
                widths.append(0)
            widths[column] = max(widths[column], len(cell))
    out = []
    for line in lines:
        cells = [
            cell.rjust(widths[column]) if right[column : column + 1] == "r" else cell.ljust(widths[column])
            for column, cell in enumerate(line)
        ]
        out.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(out)


def count(number_of: int, one: str, many: str | None = None) -> str:
    """A number and its noun.

    Examples:
        >>> from tracelet.cli.text import count
        >>> count(1, "point"), count(12345, "point"), count(2, "entry", "entries")
        ('1 point', '12,345 points', '2 entries')
    """
    return f"{number_of:,} {one if number_of == 1 else many or one + 's'}"


def number(value: float) -> str:
    """A metric's value in at most about ten characters.

    Examples:
        >>> from tracelet.cli.text import number
        >>> number(0.1), number(float("nan")), number(1234567.0), number(2 / 3)
        ('0.1', 'nan', '1234567', '0.666667')
    """
    return f"{value:.7g}" if abs(value) >= 1e5 else f"{value:.6g}"


def size(number_of_bytes: float) -> str:
    """Bytes with a unit, in powers of 1000 as `TRACELET_KEEP` has them.

    Examples:
        >>> from tracelet.cli.text import size
        >>> size(0), size(999), size(1048576), size(2_000_000_000)
        ('0 B', '999 B', '1.0 MB', '2.0 GB')
    """
    if number_of_bytes < 1000:
        return f"{int(number_of_bytes)} B"
    for unit in ("kB", "MB", "GB", "TB"):
        number_of_bytes /= 1000
        if number_of_bytes < 999.95 or unit == "TB":
            return f"{number_of_bytes:.1f} {unit}"
    raise AssertionError("unreachable")


def age(seconds: float) -> str:
    """How long something takes or took, in its two largest units.

    Examples:
        >>> from tracelet.cli.text import age
        >>> age(0.4), age(75), age(7260), age(200000), age(604800)
        ('0 s', '1 min 15 s', '2 h 1 min', '2 d 7 h', '7 d')
    """
    whole = max(0, int(seconds))
    parts = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if whole >= length:
            parts.append((f"{whole // length} {unit}", length))
            whole %= length
    if not parts:
        return "0 s"
    near = [text for text, length in parts[:2] if parts[0][1] <= 60 * length]
    return " ".join(near)


def instant(time_unix_nano: int) -> str:
    """Date and time of day on this machine's clock, as in `2026-03-01 14:07:31`."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_unix_nano / 1e9))


def plain(text: object, longest: int = 60) -> str:
    """Text from elsewhere (a name, a server's words) on one line, without control characters, cut with `...`.

    Examples:
        >>> from tracelet.cli.text import plain
        >>> plain("two\\nlines\\x1b[31m"), plain("x" * 70, 10)
        ('two lines?[31m', 'xxxxxxx...')
    """
    line = " ".join(str(text).split())
    # A metric's name may hold an escape sequence; a terminal must not obey it.
    line = "".join(character if character.isprintable() else "?" for character in line)
    return line if len(line) <= longest else line[: longest - 3] + "..."
