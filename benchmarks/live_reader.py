"""A reader process follows a flat-out writer and compares every field of every record.

    .venv/bin/python benchmarks/live_reader.py [--points 20000000] [--threads 1]

What a record must be follows from its iteration, so a field of another record, or half of one, is seen. The reader
runs all the time (no pause between polls), so that most of what it reads has just been written. Exit status 1 if
anything was torn, lost, repeated or out of order.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tracelet.spool.reader import START, SpoolReader
from tracelet.spool.writer import Writer

NAMES = 8


def write(folder: Path, points: int, threads: int) -> None:
    writer = Writer(
        folder,
        role="first",
        opening=lambda role: (1, b"{}"),
        name_frame=lambda metric_id, name: (3, json.dumps([metric_id, name]).encode()),
        check_name=str,
        to_float=lambda name, value: float(value),  # type: ignore[arg-type]
        to_iteration=operator.index,  # type: ignore[arg-type]
        closed=lambda: RuntimeError("closed"),
    )
    log, names = writer.log, [str(i) for i in range(NAMES)]
    for name in names:
        log(name, 0.0, -1)

    def work(first: int) -> None:
        for i in range(first, points, threads):
            log(names[i & 7], i * 0.5, i)

    started = time.perf_counter()
    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    writer.end(10, b"{}", 1)
    print(json.dumps({"writer_s": time.perf_counter() - started}), flush=True)


def follow(folder: Path, points: int, threads: int, writer: subprocess.Popen[str]) -> dict[str, float]:
    reader = SpoolReader(folder)
    begun = time.time_ns()
    position, name = START, ""
    seen = torn = disordered = polls = waited = ranges_read = opened = 0
    last_time = [begun] * threads
    last = [number - threads for number in range(threads)]
    while True:
        if not name:
            found = reader.writers() if folder.exists() else ()
            if not found:
                assert writer.poll() is None, "the writer died"
                continue
            name = found[0]
        dead = writer.poll() is not None
        ranges, position = reader.poll(name, position, 65536, dead=dead)
        polls += 1
        opened += len(position.open)
        if not ranges:
            waited += 1
            if reader.ended(name):
                break
            assert not dead, "the writer died"
        now = time.time_ns()
        for piece in ranges:
            ranges_read += 1
            taken = reader.read(piece)
            assert not taken.damaged, taken.damaged
            for at, value, i, metric_id, _ in struct.iter_unpack("<QdqII", taken.records):
                if i == -1:
                    continue
                seen += 1
                if value != i * 0.5 or metric_id != i & 7 or not begun <= at <= now:
                    torn += 1
                lane = i % threads
                # Slots that were passed open come later than their neighbours, so only the times tell an order then.
                if i != last[lane] + threads or at < last_time[lane]:
                    disordered += 1
                last[lane], last_time[lane] = i, at
    return {
        "seen": seen, "torn": torn, "disordered": disordered, "polls": polls, "waited": waited, "ranges": ranges_read,
        "open": opened,
    }  # fmt: skip


def main() -> int:
    """Start the writer, follow it, and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=20_000_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--write", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write is not None:
        write(options.write, options.points, options.threads)
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as top:
        folder = Path(top) / "spool"
        command = [sys.executable, __file__, "--write", str(folder), "--points", str(options.points)]
        with subprocess.Popen(
            [*command, "--threads", str(options.threads)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        ) as writer:
            started = time.perf_counter()
            result = follow(folder, options.points, options.threads, writer)
            took = time.perf_counter() - started
            assert writer.stdout is not None
            writer_s = json.loads(writer.stdout.readline())["writer_s"]
    print(f"{result['seen']:,} of {options.points:,} records read, {result['torn']:,} torn,"
          f" {result['disordered']:,} out of order")  # fmt: skip
    print(f"writer {writer_s:.1f} s ({writer_s / options.points * 1e9:.0f} ns a point beside the reader), reader"
          f" {took:.1f} s, {result['polls']:,} polls ({result['waited']:,} found nothing), {result['ranges']:,} ranges,"
          f" {result['open']:,} slots met open")  # fmt: skip
    return 0 if (result["seen"], result["torn"], result["disordered"]) == (options.points, 0, 0) else 1


if __name__ == "__main__":
    sys.exit(main())
