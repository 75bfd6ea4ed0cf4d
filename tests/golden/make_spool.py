"""Makes the golden spool folder of a format version that has none yet: `python -m tests.golden.make_spool`.

`run`, as a crash leaves one: two attempts, the first of two ranks, delivered and moved away, the second killed while a
batch of it was under way; a second destination that was never begun; what the first one refused; a shipper's last sign
of life. `received`: what a gateway writes and no other. Beside them what a reader has to find in them, and what their
destinations have to be sent next.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from tests.otlp_batches import otlp_spec
from tests.shipping import Alive, until
from tests.sinks import HttpSink, Received, Say
from tracelet import codec, ids
from tracelet.core import values
from tracelet.errors import RunClosed
from tracelet.exporters.file import FileExporter
from tracelet.exporters.otlp import OTLPExporter
from tracelet.otlp import semconv
from tracelet.records import (
    ArtifactLogged,
    ErrorInfo,
    FlushAsked,
    MetricNamed,
    ParamsLogged,
    PointBatch,
    Record,
    RunStarted,
    SpanEnded,
    SpansReceived,
    SpanStarted,
    StateNoted,
    TagsSet,
    WriterEnded,
    WriterOpened,
)
from tracelet.shipper.deaths import Deaths
from tracelet.shipper.process import ship
from tracelet.shipper.shipment import Shipment
from tracelet.spool import files, home, store
from tracelet.spool.points import HEADER_SIZE, MARKER_AT, SLOT_SIZE, UNSET
from tracelet.spool.reader import START, SpoolReader
from tracelet.spool.writer import Writer

HERE = Path(__file__).parent
RUN = "golden-run"
START_NS = 1_772_366_400_000_000_000  # 2026-03-01 12:00:00 UTC
MS = 1_000_000
OTLP, FILE = "otlp-0000000a", "file-0000000b"
DESTINATIONS = tuple({"id": one, "kind": one[:4], "spec": {}} for one in (OTLP, FILE))  # the second from attempt 2 on
SLOTS = 64  # in a segment: a golden file is small
EXPECTED = "expected.json"


# ---- what a reader finds ------------------------------------------------------------------------------------------


def found_in(folder: Path) -> dict[str, list[Any]]:
    """By writer: its records (as objects) and points (as name, value, iteration, time), in its order."""
    reader = SpoolReader(folder)
    found: dict[str, list[Any]] = {}
    for writer in reader.writers():
        names: dict[int, str] = {}
        told = found.setdefault(writer, [])
        position = START
        while True:
            ranges, after = reader.poll(writer, position, 1, dead=True)  # slot by slot, so that their order is seen
            for piece in ranges:
                taken = reader.read(piece)
                assert not taken.damaged, taken.damaged
                for _, kind, payload in taken.frames:
                    record = codec.decode(kind, payload)
                    assert record is not None
                    told.append({"kind": type(record).__name__, **_plain(record)})
                    if isinstance(record, MetricNamed):
                        names[record.metric_id] = record.name
                batch = PointBatch.from_records(taken.records, names)
                columns = zip(batch.metric_ids, batch.values, batch.iterations, batch.time_unix_nano, strict=True)
                told += [[names[m], repr(v), n, t] for m, v, n, t in columns]
            if after == position:
                break
            position = after
    reader.close()
    return found


def _plain(record: Record) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(record), default=dict))
    return plain


# ---- what its destinations are sent ---------------------------------------------------------------------------------


def build(sink: HttpSink, out: Path) -> Callable[..., Any]:
    """The exporters of the folder's two destinations."""

    def made(destination: Mapping[str, Any], secrets: object, environ: object) -> Any:
        if destination["id"] == FILE:
            return FileExporter({"path": str(out)}, {}, {})
        return OTLPExporter(otlp_spec(sink.url), {}, {})

    return made


def shipped(folder: Path, out: Path) -> tuple[list[list[str]], list[str]]:
    """What the two destinations of a folder are sent when it is shipped to its end, dead letters too."""
    with HttpSink() as sink:
        outcome = ship(folder, build=build(sink, out), follow=True, assume_dead=True, again=True, timeout_s=60)
        assert outcome.complete, outcome
        sent = [[one.signal, base64.b64encode(one.body).decode()] for one in sink.requests]
    return sent, out.read_text().splitlines()


def placed(golden: Path, spool: Path) -> Path:
    """A copy of a golden folder below `spool`, as it was: a writer's place among others is that of its lock's age."""
    folder = store.make_folder(spool / RUN / "golden-c0ffee000000")
    for path in sorted(golden.rglob("*")):
        if path.is_file():
            copy = folder / path.relative_to(golden)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    return folder


