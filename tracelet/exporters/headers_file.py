"""Headers that stand in a file, so that a token can be renewed under a run that goes on; and which file that is."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

__all__ = ["file_here", "headers_in"]

_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", re.ASCII)


def headers_in(path: str) -> dict[str, str]:
    """The headers in a file: a line `name: value` for each, or a token alone, which is sent as a bearer's.

    A token alone is what Kubernetes and most agents write. Empty lines, and those that begin with `#`, say nothing.
    Names come in lower case, as gRPC wants them.

    Raises:
        ValueError: neither of the two; the text has the line's number, and nothing of what stands there.
        OSError: the file can't be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not lines:
        raise ValueError(f"{path} is empty: it has to hold a token, or lines `name: value`")
    if len(lines) == 1 and not re.search(r"[:\s]", lines[0][1]):
        return {"authorization": f"Bearer {lines[0][1]}"}
    found: dict[str, str] = {}
    for number, line in lines:
        name, colon, value = line.partition(":")
        if not colon or not _NAME.fullmatch(name.strip()):
            raise ValueError(f"line {number} of {path} is no `name: value`")
        found[name.strip().lower()] = value.strip()
    return found


def file_here(given: str | None, variable: str, environ: Mapping[str, str]) -> str | None:
    """The file that training named, or, where that is not on this machine, the one this process's `variable` names.

    A run that is shipped from a login node is shipped with the secrets of whoever ships it.
    """
    own = environ.get(variable, "").strip()
    return own if own and (given is None or not os.path.exists(given)) else given
