"""`tracelet export`: rows in order whatever the size, names and labels as Prometheus has them, one file or none."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path

import pytest

from tests.odd_labels import LABEL_NAMES
from tests.spooled_run import write_run
from tracelet.cli import export_rows
from tracelet.cli.export_openmetrics import label_name, metric_name, seconds
from tracelet.cli.main import main

MS = 1_000_000
START = 1_780_000_000_000 * MS
RESOURCE = {
    "service.name": "vision",
    "service.namespace": "tracelet",
    "service.instance.id": "i-0",
    "host.name": 'node "1"\\',
    "tracelet.run.id": "old",
    "tracelet.run.name": "two\nlines",
    "tracelet.rank": 0,
    "tracelet.run.attempt": "a" * 16,
}


def exported(tmp_path: Path, rows: list[tuple[int, str, float, int]], *words: str) -> str:
    if not (tmp_path / "spool").exists():
        write_run(tmp_path / "spool", "old", RESOURCE, rows, slots=64)
    out = tmp_path / "out"
    assert main(["export", "old", "--dir", str(tmp_path / "spool"), "-o", str(out), *words]) == 0
    return out.read_text()


def test_openmetrics_has_each_point_and_its_companion_with_all_labels(tmp_path: Path) -> None:
    text = exported(
        tmp_path, [(START, "train/loss", 0.5, 7), (START + MS, "train/loss", math.inf, 8)], "--format", "openmetrics"
    )
    labels = (
        'host_name="node \\"1\\"\\\\",instance="i-0",job="tracelet/vision",tracelet_metric_key="train/loss",'
        f'tracelet_rank="0",tracelet_run_attempt="{"a" * 16}",tracelet_run_id="old",tracelet_run_name="two\\nlines"'
    )
    assert text.splitlines() == [
        f"ml_train_loss{{{labels}}} 0.5 1780000000.0",
        f"tracelet_iteration{{{labels}}} 7.0 1780000000.0",
        f"ml_train_loss{{{labels}}} +Inf 1780000000.001",
        f"tracelet_iteration{{{labels}}} 8.0 1780000000.001",
        "# EOF",
    ]


def test_prefix_and_promoted_attributes_are_the_callers(tmp_path: Path) -> None:
    rows = [(START, "loss", 1.0, 1)]
    first, *_ = exported(tmp_path, rows, "--format", "openmetrics", "--prefix", "lab.", "--promote", "").splitlines()
    assert first.startswith("lab_loss{instance=")


def test_points_of_one_millisecond_rise_as_on_their_way_to_any_destination(tmp_path: Path) -> None:
    rows = [(START, "loss", float(i), i) for i in range(5)]
    lines = exported(tmp_path, rows, "--format", "openmetrics").splitlines()[:-1:2]
    assert [line.rpartition(" ")[2] for line in lines] == [seconds(START // MS + i) for i in range(5)]


def test_rows_are_in_order_of_time_also_where_they_are_sorted_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_rows, "_PIECE", 100)
    monkeypatch.setattr(export_rows, "_READ", 7)
    order = list(range(1000))
    random.Random(4).shuffle(order)
    # A clock that jumps by minutes: each point's own time counts again.
    rows = [(START + i * 3_600_000 * MS, f"m{i % 3}", i / 2, i) for i in order]
    text = exported(tmp_path, rows, "--format", "jsonl")
    found = [json.loads(line) for line in text.splitlines()]
    assert len(found) == 1000
    times = [each["time_unix_nano"] for each in found]
    assert times == sorted(times)
    assert {(each["name"], each["value"], each["iteration"]) for each in found} == {(n, v, i) for _, n, v, i in rows}


def test_jsonl_and_csv_say_what_was_logged(tmp_path: Path) -> None:
    rows = [(START, "loss", math.nan, 3), (START + MS, "loss, 損失", 2.5, -4)]
    first, second = map(json.loads, exported(tmp_path, rows, "--format", "jsonl").splitlines())
    assert (first["value"], first["name"], first["rank"], first["run_id"]) == ("nan", "loss", 0, "old")
    assert (second["name"], second["iteration"], second["time_unix_nano"]) == ("loss, 損失", -4, START + MS)
    table = list(csv.DictReader(exported(tmp_path, rows, "--format", "csv").splitlines()))
    assert [(row["name"], row["value"]) for row in table] == [("loss", "nan"), ("loss, 損失", "2.5")]


def test_a_run_that_is_not_there_and_a_folder_for_a_file_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "spool", "old", RESOURCE, [(START, "loss", 1.0, 1)])
    assert main(["export", "other", "--dir", str(tmp_path / "spool")]) == 2
    assert main(["export", "old", "--dir", str(tmp_path / "spool"), "-o", str(tmp_path)]) == 2
    assert "is a folder: name a file" in capsys.readouterr().err
    assert main(["export", "old", "--dir", str(tmp_path / "spool"), "-o", str(tmp_path / "x" / "y")]) == 1


@pytest.mark.parametrize(
    ("name", "translated"),
    [
        ("ml.train/loss", "ml_train_loss"),
        ("ml.a__b", "ml_a_b"),
        ("ml.损失", "ml"),
        ("ml.x:y", "ml_x:y"),
        ("9.x", "_9_x"),
        ("ml.trailing/", "ml_trailing"),
    ],
)
def test_names_are_translated_as_prometheus_does(name: str, translated: str) -> None:
    assert metric_name(name) == translated


def test_label_names_are_translated_as_prometheus_does() -> None:
    """tests/stack/test_old_runs.py asks a real Prometheus about these very names."""
    assert {name: label_name(name) for name in LABEL_NAMES} == LABEL_NAMES


def test_every_millisecond_is_read_back_as_itself() -> None:
    rng = random.Random(1)
    for at in [0, 1, *(rng.randrange(2_000_000_000_000) for _ in range(20_000))]:
        assert int(float(seconds(at)) * 1000) == at
