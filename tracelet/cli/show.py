"""`tracelet show RUN`: everything the spool knows of one run, delivered segments included while they are kept."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tracelet import codec
from tracelet.cli.deadletters import piles_of
from tracelet.cli.facts import Facts, look
from tracelet.cli.find import add_dir, all_runs, root, select, short_ids
from tracelet.cli.runs import as_json, waiting
from tracelet.cli.text import age, count, instant, number, plain, size, table
from tracelet.errors import SpoolError
from tracelet.records import (
    ArtifactLogged,
    MetricNamed,
    ParamsLogged,
    PointBatch,
    SpanEnded,
    SpanStarted,
    TagsSet,
    WriterEnded,
)
from tracelet.spool import store
from tracelet.spool.reader import START, SpoolReader

__all__ = ["EXAMPLES", "add", "run"]

EXAMPLES = """\
  tracelet show 1f0c64ab
  tracelet show nightly --json | jq '.[0].metrics.loss.last'"""

_AT_ONCE = 1 << 16
_REFUSED_SHOWN = 5


@dataclass
class Metric:
    """A metric as the spool still has it."""

    count: int = 0
    value: float = math.nan
    iteration: int = 0
    time_unix_nano: int = -1


@dataclass
class Content:
    """What stands in a folder's files."""

    metrics: dict[str, Metric] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, int] = field(default_factory=dict)  # path -> bytes
    phases: dict[str, tuple[SpanStarted, SpanEnded | None]] = field(default_factory=dict)  # by span id
    ends: list[WriterEnded] = field(default_factory=list)
    writers: int = 0
    damaged: int = 0


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Make the parser of this command."""
    command = commands.add_parser(
        "show",
        help="show all that is known of one run",
        description="Shows one run: its attempts, its destinations with their addresses, what waits, its params and"
        " tags, each metric with its last value, and what a destination refused. Metrics are read from the run's files,"
        " delivered ones included; of segments that TRACELET_KEEP has deleted nothing is left to count.",
        allow_abbrev=False,
    )
    command.add_argument(
        "wanted", metavar="RUN", help="the beginning of a run's id, its name, or the path of its folder"
    )
    add_dir(command)
    command.add_argument("--json", action="store_true", help="print a JSON array, an object for each host and boot")
    return command


def run(args: argparse.Namespace) -> int:
    """Print the run, once for each host and boot it has a folder of."""
    spool = root(args)
    entries = select(spool, args.wanted)
    ids = short_ids(all_runs(spool))
    found = [(look(entry), read(entry.folder)) for entry in entries]
    if args.json:
        print(json.dumps([_json(facts, content) for facts, content in found], indent=2))
    else:
        print("\n\n".join(render(facts, content, ids.get(facts.run_id, facts.run_id)) for facts, content in found))
    return 0


def read(folder: Path) -> Content:
    """Read all files of a run's folder. Cost: all of them, 32 bytes a point."""
    content = Content()
    reader = SpoolReader(folder)
    try:
        for writer in reader.writers():
            content.writers += 1
            names = _frames(reader, writer, content)
            position = START
            while True:
                # `dead`: a slot still in flight is passed over; nothing is delivered from here.
                ranges, after = reader.poll(writer, position, _AT_ONCE, dead=True)
                for piece in ranges:
                    taken = reader.read(piece)
                    content.damaged += sum(damage.end - damage.first for damage in taken.damaged)
                    _points(PointBatch.from_records(taken.records, names), content)
                if not ranges and after == position:
                    break
                position = after
        content.damaged += reader.damaged_frames
    finally:
        reader.close()
    return content


def _frames(reader: SpoolReader, writer: str, content: Content) -> Mapping[int, str]:
    names: dict[int, str] = {}
    for kind, payload in reader.scan_frames(writer):
        try:
            record = codec.decode(kind, payload)
        except SpoolError:
            content.damaged += 1
            continue
        match record:
            case MetricNamed():
                names[record.metric_id] = record.name
            case ParamsLogged():
                content.params.update(record.params)
            case TagsSet():
                content.tags.update(record.tags)
            case ArtifactLogged():
                content.artifacts[record.path] = record.size
            case SpanStarted():
                content.phases[record.span_id] = (record, None)
            case SpanEnded():
                begun = content.phases.get(record.span_id)
                if begun is not None:
                    content.phases[record.span_id] = (begun[0], record)
            case WriterEnded(status=str()):
                content.ends.append(record)
    return names


