"""`tracelet doctor`: is everything in place for a run started here, and if not, what to do."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tracelet import choice, launch, settings
from tracelet.addresses import shown_address, shown_names
from tracelet.cli import reach
from tracelet.cli.facts import address
from tracelet.cli.find import add_dir
from tracelet.cli.masking import Sieve, shown
from tracelet.cli.text import age, count, size, table
from tracelet.errors import ConfigError
from tracelet.exporters import artifact_store
from tracelet.spool import disk
from tracelet.version import __version__

__all__ = ["EXAMPLES", "add", "examine", "run"]

EXAMPLES = """\
  tracelet doctor
  tracelet doctor --json | jq -r '.problems[].what'"""

LITTLE_ROOM = 100_000_000  # bytes: a few million points and their frames
PACKAGES = (
    "opentelemetry-api",
    "opentelemetry-sdk",
    "opentelemetry-exporter-otlp",
    "mlflow",
    "mlflow-skinny",
    "numpy",
)
OTHERS = ("OTEL_", "MLFLOW_")
PROXIES = frozenset(f"{name}_PROXY" for name in ("HTTP", "HTTPS", "ALL", "NO"))


@dataclass
class Report:
    """What was found; `problems` are what makes the command fail, each with what to do now."""

    settings: dict[str, dict[str, str | None]] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    spool: dict[str, Any] = field(default_factory=dict)
    destinations: list[dict[str, Any]] = field(default_factory=list)
    why: str = ""
    shipper: dict[str, str | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[dict[str, str]] = field(default_factory=list)

    def problem(self, what: str, advice: str | None = None) -> None:
        """Add something that is wrong."""
        self.problems.append({"what": what, "advice": advice or ""})


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Make the parser of this command."""
    command = commands.add_parser(
        "doctor",
        help="see whether everything is in place for a run started here",
        description="Shows the settings and where each came from, the versions, the spool's folder, where a run started"
        " here would go and whether that can be reached, and whether its shipper would outlive it. Secrets are never"
        " shown. Exits with 1 when something is wrong, and says what to do.",
        allow_abbrev=False,
    )
    add_dir(command)
    command.add_argument("--offline", action="store_true", help="don't ask any destination over the network")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    return command


def run(args: argparse.Namespace) -> int:
    """Examine this process's own environment and print what was found."""
    environ = dict(os.environ)
    try:
        cwd = Path.cwd()
    except FileNotFoundError:
        cwd = Path("/")
    report, secrets = examine(environ, cwd, given_dir=args.dir, offline=args.offline)
    sieve = Sieve(environ, secrets)
    if args.json:
        # Sieved value by value: a secret with a quote in it is written otherwise in JSON.
        print(json.dumps(_sieved(asdict(report), sieve), indent=2))
    else:
        print(sieve(render(report)))
    return 1 if report.problems else 0


def examine(
    environ: Mapping[str, str], cwd: Path, *, given_dir: str | None = None, offline: bool = False
) -> tuple[Report, list[object]]:
    """All that can be found out, and the secrets met on the way (for the sieve)."""
    report = Report()
    resolved = _settings(report, environ, cwd, given_dir)
    _variables(report, environ)
    _versions(report)
    if resolved is None:
        return report, []
    _spool(report, resolved.dir)
    secrets = _destinations(report, resolved, offline)
    _shipper(report, resolved)
    return report, secrets


# ---- settings ----------------------------------------------------------------------------------------------------


def _settings(report: Report, environ: Mapping[str, str], cwd: Path, given_dir: str | None) -> settings.Settings | None:
    """The settings, each wrong one reported and left out, so that one slip does not hide the rest."""
    left = dict(environ)
    while True:
        try:
            resolved = settings.resolve({"dir": given_dir}, {}, environ=left, cwd=cwd, argv=["train.py"])
            break
        except ConfigError as error:
            report.problem(str(error), "until then a run that starts here stops with this error")
            at_fault = _variable_of(error, left)
            if at_fault is None:
                return None
            del left[at_fault]
    for setting in settings.SETTINGS:
        if setting.name in ("run_id", "experiment_name") and resolved.origins[setting.name].startswith("default"):
            continue  # made at the start of each run
        report.settings[setting.name] = {
            "value": _value(resolved, setting.name),
            "origin": resolved.origins[setting.name],
        }
    return resolved


