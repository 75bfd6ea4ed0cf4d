"""How a command is called and how it leaves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.cli.made import make_run
from tracelet.cli.main import main
from tracelet.version import __version__

TRACELET = (sys.executable, "-m", "tracelet")


@pytest.mark.parametrize("argv", [[], ["shipp"], ["runs", "--colour"], ["ship", "--folow"], ["show"]])
def test_what_is_no_command_is_a_usage_error(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2


def test_a_wrong_setting_is_one_line_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACELET_DIRR", "x")
    assert main(["runs"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == "tracelet runs: TRACELET_DIRR in the environment is no setting: did you mean TRACELET_DIR?\n"


def test_python_m_tracelet_is_the_command() -> None:
    done = subprocess.run([*TRACELET, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"tracelet {__version__}\n"


def test_a_reader_that_has_seen_enough_is_no_error(clean_environment: Path) -> None:
    for number in range(300):
        make_run(clean_environment, f"run-{number:03}", points=0)
    command = f"{' '.join(TRACELET)} runs --json | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[\n", "")


def test_help_shows_examples_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["prune", "--help"])
    assert "\nexamples:\n  tracelet prune --dry-run\n  tracelet prune --keep 1d,500MB\n" in capsys.readouterr().out


def test_listing_runs_loads_no_exporter_and_no_mlflow(clean_environment: Path) -> None:
    code = (
        "import sys; from tracelet.cli.main import main; main(['runs']);"
        "print([m for m in ('mlflow', 'numpy', 'grpc', 'requests', 'opentelemetry.sdk') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
