#!/usr/bin/env python3
"""The stack on one machine without docker: builds the real programs, and runs them with the files of collector-config/.

scripts/stack.py build                  # once: a few minutes, into ~/.cache/tracelet/stack
scripts/stack.py up --dir ./stack-data  # until Ctrl-C; ./stack-data/stack.json says where everything listens
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import stack_programs as programs
import stack_services as services
import stack_supervisor as supervisor


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; returns the exit status."""
    arguments = parser().parse_args(argv)
    try:
        return int(arguments.do(arguments))
    except programs.StackError as error:
        print(f"stack.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """The command line; all of it, in one place."""
    names = ", ".join(programs.PROGRAMS)
    top = argparse.ArgumentParser(prog="scripts/stack.py", description=(__doc__ or "").splitlines()[0])
    commands = top.add_subparsers(required=True, metavar="build|where|lock|up|restart")

    one = commands.add_parser("build", help="have each program: from PATH, or built from its modules")
    one.add_argument("--only", metavar="NAMES", type=_some(tuple(programs.PROGRAMS)), help=f"some of: {names}")
    one.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compile so many packages at once")
    one.set_defaults(do=_build)

    one = commands.add_parser("where", help="print the path of a program, or say why there is none")
    one.add_argument("name", choices=programs.PROGRAMS)
    one.set_defaults(do=_where)

    one = commands.add_parser("lock", help="(for maintainers) write a module's checksums anew from its manifest")
    one.add_argument("name", choices=["collector"])
    one.set_defaults(do=_lock)

    one = commands.add_parser("up", help="start the stack; runs until Ctrl-C or SIGTERM, then stops all of it")
    one.add_argument("--dir", type=Path, required=True, help="data, logs and stack.json; may be used again")
    one.add_argument("--with", dest="extras", metavar="NAMES", type=_some(services.EXTRAS), default=(), help=_EXTRAS)
    one.add_argument("--without", type=_some(services.MAY_GO), default=(), metavar="NAMES", help=_LESS)
    one.add_argument("--gateways", type=int, default=1, metavar="N", help="so many gateways, runs spread over them")
    one.add_argument("--config", type=Path, action="append", default=[], help="the collector's file; may be repeated")
    one.add_argument("--core-config", type=Path, action="append", default=[], help="with kafka: the second collector's")
    one.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", type=_variable, help=_ENV)
    one.set_defaults(do=_up)

    one = commands.add_parser("restart", help="start one program of a running stack again, on its old port")
    one.add_argument("--dir", type=Path, required=True)
    one.add_argument("name")
    one.set_defaults(do=_restart)
    return top


_EXTRAS = f"more programs, with commas between them: {', '.join(services.EXTRAS)}"
_LESS = f"leave out some of: {', '.join(services.MAY_GO)}"
_ENV = "for collector and gateway (MLFLOW_*: for mlflow too); {port} in the value becomes a free port"


def _build(arguments: argparse.Namespace) -> int:
    programs.build(arguments.only or list(programs.PROGRAMS), max(1, arguments.jobs))
    return 0


def _where(arguments: argparse.Namespace) -> int:
    print(programs.find(arguments.name))
    return 0


def _lock(arguments: argparse.Namespace) -> int:
    programs.lock_collector()
    return 0


def _up(arguments: argparse.Namespace) -> int:
    _with_the_project_s_python()
    wishes = services.Wishes(
        arguments.dir.absolute(),
        frozenset(arguments.extras),
        frozenset(arguments.without),
        max(1, arguments.gateways),
        tuple(arguments.config),
        tuple(arguments.core_config),
        dict(arguments.env),
    )
    supervisor.check_free(wishes.folder)
    made = services.plan(wishes)

    def ready() -> None:
        services.report(made)
        print("ready", flush=True)

    supervisor.Supervisor(wishes.folder, made.services, made.addresses).run(ready)
    return 0


def _with_the_project_s_python() -> None:
    """Go on with the Python of .venv where this one has no mlflow: `scripts/stack.py up` is all one has to type."""
    project = programs.REPOSITORY / ".venv" / "bin" / "python"
    if importlib.util.find_spec("mlflow") is None and project.exists() and Path(sys.prefix) != project.parent.parent:
        os.execv(project, [str(project), *sys.argv])


def _restart(arguments: argparse.Namespace) -> int:
    supervisor.request_restart(arguments.dir.absolute(), arguments.name)
    return 0


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _some(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        found = [name for name in text.replace(",", " ").split() if name]
        unknown = [name for name in found if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"there is no {', '.join(unknown)}; there are {', '.join(known)}")
        return found

    return parse


if __name__ == "__main__":
    raise SystemExit(main())
