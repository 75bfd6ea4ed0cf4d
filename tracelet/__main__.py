"""`python -m tracelet`: the same as the command `tracelet`."""

from __future__ import annotations

import sys

from tracelet.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