# ---- the run --------------------------------------------------------------------------------------------------------


def writer_of(folder: Path, attempt: store.Attempt, rank: int, *, role: str = "first") -> Writer:
    resource = {
        "service.name": "golden",
        "service.namespace": "tracelet",
        "service.instance.id": ids.instance_id(RUN, attempt.key, rank),
        semconv.PROJECT: "golden",
        semconv.EXPERIMENT_NAME: "digits",
        semconv.RUN_ID: RUN,
        semconv.RUN_NAME: "a golden run",
        semconv.RUN_ATTEMPT: attempt.key,
        semconv.ATTEMPT_ORDER: attempt.order,
        semconv.RANK: rank,
        semconv.RESOURCE_WIRE_VERSION: semconv.WIRE_VERSION,
        "host.name": "golden",
    }
    started = attempt.started_unix_nano
    return Writer(
        folder,
        role=role,
        opening=lambda actual: codec.encode(
            WriterOpened(started + rank, actual, 4711 + rank, rank, attempt.key, started, resource)
        ),
        name_frame=lambda metric_id, name: codec.encode(MetricNamed(metric_id, name)),
        check_name=values.check_name,
        to_float=values.to_float,
        to_iteration=values.to_iteration,
        closed=lambda: RunClosed("closed"),
        slots_per_segment=SLOTS,
    )


def put(writer: Writer, *records: Record) -> None:
    for record in records:
        writer.frame(*codec.encode(record), getattr(record, "time_unix_nano", START_NS))


def log(writer: Writer, name: str, first: int, end: int) -> None:
    for i in range(first, end):
        writer.log(name, 1 / (i + 1), i)


def attempt(number: int) -> store.Attempt:
    return store.Attempt(f"{number:016x}", START_NS + number * 10**12, 4711, 0, DESTINATIONS[:number], number=number)


def first_attempt(folder: Path, of: store.Attempt) -> None:
    zero, one = writer_of(folder, of, 0), writer_of(folder, of, 1)
    at = of.started_unix_nano
    root = ids.root_span_id(RUN, of.key)
    put(
        zero,
        RunStarted(at, "a golden run", {"process.pid": 4711, "process.owner": "ada"}, {"mlflow.user": "ada"}),
        ParamsLogged(at + MS, {"lr": 0.001, "layers": 3, "augment": True, "optimizer": "adam"}),
        ParamsLogged(at + 2 * MS, {"注释": "class-0," * 400, "infinite": math.inf}),
        TagsSet(at + 3 * MS, {"team": "ml", "poison": "refused by the first destination"}),
        SpanStarted("0" * 15 + "1", root, "validate", at + 4 * MS, {"split": "test"}),
        SpanEnded("0" * 15 + "1", at + 5 * MS, ErrorInfo("ValueError", "no", "Traceback")),
    )
    log(zero, "train/loss", 0, 150)
    log(one, "train/loss", 0, 20)
    for value, iteration in ((math.nan, -1), (math.inf, 2**63 - 1), (-0.0, -(2**63)), (5e-324, 0)):
        zero.log("验证 acc@5", value, iteration)
    log(zero, "poison", 0, 3)
    put(one, FlushAsked(at + 6 * MS))
    now = at + 60 * 10**9
    zero.end(*codec.encode(WriterEnded(now, "FINISHED", "stop")), now)
    one.end(*codec.encode(WriterEnded(now, "FINISHED", "exit", None, 0)), now)


def second_attempt(folder: Path, of: store.Attempt) -> Iterator[None]:
    """Pauses twice: what comes before the first is to be delivered, what comes before the second to be under way."""
    zero, child = writer_of(folder, of, 0), writer_of(folder, of, 0, role="child")
    at = of.started_unix_nano
    root = ids.root_span_id(RUN, of.key)
    put(zero, RunStarted(at, "a golden run", {}, {}, "00-" + "c" * 32 + "-" + "d" * 16 + "-01"))
    put(zero, ParamsLogged(at + MS, {"lr": 0.01}), TagsSet(at + MS, {"mood": "early"}))
    log(zero, "train/loss", 150, 200)
    yield
    put(zero, SpanStarted("0" * 15 + "2", root, "train", at + 2 * MS), TagsSet(at + 3 * MS, {"mood": "late"}))
    log(zero, "train/loss", 200, 300)
    log(child, "workers", 0, 10)
    yield
    (folder / "artifacts").mkdir(exist_ok=True)
    (folder / "artifacts" / "1").write_bytes(b"weights")
    digest = "9a2bb2d6be6ebff06ccb9c49aadbdb1b3b1c9c2c6ad7d3bd5bc5f7b1b9a5e2a7"
    put(zero, ArtifactLogged(at + 4 * MS, "w/a b.bin", "/data/a b.bin", "artifacts/1", 7, digest, "text/plain", 1, 2))
    log(zero, "train/loss", 300, 310)
    log(child, "workers", 10, 12)
    # The thread that was in this slot never came to its end: there is no marker.
    (last,) = folder.glob("0000000000000004-000003.points")
    with open(last, "r+b") as file:
        file.seek(HEADER_SIZE + 35 * SLOT_SIZE + MARKER_AT)
        assert file.read(4) != UNSET
        file.seek(-4, 1)
        file.write(UNSET)


