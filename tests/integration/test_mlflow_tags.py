"""The tags taken in the training process are those that MLflow's own client sets, compared with MLflow itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, os, sys
from pathlib import Path
from mlflow.tracking.context.registry import resolve_tags
from tracelet.collectors.environment import take
ours = take(dict(os.environ), Path.cwd(), sys.argv).mlflow_tags
print(json.dumps([dict(ours), resolve_tags()]))
"""
ROOT = Path(__file__).parents[2]


def both(folder: Path, *command: str, **environ: str) -> list[dict[str, str]]:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder), **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    tags: list[dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return tags


def git(folder: Path, *arguments: str) -> None:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def test_they_are_mlflows_own_in_a_repository_and_outside(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    (inside / "src").mkdir(parents=True)
    (inside / "src" / "train.py").write_text(SCRIPT)
    git(inside, "init", "-b", "trunk")
    git(inside, "remote", "add", "origin", "https://user:s3cret@host/a.git")
    git(inside, "remote", "add", "backup", "https://other/a.git")
    git(inside, "add", ".")
    git(inside, "commit", "-m", "one")
    ours, theirs = both(inside, "src/train.py", MLFLOW_RUN_CONTEXT='{"team": "ml"}', MLFLOW_TRACKING_USERNAME="ada")
    assert ours == theirs
    assert theirs["mlflow.source.git.repoURL"] == "https://host/a.git"  # else nothing was compared
    outside = tmp_path / "outside"
    outside.mkdir()
    ours, theirs = both(outside, "-c", SCRIPT)
    assert ours == theirs
    git(inside, "checkout", "--detach")
    ours, theirs = both(inside, str(inside / "src" / "train.py"))
    assert ours == theirs
