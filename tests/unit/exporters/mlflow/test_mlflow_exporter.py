"""What the MLflow exporter is before it meets an MLflow."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.mlflow_batches import batch, run_info
from tracelet.errors import ConfigError
from tracelet.exporters.mlflow.exporter import MLflowExporter


def test_a_server_is_served_without_mlflow_or_any_http_package() -> None:
    code = (
        "import sys\n"
        "from tracelet.exporters.mlflow.exporter import MLflowExporter\n"
        "MLflowExporter({'tracking_uri': 'http://127.0.0.1:1'}, {}, {})\n"
        "heavy = {'mlflow', 'requests', 'urllib3', 'sqlalchemy', 'numpy', 'grpc', 'opentelemetry'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_active_is_importable_without_mlflow() -> None:
    code = "import sys, tracelet.exporters.mlflow.active\nprint('mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"


def test_an_address_without_a_host_is_an_error_at_once() -> None:
    with pytest.raises(ConfigError, match="no host"):
        MLflowExporter({"tracking_uri": "http://"}, {}, {})


def test_a_batch_before_the_run_is_open_is_a_fault_of_the_caller() -> None:
    exporter = MLflowExporter({"tracking_uri": "http://127.0.0.1:1"}, {}, {})
    assert exporter.memory() == {}
    with pytest.raises(RuntimeError, match="open"):
        exporter.begin(batch(run_info("r")))


def test_credentials_missing_after_a_restart_come_from_the_same_address_in_the_environment() -> None:
    public = {"tracking_uri": "http://127.0.0.1:1"}
    later = MLflowExporter(public, {}, {"MLFLOW_TRACKING_URI": "http://me:word@127.0.0.1:1/"})
    other = MLflowExporter(public, {}, {"MLFLOW_TRACKING_URI": "http://me:word@127.0.0.1:2"})
    assert (later._uri, other._uri) == ("http://me:word@127.0.0.1:1/", "http://127.0.0.1:1")
