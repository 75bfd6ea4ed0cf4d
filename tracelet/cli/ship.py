"""`tracelet ship`: delivers what waits, in this process and with its caller's credentials, and says what is left."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracelet import choice, settings
from tracelet.cli import deadletters
from tracelet.cli.facts import LOST, RUNNING, Destination, Facts, look
from tracelet.cli.find import UsageError, add_dir, all_runs, chosen, short_ids
from tracelet.cli.masking import Sieve
from tracelet.cli.text import age, count, plain
from tracelet.cli.watch import Line, Pace, Watch
from tracelet.errors import SpoolError, TraceletError
from tracelet.settings import Settings
from tracelet.shipper.process import ship
from tracelet.spool import home, lease, store
from tracelet.spool.cursor import Progress

if TYPE_CHECKING:
    from tracelet.shipper.shipment import Outcome

__all__ = ["EXAMPLES", "add", "run"]

EXAMPLES = """\
  tracelet ship
  tracelet ship 1f0c64ab --to otlp
  MLFLOW_TRACKING_URI=http://mlflow:5000 tracelet ship /mnt/spool --to mlflow --timeout 1h
  tracelet ship --follow --dir /shared/spool
  tracelet ship --dead-letters 1f0c64ab"""

LOOK_S = 0.1
GIVE_UP_S = 30.0
"""How long every destination may answer "not now" without anything moving until the rest is left for another time."""
GIVE_UP_AGAIN_S = 3.0
"""The same, for destinations that were given up for a run before."""
QUIET_S = 5.0
"""Without a terminal: how often a line says how far it is."""

WHERE = ("mlflow", "otlp", "prometheus", "file")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Make the parser of this command."""
    command = commands.add_parser(
        "ship",
        help="deliver what waits, now and from here",
        description="Delivers what waits of these runs, or of all that have ended, to the destinations they name, with"
        " the credentials and variables of whoever calls it. A run on which a shipper is at work is watched instead."
        " Delivering again what has arrived has no effect. It gives up a run when no destination takes anything for"
        " half a minute; nothing is lost by that. Exits with 1 if something is left, and says why.",
        allow_abbrev=False,
    )
    command.add_argument(
        "wanted",
        metavar="RUN_OR_DIR",
        nargs="*",
        help="the beginning of a run's id, its name, its folder, or a folder of runs (default: all that have ended)",
    )
    command.add_argument(
        "--follow",
        action="store_true",
        help="go on until SIGTERM, with every run of the folder and those still to come; with RUNs named: until these"
        " are over and delivered. What a sidecar does, beside training with TRACELET_SHIPPER=off",
    )
    command.add_argument(
        "--assume-dead",
        action="store_true",
        help="the named runs' programs are gone: end them. For runs of another host of which nothing can be told from"
        " here; a program that is seen alive is never ended",
    )
    command.add_argument(
        "--all", action="store_true", help="also runs that still go on: what they have so far, if nobody ships it"
    )
    command.add_argument(
        "--to",
        metavar="DESTINATION",
        action="append",
        default=[],
        help=f"deliver also to {', '.join(WHERE[:-1])} or {WHERE[-1]}, whose address is in the environment"
        " (MLFLOW_TRACKING_URI, OTEL_EXPORTER_OTLP_ENDPOINT); needed for a run that was logged without a destination",
    )
    command.add_argument(
        "--dead-letters",
        action="store_true",
        help="send once more what destinations refused for good (default: of all runs that have such things)",
    )
    command.add_argument("--timeout", metavar="TIME", help="leave after this long: 90, 10min or 2h (default: never)")
    add_dir(command)
    return command