def received(folder: Path) -> None:
    """The records that came over a wire."""
    of = dataclasses.replace(attempt(1), destinations=())
    new = store.Manifest(RUN, "golden", "digits", "a golden run", attempts=(of,), extra={"received": True})
    store.update_manifest(folder, lambda _: new)
    writer = writer_of(folder, of, 0)
    put(writer, SpansReceived(START_NS, "CgA="), StateNoted(START_NS, "LOST"))
    log(writer, "train/loss", 0, 3)


def ship_to_first(
    folder: Path, sink: HttpSink, rule: Callable[[Received], Say | None], *, finish: bool, out: Path
) -> None:
    """Ship to the first destination alone, under this rule."""
    sink.rule = rule
    manifest = store.read_manifest(folder)
    assert manifest is not None
    deaths = Deaths(folder, is_alive=Alive() if not finish else lambda _: False, every_s=0.0)
    shipment = Shipment(folder, manifest, environ={}, secrets={}, build=build(sink, out), deaths=deaths, only=[OTLP])
    stop = threading.Event()
    done = threading.Thread(target=lambda: shipment.run(follow=finish, stop=stop, timeout_s=30))
    done.start()
    while done.is_alive() and not any(lane.trouble for lane in shipment.lanes.values()):
        done.join(0.05)
    stop.set()
    done.join()
    if finish:
        until(lambda: (shipment.tick(), any((folder / "delivered").glob("*.points")))[1])
    shipment.close()


def _poisoned(received: Received) -> Say | None:
    return Say(400, message="no poison here") if b"poison" in received.body else None


def _down(_: Received) -> Say:
    return Say(503, message="not now")


def make(golden: Path) -> None:
    """Make the folder and what is expected of it."""
    numbers = count(1)
    files.secrets.token_hex = lambda size: f"{next(numbers):0{2 * size}x}"  # type: ignore[attr-defined]
    store.host_name = lambda: "golden"
    store.boot_id = lambda: "c0ffee000000"
    with tempfile.TemporaryDirectory() as temporary, HttpSink() as sink:
        spool = Path(temporary) / "spool"
        out = Path(temporary) / "out.jsonl"
        folder = store.run_folder(spool, RUN)
        for number in (1, 2):
            of = attempt(number)
            manifest = store.Manifest(RUN, "golden", "digits", "a golden run", host="golden", boot_id="c0ffee000000")
            store.update_manifest(folder, lambda old, of=of, new=manifest: (old or new).with_attempt(of))  # type: ignore[misc]
            if number == 1:
                first_attempt(folder, of)
                ship_to_first(folder, sink, _poisoned, finish=True, out=out)
                continue
            steps = second_attempt(folder, of)
            next(steps)
            ship_to_first(folder, sink, _poisoned, finish=False, out=out)
            next(steps)
            ship_to_first(folder, sink, _down, finish=False, out=out)
            next(steps, None)
        home.Beat(folder).renew()
        (folder / "shipper.log").write_text("what a shipper said\n")
        place = golden / "run"
        shutil.copytree(folder, place)
        received(golden / "received")
        copy = placed(place, Path(temporary) / "copy")
        expected: dict[str, Any] = {"wire": semconv.WIRE_VERSION, "run": found_in(copy)}
        expected["received"] = found_in(golden / "received")
        expected["requests"], expected["lines"] = shipped(copy, Path(temporary) / "copied.jsonl")
        (golden / EXPECTED).write_text(json.dumps(expected, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    target = HERE / f"spool-{store.FORMAT}"
    if target.exists():
        sys.exit(f"{target} is there: what a released version has written is never made anew")
    make(target)