def _points(batch: PointBatch, content: Content) -> None:
    columns = zip(batch.metric_ids, batch.values, batch.iterations, batch.time_unix_nano, strict=True)
    for metric_id, value, iteration, time_unix_nano in columns:
        name = batch.names.get(metric_id, f"(id {metric_id}, its name is damaged)")
        metric = content.metrics.get(name)
        if metric is None:
            metric = content.metrics[name] = Metric()
        metric.count += 1
        if time_unix_nano >= metric.time_unix_nano:
            metric.value, metric.iteration, metric.time_unix_nano = value, iteration, time_unix_nano


# ---- as text -----------------------------------------------------------------------------------------------------


def render(facts: Facts, content: Content, short: str) -> str:
    """The run as a person reads it."""
    manifest = facts.manifest
    head = [
        ["run", facts.run_id],
        ["name", plain(facts.title, 100)],
        ["state", _state(facts, content)],
        ["folder", f"{facts.folder} ({size(store.usage(facts.folder))})"],
        ["host", f"{manifest.host}, boot {manifest.boot_id}" if manifest else "?"],
        ["writers", f"{content.writers}, {len(facts.alive)} alive"],
        ["shipper", _shipper(facts)],
        ["waiting", waiting(facts)],
    ]
    if facts.problem is not None:
        head.append(["problem", facts.problem])
    if content.damaged:
        head.append(["damaged", f"{count(content.damaged, 'slot')} or frames can't be read; the rest is whole"])
    parts = [table(head)]
    parts.extend(_attempts(manifest) if manifest else ())
    parts.extend(_destinations(facts))
    parts.extend(_refused(facts))
    parts.extend(_mapping("Params", content.params))
    parts.extend(_mapping("Tags", content.tags))
    parts.extend(_mapping("Artifacts", {path: size(bytes_) for path, bytes_ in content.artifacts.items()}))
    parts.extend(_phases(content))
    parts.extend(_metrics(content))
    if facts.waits and facts.shipper_pid is None:
        to = "" if facts.destinations else " --to mlflow   # or otlp: it was logged without a destination"
        parts.append(f"To deliver what waits: tracelet ship {short}{to}")
    if any(pile.ready for pile in piles_of(facts)):
        parts.append(f"To send what was refused once more: tracelet ship --dead-letters {short}")
    return "\n\n".join(parts)


def _state(facts: Facts, content: Content) -> str:
    if content.ends and facts.state not in ("RUNNING",) and not facts.state.isupper():
        end = content.ends[-1]
        return f"{facts.state} (its own last word: {end.status}, {instant(end.time_unix_nano)})"
    return facts.state


def _shipper(facts: Facts) -> str:
    if facts.shipper_pid is None:
        return "none"
    return f"at work, pid {facts.shipper_pid}" if facts.shipper_pid > 0 else "at work, in another container"


def _attempts(manifest: store.Manifest) -> Iterator[str]:
    rows = []
    for position, attempt in enumerate(sorted(manifest.attempts, key=lambda a: a.order), 1):
        ended = attempt.ended
        words = "not decided yet"
        if ended is not None:
            took = (ended["end_unix_nano"] - attempt.started_unix_nano) / 1e9
            words = f"{ended['status']} after {age(took)}"
            if ended.get("exit_code") is not None:
                words += f", exit code {ended['exit_code']}"
            error = ended.get("error")
            if error:
                words += f": {error['type']}: {plain(error['message'])}"
        rows.append([str(position), instant(attempt.started_unix_nano), f"pid {attempt.pid}", words])
    if rows:
        yield "Attempts\n" + table(rows, indent="  ", right="r")


