"""A name that nobody can resolve, and then somebody can, under one shipper: its log says so, and all arrives.

Pattern: a real program in a mount namespace of its own, whose hosts file is the test's and whose name server does not
answer; its shipper runs all the while, and the name appears in the hosts file under it. Limit: a minute a test.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests import hosts
from tests.programs import LIMIT_S, said, started
from tests.shipping import until
from tests.sinks import GrpcSink, HttpSink
from tests.spooled import folder_of
from tests.stack.harness import lacking
from tracelet.spool.lease import shipper_alive

NAME = "collector.invalid"  # no name server may ever know it (RFC 6761)

TRAIN = """
import sys, tracelet
exp = tracelet.start_logging(exp_name="job", project="names", run_id="run")
for i in range(1000):
    exp.log_metric("loss", 1 / (i + 1), iteration=i)
print("logged", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def names(tmp_path: Path) -> hosts.Names:
    made = hosts.Names(tmp_path)
    if subprocess.run([*made.words, "true"], check=False, capture_output=True, timeout=30).returncode != 0:
        lacking("a hosts file of a process's own takes the right to make namespaces")
    return made


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_a_name_that_can_not_be_resolved_is_said_and_all_arrives_once_it_can(
    names: hosts.Names, tmp_path: Path, clean_environment: Path, kind: str
) -> None:
    with GrpcSink() if kind == "grpc" else HttpSink() as sink:
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{NAME}:{sink.endpoint.rpartition(':')[2]}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc" if kind == "grpc" else "http/protobuf",
        }
        with started(tmp_path, TRAIN, before=names.words, **variables) as program:
            assert said(program) == "logged"
            folder = folder_of(clean_environment)
            log = folder / "shipper.log"
            until(lambda: log.exists() and "not now" in log.read_text(), LIMIT_S)
            assert NAME in log.read_text()
            assert "resol" in log.read_text()
            shipper = shipper_alive(folder)
            assert shipper is not None
            assert sink.requests == []
            names.add(NAME, "127.0.0.1")
            until(lambda: len(sink.points("run")) >= 1000, LIMIT_S)
            assert shipper_alive(folder) == shipper, "it is the one that could not resolve the name"
            assert program.stdin is not None
            program.stdin.close()
            until(lambda: sink.ends("run"), LIMIT_S)
        assert [point.iteration for point in sink.points("run")] == list(range(1000))
        assert sink.ends("run") == ["FINISHED"]
        assert list(folder.glob("rejected-*")) == []
        until(lambda: shipper_alive(folder) is None, LIMIT_S)


TRIES = """
import os, sys
from tests.otlp_batches import RUN, batch, otlp_spec
from tracelet.exporters.otlp import OTLPExporter
exporter = OTLPExporter(otlp_spec(sys.argv[1], protocol=sys.argv[2]), {}, os.environ)
exporter.open(RUN, {})
delivery = exporter.begin(batch([("loss", 1.0, 1)]))
for _ in sys.stdin:
    print(type(delivery.attempt()).__name__, flush=True)
"""


@pytest.mark.parametrize("kind", ["http/protobuf", "grpc"])
def test_the_first_try_after_a_name_is_there_finds_it(names: hosts.Names, tmp_path: Path, kind: str) -> None:
    """A channel of gRPC would keep for up to two minutes to what its resolver was told last."""
    with GrpcSink() if kind == "grpc" else HttpSink() as sink:
        address = f"http://{NAME}:{sink.endpoint.rpartition(':')[2]}"
        more = {"PYTHONPATH": os.getcwd()}
        with started(tmp_path, TRIES, address, kind, before=names.words, **more) as program:

            def tried() -> str:
                assert program.stdin is not None
                program.stdin.write("once more\n")
                program.stdin.flush()
                return said(program)

            assert [tried() for _ in range(3)] == ["RetryLater"] * 3
            names.add(NAME, "127.0.0.1")
            assert tried() == "Delivered"
        assert [point.iteration for point in sink.points()] == [1]
