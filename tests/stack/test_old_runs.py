"""Runs that are too old to be sent: exported, made into blocks by promtool, and read from a real Prometheus."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from tests.odd_labels import LABEL_NAMES
from tests.otlp_batches import points
from tests.sinks import until
from tests.spooled_run import write_run
from tests.stack.collectors import HOUR, MINUTE, MS, Prometheus, Sender, now_ns
from tests.stack.prometheus_server import promtool, shipped
from tracelet.exporters.prometheus import PrometheusExporter
from tracelet.records import Batch, Part, RunInfo, WriterOpened

DAY = 24 * HOUR
COUNT = 3000
STEP = MINUTE  # two days in all
NAMES = ("train/loss", "train.loss", "损失")
LONG = "--storage.tsdb.retention.time=90d"
SHORT = "--storage.tsdb.retention.time=15d"


def value_of(i: int) -> float:
    return math.nan if i == 4 else math.inf if i == 7 else i / 3


@pytest.fixture
def blocks(tmp_path: Path) -> Path:
    """Blocks of a run that was logged 30 days ago, made as docs/guide/old-runs.md says."""
    start = now_ns(30 * DAY)
    rows = [(start + i * STEP + 9 * MS, NAMES[i % 3], value_of(i), i - 5) for i in range(COUNT)]
    write_run(tmp_path / "spool", "old-run", Sender("old-run").resource, rows)
    text, folder = tmp_path / "run.om", tmp_path / "blocks"
    words = ["export", "old-run", "--dir", str(tmp_path / "spool"), "--format", "openmetrics", "-o", str(text)]
    subprocess.run([sys.executable, "-m", "tracelet", *words], check=True, timeout=120, cwd=tmp_path)
    promtool("tsdb", "create-blocks-from", "openmetrics", text, folder)
    return folder


def put_in(server: Prometheus, blocks: Path) -> None:
    """Move the blocks into the data folder of a server that stands still."""
    data = server.folder / "data"
    data.mkdir(exist_ok=True)
    for block in blocks.iterdir():
        shutil.copytree(block, data / block.name)


def stored(server: Prometheus, name: str = "ml_train_loss") -> int:
    return sum(len(each.values) for each in server.samples(name, back="60d"))


def everything_is_there(server: Prometheus) -> None:
    series = server.samples('{tracelet_run_id="old-run"}', back="60d")
    values = {s.labels["tracelet_metric_key"]: s for s in series if s.labels["__name__"] != "tracelet_iteration"}
    iterations = {s.labels["tracelet_metric_key"]: s for s in series if s.labels["__name__"] == "tracelet_iteration"}
    assert set(values) == set(iterations) == set(NAMES)
    for number, name in enumerate(NAMES):
        mine = list(range(number, COUNT, 3))
        assert [repr(value) for _, value in sorted(values[name].values.items())] == [repr(value_of(i)) for i in mine]
        assert [value for _, value in sorted(iterations[name].values.items())] == [float(i - 5) for i in mine]
        times = sorted(values[name].values)
        assert times == sorted(iterations[name].values)
        assert all(b - a == 3 * STEP // MS for a, b in pairwise(times))
        assert values[name].same_labels() == iterations[name].same_labels()


def test_blocks_of_an_old_run_are_read_after_a_restart_on_an_empty_server(tmp_path: Path, blocks: Path) -> None:
    server = shipped(tmp_path / "prometheus", LONG)
    put_in(server, blocks)
    with server:
        until(lambda: stored(server) > 0, 30)
        everything_is_there(server)


def with_recent_blocks(folder: Path, tmp_path: Path, retention: str) -> Prometheus:
    """A server, standing still, whose disk holds a block of an hour ago."""
    now = now_ns(4 * HOUR)
    sent = [(now + i * 1000 * MS, "recent", float(i), i) for i in range(3600)]
    write_run(tmp_path / "recent", "recent-run", Sender("recent-run").resource, sent)
    words = ["export", "recent-run", "--dir", str(tmp_path / "recent"), "--format", "openmetrics"]
    text = tmp_path / "recent.om"
    subprocess.run([sys.executable, "-m", "tracelet", *words, "-o", str(text)], check=True, timeout=120, cwd=tmp_path)
    server = shipped(folder, retention)
    promtool("tsdb", "create-blocks-from", "openmetrics", text, folder / "data")
    return server


def test_beside_recent_blocks_an_old_one_stays_if_the_retention_exceeds_its_age(tmp_path: Path, blocks: Path) -> None:
    server = with_recent_blocks(tmp_path / "prometheus", tmp_path, LONG)
    put_in(server, blocks)
    with server:
        until(lambda: stored(server, "ml_recent") == 3600, 30)
        everything_is_there(server)


def test_beside_recent_blocks_an_old_one_is_deleted_at_load_if_the_retention_is_shorter(
    tmp_path: Path, blocks: Path
) -> None:
    server = with_recent_blocks(tmp_path / "prometheus", tmp_path, SHORT)
    put_in(server, blocks)
    with server:
        until(lambda: stored(server, "ml_recent") == 3600, 30)
        assert stored(server) == 0
        left = {each.name for each in (server.folder / "data").iterdir()}
        assert not left & {each.name for each in blocks.iterdir()}


Found = dict[tuple[tuple[str, str], ...], dict[int, float]]


def sent_and_exported(tmp_path: Path, sender: Sender, *promoted: str) -> tuple[Found, Found]:
    """The same points of a run on two servers: sent to one, exported to the other. `promoted`: not the shipped list."""
    start, run_id = now_ns(HOUR), sender.run_id
    rows = [(f"m/{i % 2}", i / 8, i) for i in range(200)]
    write_run(tmp_path / "spool", run_id, sender.resource, [(start + i * 7 * MS, *row) for i, row in enumerate(rows)])
    text = tmp_path / "run.om"
    words = ["export", run_id, "--dir", str(tmp_path / "spool"), "--format", "openmetrics", "-o", str(text)]
    for name in promoted:
        words += ["--promote", name]
    subprocess.run([sys.executable, "-m", "tracelet", *words], check=True, timeout=120, cwd=tmp_path)
    sent = shipped(tmp_path / "sent")
    exported = shipped(tmp_path / "exported")
    if promoted:
        path = sent.folder / "prometheus.yaml"
        config = yaml.safe_load(path.read_text())
        config["otlp"]["promote_resource_attributes"] = list(promoted)
        path.write_text(yaml.safe_dump(config))
    promtool("tsdb", "create-blocks-from", "openmetrics", text, exported.folder / "data")
    with sent, exported:
        spec = {"url": f"{sent.otlp}/v1/metrics", "prefix": "ml.", "window_age_s": 1e6, "window_ahead_s": 60.0}
        way = PrometheusExporter(spec, {}, {})
        run = RunInfo(run_id, "vision", "cnn", f"name of {run_id}")
        opened = WriterOpened(start, "first", 1, 0, "a" * 16, start, sender.resource)
        part = Part("0" * 16, opened, (), points(rows, start=start, step=7 * MS))
        way.begin(Batch(1, run, "/nowhere", (part,))).attempt()
        selector = f'{{tracelet_run_id="{run_id}",job=~".+",tracelet_metric_key!=""}}'
        of_sent, of_exported = (
            {tuple(sorted(s.labels.items())): s.values for s in server.samples(selector)} for server in (sent, exported)
        )
        return of_sent, of_exported


def test_an_exported_point_has_the_labels_and_the_millisecond_of_a_sent_one(tmp_path: Path) -> None:
    sent, exported = sent_and_exported(tmp_path, Sender("both"))
    assert sent == exported
    assert len(sent) == 4


def test_a_promoted_attribute_of_any_name_is_the_label_that_prometheus_makes_of_it(tmp_path: Path) -> None:
    sent, exported = sent_and_exported(tmp_path, Sender("odd", more=dict.fromkeys(LABEL_NAMES, "x")), *LABEL_NAMES)
    assert sent == exported
    assert len(sent) == 4
    own = {name for name, value in next(iter(sent)) if value == "x"}
    assert own == set(LABEL_NAMES.values())
