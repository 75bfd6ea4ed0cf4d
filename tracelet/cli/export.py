"""`tracelet export RUN`: a run's points as a file, for Prometheus (OpenMetrics), or for other programs (JSON, CSV)."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tracelet import settings
from tracelet.cli.find import UsageError, add_dir, select
from tracelet.cli.text import count

if TYPE_CHECKING:
    from tracelet.cli.export_openmetrics import Counts
    from tracelet.cli.export_rows import Rows

__all__ = ["EXAMPLES", "add", "run"]

EXAMPLES = """\
  tracelet export 1f0c64ab --format openmetrics -o run.om
  tracelet export nightly --format csv -o nightly.csv"""

FORMATS = ("openmetrics", "jsonl", "csv")
PROMOTED = ("host.name",)
"""Attributes of the Resource that collector-config/prometheus/prometheus.yaml makes labels of."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Make the parser of this command."""
    command = commands.add_parser(
        "export",
        help="write a run's points into a file",
        description="Writes the points of a run that the spool still has, delivered ones included, in order of time."
        " openmetrics is for `promtool tsdb create-blocks-from openmetrics`, which makes blocks for Prometheus of runs"
        " that are too old to be sent: series have the names and labels that they would have had. Needs 28 bytes a"
        " point for a temporary file, and little memory.",
        allow_abbrev=False,
    )
    command.add_argument(
        "wanted", metavar="RUN", help="the beginning of a run's id, its name, or the path of its folder"
    )
    add_dir(command)
    command.add_argument("--format", choices=FORMATS, default="jsonl", help="what to write (default: jsonl)")
    command.add_argument("-o", "--output", metavar="FILE", help="where to (default: standard output)")
    command.add_argument(
        "--prefix", help="openmetrics: what names begin with (default: the setting TRACELET_METRIC_PREFIX)"
    )
    command.add_argument(
        "--promote",
        metavar="ATTRIBUTE",
        action="append",
        help="openmetrics: an attribute of the Resource that your Prometheus makes a label of"
        f" (promote_resource_attributes; default: {', '.join(PROMOTED)}, as in the shipped prometheus.yaml; none: '')",
    )
    return command


def run(args: argparse.Namespace) -> int:
    """Write the points; what was left out is said on standard error."""
    # Here, since the other commands have no use for what it takes (numpy).
    from tracelet.cli.export_openmetrics import Counts, lines
    from tracelet.cli.export_rows import Rows

    resolved = settings.from_process({"dir": args.dir, "metric_prefix": args.prefix})
    entries = select(resolved.dir, args.wanted)
    rows, counts = Rows(entries), Counts()
    if args.output is not None and Path(args.output).is_dir():
        raise UsageError(f"--output {args.output} is a folder: name a file", path=args.output)
    with _opened(args.output) as out:
        if args.format == "openmetrics":
            promoted = [name for name in (PROMOTED if args.promote is None else args.promote) if name]
            for line in lines(rows, rows.series, resolved.metric_prefix, promoted, counts):
                out.write(line)
        else:
            _write_plain(rows, out, args.format, counts)
    said = [count(counts.points, "point")]
    if counts.dense:
        said.append(f"{counts.dense:,} left out: logged too fast for a millisecond of their own")
    if counts.twice:
        said.append(f"{counts.twice:,} left out: another of the series has that millisecond")
    if rows.damaged:
        said.append(f"{rows.damaged:,} slots or frames can't be read")
    print(f"tracelet export: {'; '.join(said)}", file=sys.stderr)
    return 0


def _write_plain(rows: Rows, out: TextIO, form: str, counts: Counts) -> None:
    from tracelet.cli.export_openmetrics import plain_row

    writer = csv.writer(out, lineterminator="\n")
    for row in rows:
        plain = dict(plain_row(row, rows.series))
        if form == "csv":
            if not counts.points:
                writer.writerow(plain)
            writer.writerow(plain.values())
        else:
            if not math.isfinite(row[2]):
                plain["value"] = str(row[2])  # JSON has no word for them
            out.write(json.dumps(plain, ensure_ascii=False) + "\n")
        counts.points += 1


@contextmanager
def _opened(path: str | None) -> Iterator[TextIO]:
    """Standard output, or a file that has its name only once it is whole."""
    if path is None:
        yield sys.stdout
        return
    part = f"{path}.part"
    try:
        with open(part, "w", encoding="utf-8", errors="backslashreplace", newline="") as out:
            yield out
        os.replace(part, path)
    except BaseException:
        if os.path.exists(part):
            os.unlink(part)
        raise
