"""Files from a training program through a real gateway into a real MLflow: by a shared folder, by PUT, by reference."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from tests.servers import MlflowServer, free_port, run_of

SIZE = 30_000_000

TRAINING = """
import sys, tracelet
exp = tracelet.start_logging(exp_name=sys.argv[1], project="artifacts", backend=tracelet.OTLP(sys.argv[2]))
exp.log_metric("loss", 0.5, iteration=1)
exp.log_artifact(sys.argv[3], "models/best.bin")
delivered = exp.flush(timeout=120)
tracelet.stop_logging()
sys.exit(0 if delivered else 3)
"""


def until(done: Callable[[], Any], what: str, within_s: float = 60.0) -> Any:
    limit = time.monotonic() + within_s
    while not (found := done()):
        assert time.monotonic() < limit, what
        time.sleep(0.05)
    return found


class Gateway:
    """`tracelet gateway` as a person starts it; can be killed and started again on its port."""

    def __init__(self, folder: Path, mlflow: str, *options: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._words = [sys.executable, "-m", "tracelet", "gateway", "--http-port", str(self.port), "--grpc-port", "off"]
        self._words += ["--dir", str(folder / "gateway"), "--mlflow", mlflow, *options]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "OTEL_", "TRACELET_"))}
        with (self.folder / "gateway.log").open("ab") as log:
            self.process = subprocess.Popen(self._words, env=kept, stdout=log, stderr=log)
        until(self._answers, f"the gateway does not answer: {(self.folder / 'gateway.log').read_text()[-3000:]}")

    def _answers(self) -> bool:
        try:
            with urlopen(f"{self.address}/readyz", timeout=2) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()


@contextmanager
def gateway(folder: Path, mlflow: str, *options: str) -> Iterator[Gateway]:
    one = Gateway(folder, mlflow, *options)
    try:
        one.start()
        yield one
    finally:
        one.stop()


def train(
    folder: Path, name: str, endpoint: str, file: Path, *, program: str = TRAINING, **environ: str
) -> subprocess.Popen[bytes]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "OTEL_", "TRACELET_"))}
    variables = {**kept, "TRACELET_DIR": str(folder / "spool"), **environ}
    with (folder / "training.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", program, name, endpoint, str(file)], env=variables, stdout=log, stderr=log
        )


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    try:
        assert process.wait(150) == 0, (folder / "training.log").read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "best.bin"
    file.write_bytes(random.Random(4).randbytes(SIZE))
    return file


def stored(server: MlflowServer, run_id: str, path: str) -> Path | None:
    return next(iter((server.folder / "artifacts").glob(f"*/{run_id}/artifacts/{path}")), None)


def same_bytes(server: MlflowServer, name: str, file: Path) -> bool:
    run = run_of(server, name, project="artifacts", status="FINISHED", within_s=60)
    there = until(lambda: stored(server, run.info.run_id, "models/best.bin"), "no artifact in MLflow")
    assert not any(path.endswith(".reference.json") for path in server.artifacts(run.info.run_id))
    return hashlib.sha256(there.read_bytes()).digest() == hashlib.sha256(file.read_bytes()).digest()


def test_a_file_comes_by_a_folder_that_both_sides_see(mlflow_server: MlflowServer, tmp_path: Path, file: Path) -> None:
    shared = tmp_path / "shared"
    name = f"by-folder-{os.urandom(4).hex()}"
    with gateway(tmp_path, mlflow_server.uri, "--artifact-prefix", f"file://{shared}") as one:
        finish(train(tmp_path, name, one.address, file, TRACELET_ARTIFACT_STORE=f"file://{shared}"), tmp_path)
        assert same_bytes(mlflow_server, name, file)


class Cut:
    """A relay to a port that breaks the first connection which sent more than `after` bytes, and calls `then`."""

    def __init__(self, port: int, after: int, then: Callable[[], None]) -> None:
        self._port, self._after, self._then = port, after, then
        self.is_cut = False
        self.passed = 0  # to the port, on all connections
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                inner, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._relay, args=(inner,), daemon=True).start()

    def _relay(self, inner: socket.socket) -> None:
        try:
            outer = socket.create_connection(("127.0.0.1", self._port), timeout=30)
        except OSError:
            inner.close()
            return
        threading.Thread(target=self._copy, args=(outer, inner, None), daemon=True).start()
        self._copy(inner, outer, self._after)

    def _copy(self, source: socket.socket, target: socket.socket, after: int | None) -> None:
        passed = 0
        try:
            while data := source.recv(65536):
                target.sendall(data)
                passed += len(data)
                self.passed += len(data) if after is not None else 0
                if after is not None and passed > after and not self.is_cut:
                    self.is_cut = True
                    self._then()
                    break
        except OSError:
            pass
        for one in (source, target):
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            one.close()


def test_a_file_put_to_the_gateway_survives_a_cut_and_the_gateways_death(
    mlflow_server: MlflowServer, tmp_path: Path, file: Path
) -> None:
    name = f"by-put-{os.urandom(4).hex()}"
    tokens = tmp_path / "tokens.toml"
    tokens.write_text('[[token]]\nname = "team-a"\ntoken = "long-enough-for-a-token-a"\nprojects = ["*"]\n')
    secret = tmp_path / "token"
    secret.write_text("long-enough-for-a-token-a\n")
    with gateway(tmp_path, mlflow_server.uri, "--tokens", str(tokens)) as one:
        cut = Cut(one.port, 12_000_000, one.kill)
        try:
            process = train(
                tmp_path,
                name,
                one.address,
                file,
                TRACELET_ARTIFACT_GATEWAY=cut.address,
                TRACELET_ARTIFACT_TOKEN_FILE=str(secret),
                OTEL_EXPORTER_OTLP_HEADERS="authorization=Bearer%20long-enough-for-a-token-a",
            )
            until(lambda: cut.is_cut, "nothing was cut")
            until(lambda: one.process is not None and one.process.poll() is not None, "the gateway still lives")
            (part,) = (tmp_path / "gateway" / "artifacts").glob("*/*.part")
            assert 0 < part.stat().st_size < SIZE
            one.start()
            finish(process, tmp_path)
            assert same_bytes(mlflow_server, name, file)
            assert cut.passed < SIZE + 8_000_000  # it went on where it was: from the start it would be 12 MB more
            until(lambda: held_bytes(one) == 0, "MLflow has the file, and the gateway keeps it")
        finally:
            cut.close()
    for log in ("training.log", "gateway.log"):
        assert "long-enough-for-a-token-a" not in (tmp_path / log).read_text()


TRAINING_ON = """
import sys, tracelet
from pathlib import Path
exp = tracelet.start_logging(exp_name=sys.argv[1], project="artifacts", backend=tracelet.OTLP(sys.argv[2]))
for number in range(6):
    exp.log_metric("loss", 0.5, iteration=number)
    Path(sys.argv[3]).write_bytes(bytes([number]) * 3_000_000)
    exp.log_artifact(sys.argv[3], f"models/{number}.bin", copy=True)
    exp.log_artifact(sys.argv[3], f"again/{number}.bin", copy=True)
    exp.log_artifact(sys.argv[3], "models/last.bin", copy=True)
