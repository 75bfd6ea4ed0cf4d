"""MLflow on a real PostgreSQL, with two gateways writing into it at once."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stack.arrived import all_in_both
from tests.stack.harness import Stack, lacking, text_of
from tests.stack.training import train

RUNS = tuple(f"postgres-{number}" for number in range(6))
POINTS = 5_000


@pytest.fixture(scope="module")
def on_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two gateways, each with its share of the runs, and one database."""
    if not (shutil.which("initdb") or list(Path("/usr/lib/postgresql").glob("*/bin/initdb"))):
        lacking("PostgreSQL's initdb is neither on PATH nor below /usr/lib/postgresql")
    with Stack(tmp_path_factory.mktemp("postgres"), extras=["postgres"], gateways=2) as running:
        yield running


def ask_database(stack: Stack, statement: str) -> list[str]:
    """The rows of a statement, as text."""
    done = subprocess.run(
        ["psql", stack.postgres, "-At", "-c", statement],
        env={"PATH": "/usr/bin:/bin", "PGPASSFILE": stack.postgres_passfile},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_two_gateways_write_into_one_postgres_and_every_point_is_there_once(on_postgres: Stack, tmp_path: Path) -> None:
    train(tmp_path, RUNS, POINTS, on_postgres.otlp_http)
    for run_id in RUNS:
        all_in_both(on_postgres, run_id, POINTS)
    assert ask_database(on_postgres, "select count(*) from metrics") == [str(len(RUNS) * POINTS)]
    assert ask_database(on_postgres, "select count(*) from runs") == [str(len(RUNS))]
    folders = [Path(on_postgres.state["commands"][name]["folder"]) / "runs" for name in ("gateway", "gateway-2")]
    shares = [{path.name for path in folder.iterdir() if path.name in RUNS} for folder in folders]
    assert all(shares)  # both had some ...
    assert shares[0] | shares[1] == set(RUNS)
    assert not shares[0] & shares[1]  # ... and no run was written by both


def test_the_password_is_in_no_log_and_not_in_stack_json(on_postgres: Stack) -> None:
    password = Path(on_postgres.postgres_passfile).read_text().strip().rpartition(":")[2]
    assert len(password) == 32
    written = [path for path in on_postgres.folder.rglob("*") if path.is_file() and path.suffix in (".log", ".json")]
    assert len(written) > 5
    assert not [path for path in written if password in path.read_text(errors="replace")]
    assert text_of(f"{on_postgres.mlflow}/health") == "OK"
