"""From what a person types for a run to its folders: the start of an id, a name, or a path."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from tracelet import settings
from tracelet.errors import TraceletError
from tracelet.spool import store

__all__ = ["UsageError", "add_dir", "folders", "root", "select", "short"]

MANIFEST = "manifest.json"


class UsageError(TraceletError):
    """The command line names what isn't there, or not exactly one thing."""


def add_dir(command: argparse.ArgumentParser) -> None:
    """The option that all commands have."""
    command.add_argument("--dir", metavar="DIR", help="the spool's folder (default: TRACELET_DIR, or as set)")


def root(args: argparse.Namespace) -> Path:
    """The spool's folder, from `--dir` or the settings."""
    return settings.from_process({"dir": args.dir}).dir


def folders(spool: Path) -> list[Path]:
    """The folder of each run and host below `spool`, newest first."""
    return sorted(store.list_runs(spool), key=_started, reverse=True)