def _variable_of(error: ConfigError, environ: Mapping[str, str]) -> str | None:
    """The variable that a settings error is about, None if it is about something else."""
    name = str(error.facts.get("setting"))
    if name in environ:
        return name
    variable = next((s.env for s in settings.SETTINGS if s.name == name and s.env is not None), None)
    if variable is None or variable not in environ:
        return None
    return variable if error.facts.get("value") == environ[variable] else None


def _value(resolved: settings.Settings, name: str) -> str | None:
    if name in ("grace", "window_age", "window_ahead"):
        return age(getattr(resolved, f"{name}_s"))
    value: object = getattr(resolved, name)
    if value is None:
        return None
    if isinstance(value, settings.Keep):
        return f"{age(value.max_age_s)}, {size(value.max_bytes)}"
    if name == "max_bytes":
        return size(float(str(value)))
    if name == "backend" and isinstance(value, str):
        return shown_names(value)
    return shown_address(str(value)) if name in ("prometheus_url", "tracking_uri") else str(value)


def _variables(report: Report, environ: Mapping[str, str]) -> None:
    for name, value in sorted(environ.items()):
        if (name.startswith(OTHERS) or name.upper() in PROXIES) and value:
            report.variables[name] = shown(name, value)


def _versions(report: Report) -> None:
    report.versions = {"tracelet": __version__, "python": f"{platform.python_version()} ({sys.executable})"}
    report.versions["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    for package in PACKAGES:
        try:
            report.versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            report.versions[package] = "not installed"
    if sys.platform == "win32":
        report.problem("tracelet doesn't run on Windows itself", "use it in WSL2")


# ---- the spool ---------------------------------------------------------------------------------------------------


def _spool(report: Report, folder: Path) -> None:
    found: dict[str, Any] = {"folder": str(folder), "exists": folder.is_dir()}
    report.spool = found
    # The folder is made at the first run; until then its nearest parent that exists tells what can be known.
    base = folder
    while not base.exists() and base != base.parent:
        base = base.parent
    if not base.is_dir():
        report.problem(
            f"the spool's folder {folder} can't be made: {base} is a file", "set TRACELET_DIR to another one"
        )
        return
    try:
        with tempfile.NamedTemporaryFile(dir=base, prefix=".tracelet-doctor-"):
            pass
        found["writable"] = True
    except OSError as error:
        found["writable"] = False
        report.problem(
            f"the spool's folder {folder} can't be written: {error.strerror}",
            "set TRACELET_DIR to a folder that can; until then nothing is kept that a run logs",
        )
        return
    free = shutil.disk_usage(base).free
    found["free_bytes"] = free
    if free < LITTLE_ROOM:
        report.problem(
            f"the disk of the spool's folder {folder} has only {size(free)} left",
            "make room (`tracelet prune`), or set TRACELET_DIR to another disk; a full disk refuses new records",
        )
    found["mapped"] = disk.may_map(base)


# ---- destinations ------------------------------------------------------------------------------------------------


def _destinations(report: Report, resolved: settings.Settings, offline: bool) -> list[object]:
    try:
        chosen = choice.choose(
            resolved.backend,
            tracking_uri=resolved.tracking_uri,
            environ=resolved.environ,
            cwd=resolved.cwd,
            settings=resolved,
        )
    except ConfigError as error:
        report.problem(str(error), "until then a run that starts here stops with this error")
        return []
    report.why = chosen.why
    if not chosen.destinations:
        report.notes.append(
            "No destination: runs stay in the spool until `tracelet ship --to` delivers them."
            " Set TRACELET_BACKEND, MLFLOW_TRACKING_URI or OTEL_EXPORTER_OTLP_ENDPOINT, or install"
            " tracelet-otel[mlflow]."
        )
    if any(destination["kind"] == "otlp" for destination in chosen.destinations):
        _artifacts(report, resolved.environ)
    for destination in chosen.destinations:
        entry: dict[str, Any] = {"id": destination["id"], "kind": destination["kind"], "address": address(destination)}
        report.destinations.append(entry)
        if offline:
            entry |= {"reachable": None, "said": "not asked"}
            continue
        answer = reach.check(
            destination, chosen.secrets.get(destination["id"], {}), resolved.environ, project=resolved.project
        )
        entry |= {"reachable": answer.ok, "said": answer.said}
        if not answer.ok:
            report.problem(f"{destination['kind']} at {entry['address']}: {answer.said}", answer.advice)
    return list(chosen.secrets.values())


def _artifacts(report: Report, environ: Mapping[str, str]) -> None:
    try:
        report.notes.append(f"Files that a run logs {artifact_store.where_artifacts_go(environ)}.")
    except ConfigError as error:
        report.problem(str(error), "until then nothing that goes out by OTLP is delivered")


def _shipper(report: Report, resolved: settings.Settings) -> None:
    thread = resolved.shipper == "thread"
    reason = "it is a thread of the program" if thread else launch.can_outlive(resolved.environ)
    report.shipper = {"mode": resolved.shipper, "cannot_outlive": reason}
    if resolved.shipper == "off":
        report.notes.append("TRACELET_SHIPPER is off: nothing is delivered until `tracelet ship` is called.")
    elif thread:
        report.notes.append(
            "TRACELET_SHIPPER is thread: delivery takes its share of the program's interpreter, and ends with it. The"
            f" program's end waits while data moves, and on SIGTERM it drains for {age(resolved.grace_s)}"
            " (TRACELET_GRACE); what is left then waits for `tracelet ship`."
        )
    elif reason is not None:
        report.notes.append(
            f"The shipper can't outlive the program: {reason}. So the program's end waits while data moves, and on"
            f" SIGTERM it drains for {age(resolved.grace_s)} (TRACELET_GRACE). Give it that time: in Kubernetes"
            " terminationGracePeriodSeconds, in Docker --stop-timeout."
        )


# ---- as text -----------------------------------------------------------------------------------------------------


def render(report: Report) -> str:
    """The report as a person reads it: what is wrong comes last, where the eye is."""
    parts = [
        ("Versions", table([[name, version] for name, version in report.versions.items()], indent="  ")),
        (
            "Settings",
            table(
                [
                    [name, "-" if s["value"] is None else s["value"], str(s["origin"])]
                    for name, s in report.settings.items()
                ],
                indent="  ",
            ),
        ),
        ("Other variables", table([[name, value] for name, value in report.variables.items()], indent="  ")),
        ("Spool", table(_spool_rows(report.spool), indent="  ")),
        ("A run started here " + report.why if report.why else "", _destination_rows(report)),
        ("Shipper", table(_shipper_rows(report.shipper), indent="  ")),
        ("Good to know", "\n".join(f"  {note}" for note in report.notes)),
    ]
    lines = [f"{title}\n{text}\n" for title, text in parts if title and text]
    if not report.problems:
        return "\n".join([*lines, "Nothing is wrong."])
    lines.append(f"{count(len(report.problems), 'problem')}:")
    for position, problem in enumerate(report.problems, 1):
        lines.append(f"  {position}. {problem['what']}")
        if problem["advice"]:
            lines.append(f"     -> {problem['advice']}")
    return "\n".join(lines)


def _spool_rows(spool: Mapping[str, Any]) -> list[list[str]]:
    if not spool:
        return []
    rows = [["folder", spool["folder"] + ("" if spool["exists"] else " (made at the first run)")]]
    if "writable" in spool:
        rows.append(["writable", "yes" if spool["writable"] else "NO"])
    if "free_bytes" in spool:
        rows.append(["free", size(spool["free_bytes"])])
    if "mapped" in spool:
        rows.append(
            ["written by", "mapped pages" if spool["mapped"] else "os.write (mapping is not safe on this file system)"]
        )
    return rows


def _destination_rows(report: Report) -> str:
    if not report.destinations:
        return "  -"
    marks = {True: "ok", False: "NOT REACHED", None: "not asked"}
    return table(
        [
            [d["kind"], d["address"], marks[d["reachable"]], d["said"] if d["reachable"] else ""]
            for d in report.destinations
        ],
        indent="  ",
    )


def _shipper_rows(shipper: Mapping[str, str | None]) -> list[list[str]]:
    if not shipper:
        return []
    modes = {"process": "a process beside the program", "thread": "a thread of the program"}
    mode = modes.get(str(shipper["mode"]), str(shipper["mode"]))
    reason = shipper["cannot_outlive"]
    return [["runs as", mode], ["outlives the program", "yes" if reason is None else f"no: {reason}"]]


def _sieved(value: Any, sieve: Sieve) -> Any:
    if isinstance(value, str):
        return sieve(value)
    if isinstance(value, Mapping):
        return {name: _sieved(item, sieve) for name, item in value.items()}
    return [_sieved(item, sieve) for item in value] if isinstance(value, list) else value