def run(args: argparse.Namespace) -> int:
    """Ship one run after the other. 1 if something is left of one of them."""
    resolved = settings.from_process({"dir": args.dir})
    if args.assume_dead and not args.wanted:
        raise UsageError("--assume-dead ends runs: name those you mean")
    if args.follow:
        if args.to or args.timeout is not None or args.assume_dead or args.all or args.dead_letters:
            raise UsageError("--follow goes without --to, --timeout, --all, --assume-dead and --dead-letters")
        from tracelet.cli import follow  # loads the shipper whole; listing runs doesn't

        return follow.run(resolved, args.wanted)
    until = None if args.timeout is None else time.monotonic() + _seconds(args.timeout)
    entries = chosen(resolved.dir, args.wanted)
    ids = short_ids([*entries, *all_runs(resolved.dir)])
    if args.dead_letters:
        job = Job(resolved, named=_named(args.to, resolved), until=until, again=True)
        return deadletters.run(job.deliver, [look(entry) for entry in entries], ids)
    todo = [facts for facts in map(look, entries) if _is_meant(facts, args)]
    if not todo:
        print("Nothing waits." if entries else f"No runs in {resolved.dir}.")
        return 0
    job = Job(resolved, named=_named(args.to, resolved), until=until, assume_dead=args.assume_dead)
    left = 0
    for facts in reversed(todo):  # the oldest first
        left += not job.deliver(facts, ids[facts.run_id])
    if len(todo) > 1:
        done = len(todo) - left
        print(f"{count(done, 'run')} delivered" + (f", {left:,} not: see above" if left else ""))
    return 1 if left else 0


def _is_meant(facts: Facts, args: argparse.Namespace) -> bool:
    if args.wanted:
        return True
    return (facts.waits or facts.problem is not None) and (args.all or facts.state != RUNNING)


def _seconds(text: str) -> float:
    try:
        return settings.parse_duration(text)
    except ValueError as error:
        raise UsageError(f"--timeout is {text!r}, but has to be {error}") from None


def _named(to: Sequence[str], resolved: Settings) -> choice.Chosen | None:
    """The destinations that `--to` names; None if it names none."""
    if not to:
        return None
    names = [name.strip() for part in to for name in part.split(",") if name.strip()]
    wrong = next((name for name in names if name not in WHERE), None)
    if wrong is not None or not names:
        raise UsageError(f"--to {wrong or ''!r} can't be shipped to: use {', '.join(WHERE)}")
    return choice.choose(names, tracking_uri=None, environ=resolved.environ, cwd=resolved.cwd, settings=resolved)


