"""The exceptions a caller may want to tell apart.

    TraceletError
    ├── ConfigError             a setting, argument or address that can't be right
    ├── InvalidValue            a value, name, iteration or param that can't be logged (also a ValueError)
    │   └── FileMissing         a file to be logged that isn't there (also a FileNotFoundError)
    ├── RunClosed               a call on a run that has been stopped
    ├── SpoolError              the spool folder can't be used
    │   ├── SpoolFull           no room: the disk, or TRACELET_MAX_BYTES
    │   └── SpoolFormatError    a file that is not ours, or of a version we don't know
    ├── ExportError             a destination answered in a way nothing can be done about here
    ├── Malformed               a request that is no OTLP (also a ValueError)
    └── IntegrationUnavailable  an optional package is missing

Each says what happened, to what, and what to do now; its facts are attributes.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "ExportError",
    "FileMissing",
    "IntegrationUnavailable",
    "InvalidValue",
    "Malformed",
    "RunClosed",
    "SpoolError",
    "SpoolFormatError",
    "SpoolFull",
    "TraceletError",
]


class TraceletError(Exception):
    """Root of everything tracelet raises on purpose; catch this to keep training whatever happens.

    Examples:
        >>> import tracelet
        >>> issubclass(tracelet.InvalidValue, tracelet.TraceletError)
        True
    """

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.facts = facts
        for name, value in facts.items():
            setattr(self, name, value)

    def __reduce__(self) -> tuple[object, ...]:
        # Default pickling would call the class with the message alone and lose the facts.
        return (_rebuild, (type(self), self.args[0], self.facts))


def _rebuild(kind: type[TraceletError], message: str, facts: dict[str, object]) -> TraceletError:
    return kind(message, **facts)


class ConfigError(TraceletError):
    """A setting, argument or address that can't be right; raised where it is first read."""


class InvalidValue(TraceletError, ValueError):
    """A value, name, iteration or param that can't be logged; nothing was written, the run goes on."""


class FileMissing(InvalidValue, FileNotFoundError):
    """A file or folder to be logged that isn't there; nothing was written, the run goes on."""


class RunClosed(TraceletError):
    """A call on a run that has been stopped; the message names `run_id=`, which resumes it."""


class SpoolError(TraceletError):
    """The spool folder can't be used as it is."""


class SpoolFull(SpoolError):
    """No room for a record: the disk is full, or the folder holds `TRACELET_MAX_BYTES`."""


class SpoolFormatError(SpoolError):
    """A file that is not a spool file, or one of a version this release doesn't know."""


class ExportError(TraceletError):
    """A destination answered in a way that can't be mended by trying again."""


class Malformed(TraceletError, ValueError):
    """A request that is no OTLP message of its signal; sending it again can't help."""


class IntegrationUnavailable(TraceletError):
    """An optional package is missing; the message has the command that installs it."""
