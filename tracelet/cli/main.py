"""The command `tracelet`: its parser, and how an error leaves it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from tracelet.cli import doctor, export, gateway, prune, runs, ship, show
from tracelet.cli.find import UsageError
from tracelet.errors import TraceletError
from tracelet.version import __version__

__all__ = ["EXIT_CODES", "main", "parser"]

FINE, WRONG, USAGE, INTERRUPTED = 0, 1, 2, 130

EXIT_CODES = {
    FINE: "all is well, or done",
    WRONG: "something is wrong, or something is left to do: the text says what",
    USAGE: "the command can't be understood: an unknown option, or a RUN that names none or several",
    INTERRUPTED: "stopped by Ctrl-C; what had been delivered or deleted until then stays so",
}

Command = Callable[[argparse.Namespace], int]

COMMANDS = (runs, show, export, ship, prune, doctor, gateway)


class _Help(argparse.HelpFormatter):
    """Fills descriptions as usual, and leaves the examples' lines as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return "\n".join(f"{indent}{line}" for line in text.splitlines())
        return super()._fill_text(text, width, indent)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; the documentation is made from it."""
    top = argparse.ArgumentParser(
        prog="tracelet",
        description="What this machine knows of its experiments, and what to do about it.",
        epilog="Settings come from TRACELET_* variables and [tool.tracelet] of pyproject.toml; `tracelet doctor` shows"
        " each and where it came from.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"tracelet {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS:
        command = module.add(commands)
        command.formatter_class = _Help
        command.epilog = f"examples:\n{module.EXAMPLES}"
        command.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (see `EXIT_CODES`); errors go to standard error, in a line."""
    args = parser().parse_args(argv)
    run: Command = args.run
    try:
        code = run(args)
        sys.stdout.flush()
        return code
    except UsageError as error:
        print(f"tracelet {args.command}: {error}", file=sys.stderr)
        return USAGE
    except TraceletError as error:
        print(f"tracelet {args.command}: {error}", file=sys.stderr)
        return WRONG
    except BrokenPipeError:
        # `tracelet runs | head`: the reader has seen enough. Python would complain once more while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINE
    except OSError as error:
        # Somebody else's folder, a disk that is gone: the system's own words name the file.
        print(f"tracelet {args.command}: {error}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print(f"tracelet {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