delivered = exp.flush(timeout=120)
tracelet.stop_logging()
sys.exit(0 if delivered else 3)
"""


def held_bytes(one: Gateway) -> float:
    with urlopen(f"{one.address}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith("tracelet_gateway_artifact_bytes "))


def test_more_than_the_quota_arrives_since_what_mlflow_has_goes(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    """Six files of 3 MB, each under three names, through room for two of them; the gateway killed after the first."""
    name = f"quota-{os.urandom(4).hex()}"
    with gateway(tmp_path, mlflow_server.uri, "--artifact-quota", "7MB") as one:
        file = tmp_path / "last.bin"
        process = train(tmp_path, name, one.address, file, program=TRAINING_ON, TRACELET_ARTIFACT_GATEWAY=one.address)
        until(lambda: list((tmp_path / "gateway" / "artifacts").glob("*/*.had-*")), "MLflow has none of the files")
        one.kill()
        one.start()
        finish(process, tmp_path)
        run = run_of(mlflow_server, name, project="artifacts", status="FINISHED", within_s=60)
        assert sorted(mlflow_server.artifacts(run.info.run_id)) == sorted(
            [f"{folder}/{number}.bin" for folder in ("models", "again") for number in range(6)] + ["models/last.bin"]
        )
        for path, number in [("models/0.bin", 0), ("again/5.bin", 5), ("models/last.bin", 5)]:
            there = stored(mlflow_server, run.info.run_id, path)
            assert there is not None
            assert there.read_bytes() == bytes([number]) * 3_000_000
        until(lambda: held_bytes(one) == 0, "MLflow has the files, and the gateway keeps some")


@pytest.mark.parametrize("why", ["no place", "no prefix", "too large"])
def test_what_may_not_be_copied_is_a_reference(
    mlflow_server: MlflowServer, tmp_path: Path, file: Path, why: str
) -> None:
    name = f"reference-{os.urandom(4).hex()}"
    store = {} if why == "no place" else {"TRACELET_ARTIFACT_STORE": f"file://{tmp_path}/shared"}
    options = ["--artifact-prefix", f"file://{tmp_path}/shared", "--artifact-max-bytes", "1MB"]
    with gateway(tmp_path, mlflow_server.uri, *(options if why == "too large" else [])) as one:
        finish(train(tmp_path, name, one.address, file, **store), tmp_path)
        run = run_of(mlflow_server, name, project="artifacts", status="FINISHED", within_s=60)
    there = stored(mlflow_server, run.info.run_id, "models/best.bin.reference.json")
    assert there is not None
    told = json.loads(there.read_text())
    assert set(told) == {"uri", "digest", "size", "media_type", "why"}
    assert told["size"] == SIZE
    assert told["uri"].startswith(f"file://{tmp_path}/" + ("shared/" if store else ""))
    if store:
        assert told["digest"] == "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()
    assert told["uri"] in run.data.tags["tracelet.artifact.models/best.bin"]
    assert stored(mlflow_server, run.info.run_id, "models/best.bin") is None
