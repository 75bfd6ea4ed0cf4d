"""What is shown while something is delivered."""

from __future__ import annotations

import io
from pathlib import Path

from tests.unit.cli.made import FILE, deliver, make_run
from tracelet.cli.facts import look
from tracelet.cli.watch import Line, Pace, Watch
from tracelet.exporters.base import Delivered, RetryLater
from tracelet.spool import store
from tracelet.spool.cursor import Progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_a_line_comes_only_so_often_and_has_no_control_characters() -> None:
    out, clock = io.StringIO(), Clock()
    line = Line(out, every_s=5.0, clock=clock)
    for second in range(12):
        clock.now = float(second)
        line.show(f"at {second}")
    line.clear()
    assert out.getvalue() == "at 5\nat 10\n"


def test_the_pace_counts_from_what_waited_at_the_start(clean_environment: Path) -> None:
    folder = make_run(clean_environment, points=1000)
    manifest = store.read_manifest(folder)
    facts = look(store.RunFolder("a" * 32, folder, manifest))
    clock = Clock()
    pace, progress = Pace(facts, clock=clock), Progress(folder)
    progress.refresh()
    pace.take(progress.destinations)
    assert pace.words() == "file 0 of 1,000 points"
    deliver(folder, slots=502)
    clock.now = 2.0
    progress.refresh()
    pace.take(progress.destinations)
    assert pace.words() == "file 500 of 1,000 points (250/s)"
    assert pace.arrived(str(FILE["id"])) == 500
    clock.now = 9.0
    pace.take(progress.destinations)
    assert pace.still_s() == 7.0


def test_a_destination_is_in_trouble_from_its_not_now_until_its_next_yes() -> None:
    watch = Watch()
    watch.ask("mlflow-1", lambda: RetryLater("the server is away"))
    assert watch.trouble() == {"mlflow-1": "the server is away"}
    watch.ask("mlflow-1", Delivered)
    assert watch.trouble() == {}


def test_a_long_upload_by_a_destination_that_is_well_counts_as_asking() -> None:
    watch = Watch()
    seen: list[bool] = []

    def upload() -> Delivered:
        seen.append(watch.is_asking())
        return Delivered()

    watch.ask("mlflow-1", upload)
    assert seen == [True]
    assert watch.is_asking() is False