class Job:
    """One call of the command: where to, for how long, and what has been given up so far."""

    def __init__(
        self,
        resolved: Settings,
        *,
        named: choice.Chosen | None,
        until: float | None,
        assume_dead: bool = False,
        again: bool = False,
    ) -> None:
        """`again`: send also what was refused before."""
        self._again = again
        self._settings = resolved
        self._named = named
        self._until = until
        self._assume_dead = assume_dead
        self._given_up: set[str] = set()
        self._gone_elsewhere: set[Path] = set()  # other hosts' folders whose shipper gave no sign of life
        self._line = Line(sys.stderr, every_s=QUIET_S)
        self._sieve = Sieve(resolved.environ, named.secrets.values() if named is not None else ())

    def deliver(self, facts: Facts, short: str) -> bool:
        """Deliver one run; whether nothing of it is left (of one that goes on: of what it had by now)."""
        title = f"{short} {plain(facts.title, 40)}"
        try:
            if facts.problem is not None or facts.manifest is None:
                raise SpoolError(facts.problem or f"{facts.folder} has no manifest yet: its program has just begun")
            while True:
                if self._named is not None:  # before all else: whoever is at work on it takes them up, too
                    self._destinations_for(facts)
                    facts = _again(facts)
                if facts.shipper_pid is not None or self._is_served_elsewhere(facts):
                    watched = self._watch(facts, title)
                    if watched is not None:
                        return watched
                facts = _again(facts)
                secrets = self._destinations_for(facts)
                facts = _again(facts)
                if not facts.waits and not self._again:
                    print(f"{title}: all is delivered to {_names(facts)}")
                    return True
                shipped = self._ship(facts, title, secrets)
                if shipped is not None:
                    return shipped
                facts = _again(facts)  # somebody else was quicker: watched then, or done
        except TraceletError as error:
            print(f"{title}: not delivered: {error}")
            return False

    # ---- where to ------------------------------------------------------------------------------------------------

    def _destinations_for(self, facts: Facts) -> Mapping[str, Mapping[str, Any]]:
        """See that the run names a destination, and that each of `--to` is among them; the secrets of those added."""
        named = self._named
        if named is None and not facts.destinations:
            named = self._from_environment(facts)
        if named is None:
            return {}
        known = {d.id for d in facts.destinations}
        new = [destination for destination in named.destinations if destination["id"] not in known]
        if new:
            _write_down(facts.folder, new)
        return named.secrets

    def _from_environment(self, facts: Facts) -> choice.Chosen:
        resolved = self._settings
        named = choice.choose(
            resolved.backend,
            tracking_uri=resolved.tracking_uri,
            environ=resolved.environ,
            cwd=resolved.cwd,
            settings=resolved,
            mlflow_installed=False,  # MLflow's local store is a default for training, not for somebody else's folder
        )
        if not named.destinations:
            raise SpoolError(
                "it was logged without a destination, and nothing here names one: add --to mlflow (or otlp, file), or"
                " set MLFLOW_TRACKING_URI or OTEL_EXPORTER_OTLP_ENDPOINT",
                folder=str(facts.folder),
            )
        return named

    # ---- a shipper that is at work already ------------------------------------------------------------------------

    def _is_served_elsewhere(self, facts: Facts) -> bool:
        """Whether another host's shipper has to be taken to be at work on it."""
        return facts.elsewhere and not self._assume_dead and home.read_lease(facts.folder) is not None

    def _watch(self, facts: Facts, title: str) -> bool | None:
        """Follow another shipper until a running run's points of now are delivered (True) or the time is over (False).

        None: it has left, and what it left is for us.
        """
        there = home.Watch(facts.folder) if self._is_served_elsewhere(facts) else None
        print(f"{title}: {_whose(facts, there)}", flush=True)
        progress, pace = Progress(facts.folder), Pace(facts)
        try:
            while lease.shipper_alive(facts.folder) is not None or (there is not None and _goes_on(there)):
                progress.refresh()
                pace.take(progress.destinations)
                self._line.show(f"{title}: {pace.words()}")
                through = all(pace.arrived(d.id) >= d.waiting for d in facts.destinations if not d.in_process)
                stuck = pace.still_s() >= GIVE_UP_S
                if self._is_late() or stuck or (facts.state == RUNNING and through):
                    self._line.clear()
                    self._tell_watched(facts, title, through, stuck)
                    return through
                time.sleep(LOOK_S)
        finally:
            self._line.clear()
        if there is not None and there.is_missed():
            self._gone_elsewhere.add(facts.folder)
        return None

    def _tell_watched(self, facts: Facts, title: str, through: bool, stuck: bool) -> None:
        if through:
            print(f"{title}: all points so far are delivered; its shipper goes on")
        elif stuck and facts.shipper_pid is None:
            print(f"{title}: nothing has moved for {age(GIVE_UP_S)}; its shipper, on another host, goes on trying")
        elif stuck:
            print(
                f"{title}: nothing has moved for {age(GIVE_UP_S)}; why stands in {facts.folder}/shipper.log\n"
                "  Its shipper goes on trying. To deliver from here, with your own credentials:"
                f" kill {facts.shipper_pid}, then `tracelet ship` again. Nothing is lost by that."
            )
        else:
            print(f"{title}: the time is over; its shipper goes on")

    def _is_late(self) -> bool:
        return self._until is not None and time.monotonic() >= self._until

    # ---- shipping ---------------------------------------------------------------------------------------------------

    def _ship(self, facts: Facts, title: str, secrets: Mapping[str, Mapping[str, Any]]) -> bool | None:
        """Whether nothing is left; None if another shipper took the run first."""
        watch, stop, errors = Watch(), threading.Event(), list[BaseException]()
        outcomes: list[Outcome] = []
        environ = self._settings.environ

        def work() -> None:
            try:
                gone = self._assume_dead or facts.folder in self._gone_elsewhere
                outcomes.append(
                    ship(
                        facts.folder,
                        secrets=secrets,
                        environ=environ,
                        stop=stop,
                        build=watch.build,
                        assume_dead=gone,
                        again=self._again,
                    )
                )
            except BaseException as error:  # noqa: BLE001 - handed to the main thread, which raises it
                errors.append(error)

        thread = threading.Thread(target=work, name="tracelet-ship", daemon=True)
        started = time.monotonic()
        progress, pace = Progress(facts.folder), Pace(facts)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(LOOK_S)
                progress.refresh()
                pace.take(progress.destinations)
                self._line.show(self._sieve(f"{title}: {pace.words()}{_said(facts, watch)}"))
                if self._is_late() or self._is_hopeless(watch, pace):
                    stop.set()
        finally:
            stop.set()  # on Ctrl-C: the request under way still gets its answer, so nothing has to be sent again
            thread.join(20.0)
            self._line.clear()
        if errors:
            raise errors[0]
        if outcomes and outcomes[0].joined:
            return None
        return self._tell(facts, title, watch, pace, time.monotonic() - started)

    def _is_hopeless(self, watch: Watch, pace: Pace) -> bool:
        trouble = watch.trouble().keys()
        if not trouble or watch.is_asking():
            return False
        if pace.still_s() < (GIVE_UP_AGAIN_S if trouble <= self._given_up else GIVE_UP_S):
            return False
        self._given_up.update(trouble)
        return True

    def _tell(self, before: Facts, title: str, watch: Watch, pace: Pace, took_s: float) -> bool:
        """Say what arrived, what is left and why; whether nothing is left."""
        facts = _again(before)
        arrived = ", ".join(f"{pace.arrived(d.id):,} to {d.kind}" for d in facts.destinations if not d.in_process)
        print(f"{title}: points delivered: {arrived} in {took_s:.1f} s")
        refused_before = {d.id: d.refused for d in before.destinations}
        for d in facts.destinations:
            if d.memory.get("link"):
                print(f"  in {d.kind}: {d.memory['link']}")
            if d.refused > refused_before.get(d.id, 0):
                more = d.refused - refused_before.get(d.id, 0)
                print(f"  {d.kind} refused {count(more, 'item')} for good: see {facts.folder}/rejected-{d.id}.jsonl")
        trouble = watch.trouble()
        left = [d for d in facts.destinations if d.waits]
        if facts.elsewhere and facts.state in (RUNNING, LOST) and facts.manifest is not None:
            print(
                f"  {facts.manifest.host} wrote it, and nothing tells from here whether it goes on;"
                " if it doesn't, end it with --assume-dead"
            )
            left = [d for d in left if d.id in trouble]
        elif facts.state == RUNNING:
            print("  it goes on: what it logs from now on waits for another `tracelet ship`")
            left = [d for d in left if d.id in trouble]
        for d in left:
            why = trouble.get(d.id) or ("the time was over" if self._is_late() else "it was still on its way")
            print(f"  LEFT for {d.kind} ({d.address}): {_amount(d)}\n    because: {self._sieve(why)}")
        if left:
            print("  Nothing is lost: mend it, then `tracelet ship` again; `tracelet doctor` tries the destinations.")
        return not left


