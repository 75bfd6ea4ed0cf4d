"""What `runs` and `show` say of a folder is what stands in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.cli.made import FILE, MLFLOW, NOON, deliver, make_run
from tracelet.cli.facts import count_beyond
from tracelet.cli.main import main
from tracelet.records import ErrorInfo, SpanEnded, SpanStarted
from tracelet.spool import store
from tracelet.spool.reader import START, SpoolReader

ONE, TWO = "1" * 31 + "a", "1" * 31 + "b"


@pytest.fixture
def spool(clean_environment: Path) -> Path:
    return clean_environment


def lines(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> list[str]:
    assert main(argv) == code
    return capsys.readouterr().out.splitlines()


def listed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    assert main(["runs", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, list)
    return found


def test_an_empty_spool_is_said_so(spool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(capsys, "runs") == [f"No runs in {spool}."]


def test_a_delivered_run_waits_for_nobody(spool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deliver(make_run(spool, points=1200, decided=True))
    header, row, *more = lines(capsys, "runs")
    assert header.split() == ["RUN", "PROJECT/NAME", "STATE", "STARTED", "LOGGED", "DELIVERED", "WAITING", "SHIPPER"]
    cells = row.split("  ")
    assert cells[0] == "aaaaaaaa"
    assert [c.strip() for c in cells if c.strip()][1:3] == ["examples/digits", "FINISHED"]
    assert "file 1,200" in row
    assert more == []


def test_what_waits_is_counted_exactly_for_each_destination(spool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(spool, points=70_000, destinations=(FILE, MLFLOW), decided=True)
    deliver(folder, slots=40_002)  # the opening and one name are slots, too
    deliver(folder, "mlflow-00000001", slots=2, done=False)
    [run] = listed(capsys)
    assert run["logged"] == 70_000
    assert [(d["delivered"], d["waiting"]) for d in run["destinations"]] == [(40_000, 30_000), (0, 70_000)]  # type: ignore[attr-defined]
    text = "\n".join(lines(capsys, "runs"))
    assert "30,000 for file, 70,000 for mlflow" in text
    assert "tracelet ship aaaaaaaa" in text


def test_the_count_stays_right_when_delivered_segments_are_gone(
    spool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(spool, points=1000, slots=100, decided=True)
    deliver(folder)
    segments = sorted(folder.glob("*.points"))
    assert len(segments) > 5
    for path in segments[:5]:
        path.unlink()
    assert listed(capsys)[0]["logged"] == 1000


def test_a_run_that_died_and_was_not_delivered_is_told_from_one_whose_end_is_decided(
    spool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(spool, "undecided", ended=None, started=NOON + 2)
    make_run(spool, "killed", ended="KILLED", decided=True, started=NOON + 1)
    assert [(run["run_id"], run["state"]) for run in listed(capsys)] == [
        ("undecided", "ended, not delivered"),
        ("killed", "KILLED"),
    ]


def test_a_run_with_all_points_but_not_its_end_still_waits(spool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deliver(make_run(spool, decided=True), done=False)
    assert "the end for file" in "\n".join(lines(capsys, "runs"))
    assert listed(capsys)[0]["undelivered"] is True


def test_a_run_without_a_destination_is_undelivered_and_the_way_out_is_named(
    spool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(spool, destinations=())
    text = "\n".join(lines(capsys, "runs"))
    assert "3 for no destination" in text
    assert "tracelet ship aaaaaaaa --to mlflow" in text


def test_what_the_program_delivers_by_itself_does_not_wait_for_a_shipper(
    spool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(spool, destinations=({"id": "console-1", "kind": "console", "spec": {}, "in_process": True},))
    assert listed(capsys)[0]["undelivered"] is False


def test_a_manifest_of_tomorrow_is_named_and_hides_no_other_run(
    spool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(spool, "tomorrow")
    (folder / store.MANIFEST).write_text(json.dumps({"format": 99}))
    make_run(spool, "today")
    text = "\n".join(lines(capsys, "runs"))
    assert "unreadable" in text
    assert "format 99" in text
    assert "today" in text


def test_random_ids_are_cut_where_they_differ_and_given_ones_are_not(
    spool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run_id in (ONE, TWO, "nightly-of-tuesday-the-third"):
        deliver(make_run(spool, run_id))
    first = {line.split()[0] for line in lines(capsys, "runs")[1:]}
    assert first == {ONE, TWO, "nightly-of-tuesday-the-third"}


def test_a_prefix_that_means_two_runs_is_refused_with_both_names(
    spool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(spool, "exp-1")
    make_run(spool, "exp-2")
    assert main(["show", "exp"]) == 2
    assert "exp-1, exp-2" in capsys.readouterr().err


def test_a_whole_id_wins_over_being_the_beginning_of_another(spool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(spool, "exp")
    make_run(spool, "exp-2")
    assert lines(capsys, "show", "exp")[0].split() == ["run", "exp"]


@pytest.mark.parametrize("wanted", ["a" * 32, "aaaa", "digits", "FOLDER", "PARENT"])
def test_a_run_is_found_by_id_prefix_name_and_path(
    spool: Path, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(spool)
    wanted = wanted.replace("FOLDER", str(folder)).replace("PARENT", str(folder.parent))
    assert lines(capsys, "show", wanted)[0].split() == ["run", "a" * 32]


@pytest.mark.parametrize("wanted", ["nothing", "/nowhere/at/all", "."])
def test_a_run_that_is_not_there_is_a_usage_error(
    spool: Path, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(spool)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert main(["show", wanted]) == 2


def test_show_has_params_tags_metrics_and_last_values(spool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(spool, points=5, params={"model.layers": 3}, tags={"team": "ml"}, slots=4)
    text = "\n".join(lines(capsys, "show", "aaaa"))
    assert "model.layers  3" in text
    assert "team  ml" in text
    metric = next(line for line in text.splitlines() if line.startswith("  loss"))
    assert metric.split()[:4] == ["loss", "5", "0.2", "4"]


def test_show_reads_delivered_segments_too(spool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(spool, points=500, slots=100)
    deliver(folder)
    (folder / "delivered").mkdir()
    for path in sorted(folder.glob("*.points"))[:3]:
        path.rename(folder / "delivered" / path.name)
    assert main(["show", "aaaa", "--json"]) == 0
    [run] = json.loads(capsys.readouterr().out)
    assert run["metrics"]["loss"]["count"] == 500


def test_show_has_the_link_and_the_last_refusals(spool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(spool, destinations=(MLFLOW,))
    deliver(folder, "mlflow-00000001", refused=1, memory={"link": "http://mlflow.example:5000/#/runs/1"})
    letter = {"time_unix_nano": NOON, "what": "param", "reason": "too\nlong \x1b[31m"}
    (folder / "rejected-mlflow-00000001.jsonl").write_text(json.dumps(letter) + '\n{"torn')
    text = "\n".join(lines(capsys, "show", "aaaa"))
    assert "http://mlflow.example:5000/#/runs/1" in text
    assert "param  too long ?[31m" in text


def test_json_has_no_nan(spool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(spool, points=1)  # its only value is NaN
    assert main(["show", "aaaa", "--json"]) == 0

    def refuse(token: str) -> object:
        raise AssertionError(token)

    [run] = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert run["metrics"]["loss"]["last"] == "nan"


def test_show_names_the_phase_a_killed_run_died_in(spool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = ErrorInfo("ValueError", "out of cheese", "")
    phases = (
        SpanStarted("01" * 8, "00" * 8, "load", NOON),
        SpanEnded("01" * 8, NOON + 65 * 10**9),
        SpanStarted("02" * 8, "00" * 8, "warm up", NOON),
        SpanEnded("02" * 8, NOON + 10**9, error),
        SpanStarted("03" * 8, "00" * 8, "train", NOON),
    )
    make_run(spool, records=phases, ended=None)
    text = "\n".join(lines(capsys, "show", "aaaa"))
    phase = {line.split("  ")[1].strip(): line for line in text.splitlines() if line.startswith("  ")}
    assert phase["load"].endswith("1 min 5 s")
    assert phase["warm up"].endswith("1 s        ValueError: out of cheese")
    assert phase["train"].endswith("not ended")


def test_what_the_system_refuses_is_one_line_and_no_traceback(spool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spool.symlink_to(spool)  # looking into it is an error of the system, also for root
    assert main(["runs"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("tracelet runs: ")
    assert str(spool) in told
    assert told.count("\n") == 1


def test_a_manifest_that_the_disk_does_not_give_back_is_said_beside_its_run(
    spool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(spool)
    for name in (store.MANIFEST, store.COPY):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
    assert main(["runs"]) == 0
    assert "can't be read" in "".join(capsys.readouterr())


def test_where_stores_may_be_late_what_stands_behind_a_sealed_segment_is_counted_too(spool: Path) -> None:
    folder = make_run(spool, points=100, slots=64)
    reader = SpoolReader(folder, strong_order=False)
    (writer,) = reader.writers()
    assert store.seal(folder, writer, 1)
    assert count_beyond(reader, writer, START, dead=False) == (100, 1)
    reader.close()
