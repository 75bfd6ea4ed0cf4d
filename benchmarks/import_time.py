"""What `import tracelet` costs over a bare interpreter, beside the first log call, and beside peers that are installed.

.venv/bin/python benchmarks/import_time.py [rounds]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

CASES = {
    "bare interpreter": "pass",
    "import tracelet": "import tracelet",
    "... and the names one uses": "import tracelet; tracelet.start_logging; tracelet.Experiment",
    "import opentelemetry.sdk.metrics": "import opentelemetry.sdk.metrics",
    "import mlflow": "import mlflow",
}


def seconds(code: str) -> float:
    """How long an interpreter that runs `code` takes, from its start to its end."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> int:
    """Print a line for each case: median and lowest over the bare interpreter, in milliseconds."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    taken: dict[str, list[float]] = {name: [] for name in CASES}
    for name, code in CASES.items():  # once, so that bytecode is there and files are in the page cache
        if subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL, check=False).returncode:
            taken.pop(name)
    for _ in range(rounds):
        for name, times in taken.items():
            if name != "import mlflow" or len(times) < 3:
                times.append(seconds(CASES[name]))
    bare = taken["bare interpreter"]
    print(f"{'':34}{'median':>10}{'lowest':>10}   (ms, {rounds} rounds, Python {sys.version.split()[0]})")
    for name, times in taken.items():
        median, lowest = statistics.median(times), min(times)
        if name != "bare interpreter":
            median, lowest = median - statistics.median(bare), lowest - min(bare)
        label = name if name == "bare interpreter" else f"+ {name}"
        print(f"{label:34}{median * 1e3:10.1f}{lowest * 1e3:10.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