def _whose(facts: Facts, there: home.Watch | None) -> str:
    """Who is at work on a run, for a person who watches it."""
    if facts.shipper_pid is not None:
        return f"a shipper is at work on it (pid {facts.shipper_pid}); watching it"
    told = there.lease if there is not None else None
    if told is None:
        return "a shipper was at work on it; watching it"
    ago = age(max(0.0, (time.time_ns() - told.renewed_unix_nano) / 1e9))
    return f"the shipper on {told.host} gave a sign of life {ago} ago; watching for the next ({home.MISSED_S:.0f} s)"


def _goes_on(there: home.Watch) -> bool:
    return not there.is_missed() and there.lease is not None


def _amount(d: Destination) -> str:
    if not d.waiting and not d.waiting_records:
        return "the end of the run"
    return f"{count(d.waiting, 'point')} and {count(d.waiting_records, 'other record')}"


def _said(facts: Facts, watch: Watch) -> str:
    """What destinations say that won't take anything now."""
    kinds = {d.id: d.kind for d in facts.destinations}
    parts = [f"{kinds.get(i, i)} says: {plain(why, 120)}" for i, why in watch.trouble().items()]
    return " | " + "; ".join(parts) if parts else ""


def _again(facts: Facts) -> Facts:
    """The run as it is now."""
    return look(store.RunFolder(facts.run_id, facts.folder, store.read_manifest(facts.folder)))


def _write_down(folder: Path, new: Sequence[Mapping[str, Any]]) -> None:
    """Add destinations to the run's newest attempt: every later shipper and reader knows of them."""

    def change(manifest: store.Manifest | None) -> store.Manifest:
        attempt = manifest.newest if manifest is not None else None
        if manifest is None or attempt is None:
            raise SpoolError(f"{folder} holds no run that has begun", folder=str(folder))
        return manifest.with_attempt(dataclasses.replace(attempt, destinations=(*attempt.destinations, *new)))

    store.update_manifest(folder, change, make=False)


def _names(facts: Facts) -> str:
    return ", ".join(d.kind for d in facts.destinations)
