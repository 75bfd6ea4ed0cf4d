"""Golden spool folders: what a released format version left on a disk, a later release reads and ships to its end.

See README.md beside this file for what may change here, and `make_spool.py` for what the folders hold.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.golden.make_spool import EXPECTED, FILE, HERE, OTLP, found_in, placed, shipped
from tests.otlp_decode import decode
from tests.sinks import REQUESTS
from tracelet.codec import KINDS
from tracelet.otlp import semconv
from tracelet.shipper.deadletter import DeadLetters
from tracelet.spool import home, store
from tracelet.spool.cursor import Journal


def expected_of(golden: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((golden / EXPECTED).read_text(encoding="utf-8"))
    return found


@pytest.fixture(params=sorted(HERE.glob("spool-*")), ids=lambda path: str(path.name))
def golden(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> Path:
    return placed(golden / "run", tmp_path / "spool")


def test_this_version_has_its_folder() -> None:
    assert (HERE / f"spool-{store.FORMAT}" / "run").is_dir()


@pytest.mark.parametrize("which", ["run", "received"])
def test_every_record_and_point_is_read_as_it_was(golden: Path, which: str, tmp_path: Path) -> None:
    expected, found = expected_of(golden)[which], found_in(placed(golden / which, tmp_path))
    assert list(found) == list(expected)
    for writer, entries in expected.items():
        assert len(found[writer]) == len(entries)
        for entry, mine in zip(entries, found[writer], strict=True):
            # A later version may know more of a record than was written then.
            assert entry == (mine if isinstance(entry, list) else {key: mine[key] for key in entry})


def test_every_kind_of_record_is_in_the_folder_of_this_version() -> None:
    expected = expected_of(HERE / f"spool-{store.FORMAT}")
    entries = [entry for which in ("run", "received") for told in expected[which].values() for entry in told]
    assert {entry["kind"] for entry in entries if isinstance(entry, dict)} == {one.__name__ for one in KINDS.values()}


def test_what_its_destinations_have_and_lack_is_known(golden: Path, folder: Path) -> None:
    manifest = store.read_manifest(folder)
    assert manifest is not None
    assert [one.number for one in manifest.attempts] == [1, 2]
    assert [None if one.ended is None else one.ended["status"] for one in manifest.attempts] == ["FINISHED", None]
    assert list(manifest.destinations) == [OTLP, FILE]
    told = home.read_lease(folder)
    assert told is not None
    assert told.host == "golden"
    journal = Journal(folder, OTLP)
    assert journal.pending is not None, "a batch was under way"
    assert journal.delivered > 0
    first = manifest.attempts[0].key
    assert dict(journal.done) == {first: True, f"{first}/1": True}
    journal.close()
    letters = DeadLetters(folder, OTLP)
    assert len(letters.waiting()) == journal.refused > 0
    assert letters.openings().keys() == {"0000000000000001"}
    assert Counter(path.suffix for path in (folder / "delivered").iterdir()).keys() >= {".points", ".seal"}
    assert {path.name.partition("-")[2] for path in folder.glob("*.points")} >= {"000001.points"}


def test_the_rest_of_it_is_shipped_in_the_same_requests(golden: Path, folder: Path, tmp_path: Path) -> None:
    expected = expected_of(golden)
    requests, lines = shipped(folder, tmp_path / "out.jsonl")
    runs = [
        decode([(signal, REQUESTS[signal].FromString(base64.b64decode(body))) for signal, body in one])
        for one in (requests, expected["requests"])
    ]
    assert runs[0] == runs[1]
    if expected["wire"] == semconv.WIRE_VERSION:  # what another wire version makes of it has golden files of its own
        assert requests == expected["requests"]
        assert lines == expected["lines"]
