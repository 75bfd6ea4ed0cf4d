"""Real shippers killed while a real MLflow server carries out what they asked: one run, each row sent once.

Pattern: a proxy in front of the server kills the shipper before each answer, one after the other. Limit: three minutes.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest

import tracelet
from tests.servers import MlflowServer, Seen, Spoil, get_run, recording_proxy, rows_of
from tests.shipping import until
from tracelet.launch import start_shipper
from tracelet.spool import store
from tracelet.spool.cursor import Progress
from tracelet.spool.lease import shipper_alive


def test_a_shipper_killed_before_each_answer_makes_one_run_and_sends_no_row_twice(
    tmp_path: Path, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACELET_SHIPPER", "off")
    (tmp_path / "model.bin").write_bytes(b"weights")
    with recording_proxy(mlflow_server.uri) as proxy:
        config = tracelet.ExperimentConfig(project="kills", tracking_uri=proxy.uri)
        exp = tracelet.Experiment(name="killed", config=config)
        exp.log_params({"lr": 0.1})
        for i in range(3_000):
            exp.log_metric("loss", 1.0, iteration=i)
        exp.log_artifact(tmp_path / "model.bin", "models/model.bin")
        exp.stop()
        (found,) = store.list_runs(Path(os.environ["TRACELET_DIR"]))
        kinds = Counter[str]()

        def rule(seen: Seen) -> Spoil:
            """What has been asked is carried out, and who asked hears nothing any more: twice for each kind."""
            kind = seen.path.partition("?")[0].rpartition("/")[2] + ("-points" if b'"metrics"' in seen.body else "")
            if seen.method != "GET" and kinds[kind] < 2:
                kinds[kind] += 1
                pid = shipper_alive(found.folder)
                assert pid is not None
                return Spoil(hang_up=True, carried_out=lambda: os.kill(pid, signal.SIGKILL))
            return Spoil()

        proxy.rule = rule
        for _ in range(20):
            shipper = start_shipper(found.folder, {}, environ=dict(os.environ))
            until(shipper.has_ended, within_s=60)
            if _all_done(found.folder):
                break
        assert {"create", "log-batch", "log-batch-points", "model.bin", "update"} <= set(kinds)
        points = [seen.body for seen in proxy.calls("runs/log-batch") if b'"metrics"' in seen.body]
        assert len(points) == len(set(points)), "points that are stored were sent again"
    query = {"experiment_ids": [_experiment(mlflow_server)], "filter": f"tags.`tracelet.run.id` = '{exp.id}'"}
    (run,) = mlflow_server.ask("runs/search", query)["runs"]
    run_id = run["info"]["run_id"]
    assert [row.step for row in rows_of(mlflow_server, run_id, "loss")] == list(range(3_000))
    assert get_run(mlflow_server, run_id).info.status == "FINISHED"
    assert get_run(mlflow_server, run_id).data.params == {"lr": "0.1"}
    assert mlflow_server.artifacts(run_id) == {"models/model.bin": 7}


def _all_done(folder: Path) -> bool:
    progress = Progress(folder)
    progress.refresh()
    return bool(progress.destinations) and all(
        one.done and all(one.done.values()) for one in progress.destinations.values()
    )


def _experiment(server: MlflowServer) -> str:
    found = server.ask("experiments/get-by-name?experiment_name=kills")
    return str(found["experiment"]["experiment_id"])
