#!/usr/bin/env python3
"""The stack on one machine without docker: builds the real programs, and runs them with the files of collector-config/.

scripts/stack.py build                  # once: a few minutes, into ~/.cache/tracelet/stack
scripts/stack.py up --dir ./stack-data  # until Ctrl-C; ./stack-data/stack.json says where everything listens
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import stack_programs as programs


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
    one.add_argument("--only", metavar="NAMES", type=_names, help=f"some of: {names}")
    one.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compile so many packages at once")
    one.set_defaults(do=_build)

    one = commands.add_parser("where", help="print the path of a program, or say why there is none")
    one.add_argument("name", choices=programs.PROGRAMS)
    one.set_defaults(do=_where)

    one = commands.add_parser("lock", help="(for maintainers) write a module's checksums anew from its manifest")
    one.add_argument("name", choices=["collector"])
    one.set_defaults(do=_lock)
    return top


def _build(arguments: argparse.Namespace) -> int:
    programs.build(arguments.only or list(programs.PROGRAMS), max(1, arguments.jobs))
    return 0


def _where(arguments: argparse.Namespace) -> int:
    print(programs.find(arguments.name))
    return 0


def _lock(arguments: argparse.Namespace) -> int:
    programs.lock_collector()
    return 0


def _names(text: str) -> list[str]:
    found = [name for name in text.replace(",", " ").split() if name]
    unknown = [name for name in found if name not in programs.PROGRAMS]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no {', '.join(unknown)}; there are {', '.join(programs.PROGRAMS)}")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