def _destinations(facts: Facts) -> Iterator[str]:
    if not facts.destinations:
        yield "Destinations\n  none"
        return
    rows = []
    for d in facts.destinations:
        left = "has all" if not d.waits else f"{d.waiting:,} wait" if d.waiting else "the end waits"
        served = "by the program itself" if d.in_process else left
        rows.append(
            [d.id, d.address, f"{d.delivered:,} delivered", served, f"{d.refused:,} refused" if d.refused else ""]
        )
    lines = ["Destinations", table(rows, indent="  ", right="llr")]
    for d in facts.destinations:
        if d.memory.get("link"):
            lines.append(f"  in {d.kind}: {d.memory['link']}")
        left_out = d.memory.get("left_out", {})
        if any(left_out.values()):
            words = {"too_old": "too old", "ahead": "ahead of the clock", "dense": "without a millisecond of their own"}
            said = ", ".join(f"{left_out[name]:,} {why}" for name, why in words.items() if left_out.get(name))
            lines.append(f"  not sent to {d.id}: {said} (`tracelet export` has them)")
    yield "\n".join(lines)


def _refused(facts: Facts) -> Iterator[str]:
    for pile in piles_of(facts):
        letters = pile.letters.waiting()
        last = letters[-_REFUSED_SHOWN:]
        rows = [[instant(x.time_unix_nano), x.what, plain(x.line.get("reason"), 100)] for x in last]
        title = f"Refused by {pile.letters.destination}: {len(letters):,} wait, the last {len(last)}"
        notes = [f"  {count(number, 'line')} can't be sent again: {why}" for why, number in pile.stays.items()]
        yield "\n".join([f"{title} (all in {pile.letters.path})", table(rows, indent="  "), *notes])


def _mapping(title: str, content: Mapping[str, Any]) -> Iterator[str]:
    if content:
        rows = [[plain(name), plain(value)] for name, value in list(content.items())[:20]]
        more = f"\n  ... and {len(content) - 20:,} more" if len(content) > 20 else ""
        yield f"{title} ({len(content):,})\n" + table(rows, indent="  ") + more


def _phases(content: Content) -> Iterator[str]:
    """The phases of the run, the last twenty; one that never ended is where a killed run died."""
    if not content.phases:
        return
    rows = []
    for started, ended in list(content.phases.values())[-20:]:
        took = "not ended" if ended is None else age((ended.end_unix_nano - started.start_unix_nano) / 1e9)
        error = ended.error if ended is not None else None
        words = f"{error.type}: {plain(error.message)}" if error is not None else ""
        rows.append([plain(started.name), instant(started.start_unix_nano), took, words])
    yield f"Phases ({len(content.phases):,})\n" + table(rows, indent="  ")


def _metrics(content: Content) -> Iterator[str]:
    if content.metrics:
        rows: Sequence[Sequence[str]] = [
            [
                plain(name),
                f"{metric.count:,}",
                number(metric.value),
                f"{metric.iteration:,}",
                instant(metric.time_unix_nano),
            ]
            for name, metric in sorted(content.metrics.items())
        ]
        header = ["  name", "points", "last value", "at iteration", "logged"]
        yield f"Metrics ({len(rows):,})\n" + table(
            [["  " + row[0], *row[1:]] for row in rows], header=header, right="lrrr"
        )


def _json(facts: Facts, content: Content) -> dict[str, Any]:
    manifest = facts.manifest
    return {
        **as_json(facts),
        "attempts": [
            {"key": a.key, "started_unix_nano": a.started_unix_nano, "pid": a.pid, "rank": a.rank, "ended": a.ended}
            for a in (manifest.attempts if manifest else ())
        ],
        "params": content.params,
        "tags": content.tags,
        "artifacts": content.artifacts,
        "metrics": {
            name: {
                "count": m.count,
                "last": m.value if math.isfinite(m.value) else str(m.value),  # JSON has no NaN
                "iteration": m.iteration,
                "time_unix_nano": m.time_unix_nano,
            }
            for name, m in sorted(content.metrics.items())
        },
        "phases": [
            {
                "name": started.name,
                "start_unix_nano": started.start_unix_nano,
                "end_unix_nano": None if ended is None else ended.end_unix_nano,
                "error": None if ended is None or ended.error is None else ended.error.type,
            }
            for started, ended in content.phases.values()
        ],
        "damaged": content.damaged,
        "dead_letters": {
            pile.letters.destination: {"ready": len(pile.ready), "stay": dict(pile.stays)} for pile in piles_of(facts)
        },
    }
