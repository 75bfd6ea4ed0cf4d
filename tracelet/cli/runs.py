"""`tracelet runs`: a line for each run this machine knows: its state, its points, who has them, what waits."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tracelet.cli.facts import RUNNING, Destination, Facts, look
from tracelet.cli.find import add_dir, all_runs, root, short_ids
from tracelet.cli.text import count, instant, plain, table
from tracelet.spool.store import RunFolder

__all__ = ["EXAMPLES", "add", "as_json", "run"]

EXAMPLES = """\
  tracelet runs
  tracelet runs --json | jq -r '.[] | select(.undelivered) | .folder'"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Make the parser of this command."""
    command = commands.add_parser(
        "runs",
        help="list the runs this machine knows, and what of them waits",
        description="A line for each run in the spool, the newest first: its state, how many points were logged, how"
        " many each destination has, what waits and for whom. Delivered and waiting are exact; logged is their sum and"
        " so stays right when old segments have been deleted.",
        allow_abbrev=False,
    )
    add_dir(command)
    command.add_argument("--json", action="store_true", help="print a JSON array, an object for each run")
    return command


def run(args: argparse.Namespace) -> int:
    """Print the table. 0, also when something waits: that is a state, not a fault."""
    spool = root(args)
    entries = all_runs(spool)
    ids = short_ids(entries)
    found = list(_look_at(entries))
    if args.json:
        print(json.dumps([as_json(facts) for facts in found], indent=2))
        return 0
    if not found:
        print(f"No runs in {spool}.")
        return 0
    print(render(found, ids))
    return 0


def _look_at(entries: Sequence[RunFolder]) -> Iterator[Facts]:
    for entry in entries:
        with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
            yield look(entry)


def render(found: Sequence[Facts], ids: Mapping[str, str]) -> str:
    """The table, and under it what to do."""
    header = ["RUN", "PROJECT/NAME", "STATE", "STARTED", "LOGGED", "DELIVERED", "WAITING", "REFUSED", "SHIPPER"]
    rows = [
        [
            ids[facts.run_id],
            plain(facts.title, 40),
            facts.state,
            instant(facts.started_unix_nano) if facts.started_unix_nano else "?",
            f"{facts.logged:,}",
            ", ".join(f"{d.kind} {d.delivered:,}" for d in facts.destinations) or "-",
            waiting(facts),
            f"{facts.refused:,}" if facts.refused else "",
            _shipper(facts),
        ]
        for facts in found
    ]
    if not any(facts.refused for facts in found):
        header.pop(7)
        for row in rows:
            row.pop(7)
    out = [table(rows, header=header, right="llllr")]
    for facts in found:
        if facts.problem is not None:
            out.append(f"\n{ids[facts.run_id]}: {facts.problem}")
    out.extend(_advice(found, ids))
    return "\n".join(out)


def _advice(found: Sequence[Facts], ids: Mapping[str, str]) -> Iterator[str]:
    stranded = [facts for facts in found if facts.waits and facts.shipper_pid is None and facts.state != RUNNING]
    readable = [facts for facts in stranded if facts.manifest is not None]
    if not readable:
        return
    it = ("waits", "it") if len(readable) == 1 else ("wait", "them")
    yield f"\n{count(len(readable), 'run')} {it[0]}, and no shipper is at work on {it[1]}. To deliver:"
    named = [ids[facts.run_id] for facts in readable if facts.destinations]
    if named:
        yield f"  tracelet ship {' '.join(dict.fromkeys(named)) if len(named) <= 5 else '--all'}"
    for facts in [facts for facts in readable if not facts.destinations][:5]:
        yield f"  tracelet ship {ids[facts.run_id]} --to mlflow   # or otlp: it was logged without a destination"


def waiting(facts: Facts) -> str:
    """What waits and for whom, in a few words; `-` for nothing."""
    if not facts.destinations:
        return f"{facts.logged:,} for no destination"
    parts = [f"{_amount(d)} for {d.kind}" for d in facts.destinations if d.waits and _amount(d)]
    return ", ".join(parts) or "-"


def _amount(destination: Destination) -> str:
    if destination.waiting:
        return f"{destination.waiting:,}"
    if destination.waiting_records:
        return count(destination.waiting_records, "record")
    return "the end" if not destination.over else ""


def _shipper(facts: Facts) -> str:
    if facts.shipper_pid is not None:
        return f"pid {facts.shipper_pid}" if facts.shipper_pid > 0 else "alive"
    if not facts.waits:
        return "-"
    attempt = facts.manifest.newest if facts.manifest else None
    return "off" if facts.state == RUNNING and attempt is not None and attempt.shipper == "off" else "none"


def as_json(facts: Facts) -> dict[str, Any]:
    """The facts of a run for a script; keys only ever get more."""
    manifest = facts.manifest
    return {
        "run_id": facts.run_id,
        "project": manifest.project if manifest else None,
        "name": manifest.run_name if manifest else None,
        "host": manifest.host if manifest else None,
        "folder": str(facts.folder),
        "state": facts.state,
        "problem": facts.problem,
        "started_unix_nano": facts.started_unix_nano or None,
        "logged": facts.logged,
        "waiting": facts.waiting,
        "refused": facts.refused,
        "undelivered": facts.waits,
        "writers_alive": len(facts.alive),
        "shipper_pid": facts.shipper_pid,
        "destinations": [
            {
                "id": d.id,
                "kind": d.kind,
                "address": d.address,
                "delivered": d.delivered,
                "waiting": d.waiting,
                "waiting_records": d.waiting_records,
                "refused": d.refused,
                "has_the_end": d.over,
                "run_id": d.memory.get("run_id"),
                "link": d.memory.get("link"),
            }
            for d in facts.destinations
        ],
    }
