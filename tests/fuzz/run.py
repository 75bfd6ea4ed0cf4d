"""Runs one decoder under atheris: `python -m tests.fuzz.run NAME ...`, with atheris's own arguments behind the name.

`all` stands for all of them, one chosen by the first byte of the input.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Fuzz until the time is over, or something is found."""
    import atheris

    # Only what decodes: to follow every line of protobuf, gRPC and requests takes a minute before the first input.
    with atheris.instrument_imports(include=["tracelet", "email", "tomllib"]):
        from tests.fuzz.targets import ALL, TARGETS
        from tracelet.guard import guard, logger

    name = sys.argv.pop(1)
    logger.logger.disabled = True  # what damage is told of would fill the disk
    guard.strict = True
    atheris.Setup(sys.argv, (ALL if name == "all" else TARGETS[name]).run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
