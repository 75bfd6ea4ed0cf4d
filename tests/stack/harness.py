"""The real stack for tests: started by scripts/stack.py, stopped and started piece by piece, and asked what arrived."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "scripts" / "stack.py"
# As they were when the tests were collected: a test itself has a clean environment.
REQUIRED = os.environ.get("TRACELET_TEST_REQUIRE_STACK") == "1"
CACHE = {name: os.environ[name] for name in ("TRACELET_STACK_CACHE",) if name in os.environ}

Series = Mapping[str, str]
Sample = tuple[int, float]  # milliseconds, value

_opener = build_opener(ProxyHandler({}))


def stack_command(*words: str) -> list[str]:
    """The command line of scripts/stack.py, with this Python."""
    return [sys.executable, str(SCRIPT), *words]


def environment() -> dict[str, str]:
    """What stack.py is started with: the caller's, and where the built programs lie."""
    return {**os.environ, **CACHE, "PYTHONUNBUFFERED": "1"}


def program(name: str) -> Path:
    """The path of a real program; skips the test if it is not built (fails it where the stack is required)."""
    asked = subprocess.run(
        stack_command("where", name), capture_output=True, text=True, check=False, env=environment(), timeout=120
    )
    if asked.returncode:
        lacking(asked.stderr.strip())
    return Path(asked.stdout.strip())


def require(*names: str) -> None:
    """Skip, or fail, unless all these programs are there."""
    for name in names:
        program(name)


def lacking(reason: str) -> NoReturn:
    """Skip for this reason; fail where .ci/run says that nothing may be missing."""
    if REQUIRED:
        pytest.fail(f"TRACELET_TEST_REQUIRE_STACK=1, and {reason}", pytrace=False)
    pytest.skip(reason)


class Backends:
    """A Prometheus and an MLflow server, by their addresses: asked what has arrived."""

    def __init__(self, prometheus: str, mlflow: str) -> None:
        self.prometheus, self.mlflow = prometheus, mlflow

    # ---- what Prometheus has

    def query(self, promql: str, at: float | None = None) -> list[dict[str, Any]]:
        """The result of an instant query, as Prometheus gives it: `metric` and `value` of each series."""
        found = self._prometheus("query", {"query": promql, **({} if at is None else {"time": f"{at:.3f}"})})
        return list(found["result"])

    def query_range(self, promql: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """The result of a range query: `metric` and `values` of each series."""
        asked = {"query": promql, "start": f"{start:.3f}", "end": f"{end:.3f}", "step": f"{step:.3f}"}
        return list(self._prometheus("query_range", asked)["result"])

    def samples(self, selector: str, window: str = "10d", at: float | None = None) -> list[tuple[Series, list[Sample]]]:
        """Each series of a selector with every stored sample of the window: exact milliseconds, no steps."""
        found = self.query(f"{selector}[{window}]", time.time() + 900 if at is None else at)
        return [(s["metric"], [(round(float(t) * 1000), float(v)) for t, v in s["values"]]) for s in found]

    def _prometheus(self, call: str, asked: Mapping[str, str]) -> Any:
        answer = ask(f"{self.prometheus}/api/v1/{call}", urlencode(asked).encode())
        assert answer["status"] == "success", answer
        return answer["data"]

    # ---- what MLflow has (`tests.servers.run_of` and `get_run` take a Stack too)

    def ask(self, call: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer of MLflow's REST API; errors raise."""
        data = None if body is None else json.dumps(body).encode()
        return ask(f"{self.mlflow}/api/2.0/mlflow/{call}", data, "application/json")

    def mlflow_run(self, run_id: str, within_s: float = 60.0, status: str | None = None) -> dict[str, Any]:
        """MLflow's run of a tracelet run id (with that status), as soon as it is there; a dict as of the REST API."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            experiments = self.ask("experiments/search", {"max_results": 1000}).get("experiments", [])
            wanted = {
                "experiment_ids": [e["experiment_id"] for e in experiments],
                "filter": f"tags.`tracelet.run.id` = '{run_id}'",
                "max_results": 10,
            }
            found[:] = self.ask("runs/search", wanted).get("runs", []) if experiments else []
            return any(status in (None, run["info"]["status"]) for run in found)

        wait_until(there, within_s, lambda: f"no run {run_id} with status {status} in MLflow: {found}")
        assert len(found) == 1, f"{len(found)} runs of MLflow for one: {[run['info'] for run in found]}"
        return found[0]

    def mlflow_history(self, run_id: str, key: str) -> list[tuple[int, int, float]]:
        """All rows of a metric of MLflow's run: step, milliseconds, value, sorted."""
        rows: list[tuple[int, int, float]] = []
        token = ""
        while True:
            asked = {"run_id": run_id, "metric_key": key, "max_results": "25000"}
            if token:
                asked["page_token"] = token
            page = self.ask(f"metrics/get-history?{urlencode(asked)}")
            rows += [(int(m.get("step", 0)), int(m["timestamp"]), float(m["value"])) for m in page.get("metrics", [])]
            token = page.get("next_page_token") or ""
            if not token:
                return sorted(rows)


class Stack(Backends):
    """A running stack, from `with` to its end: real programs, real files of collector-config/.

    Attributes are the addresses of stack.json: `otlp_http`, `otlp_grpc`, `prometheus`, `mlflow`, `gateway`, `gateways`,
    `collector_health`, `collector_metrics`, and with extras `loki`, `kafka`, `postgres`.

    Args:
        folder: where data, logs and stack.json go; deep inside a test's own folder, so that leftovers are found.
        extras: of loki, kafka, postgres.
        configs: files for the collector, by name in collector-config/ or as paths; default: the usual one.
        environment: variables for collector and gateway; `{port}` in a value becomes a free port.
        options: more words for `up`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        extras: Iterable[str] = (),
        without: Iterable[str] = (),
        gateways: int = 1,
        configs: Sequence[str | Path] = (),
        environment: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        extras, without = list(extras), list(without)
        require("collector", "prometheus", *(name for name in extras if name != "postgres"))
        self.folder = folder
        self.words = ["up", "--dir", str(folder), "--gateways", str(gateways)]
        if extras:
            self.words += ["--with", ",".join(extras)]
        if without:
            self.words += ["--without", ",".join(without)]
        for config in configs:
            self.words += ["--config", str(REPOSITORY / "collector-config" / config)]  # an absolute path stays itself
        for name, value in (environment or {}).items():
            self.words += ["--env", f"{name}={value}"]
        self.words += options
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Stack:
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    # ---- the whole

    def up(self, within_s: float = 240.0) -> None:
        """Start all, and return when all answer; what stack.py said is in the error otherwise."""
        self.folder.mkdir(parents=True, exist_ok=True)
        said = self.folder / "up.log"
        with said.open("wb") as out:
            self.process = subprocess.Popen(
                stack_command(*self.words), stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment()
            )
        try:
            wait_until(lambda: self._is_ready(said), within_s, lambda: f"no `ready`:\n{said.read_text()[-4000:]}")
        except BaseException:
            self.down()
            raise

    def _is_ready(self, said: Path) -> bool:
        assert self.process is not None
        text = said.read_text(errors="replace")
        if self.process.poll() is not None:
            raise RuntimeError(f"stack.py up ended with {self.process.returncode}:\n{text[-6000:]}")
        return "ready" in text.splitlines()

    def down(self) -> None:
        """SIGTERM for all; may be called again."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(90)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
        if (self.folder / "stack.json").exists() and "postgres_folder" in self.state:
            shutil.rmtree(self.state["postgres_folder"], ignore_errors=True)  # outside our folder when we are root

    @property
    def state(self) -> dict[str, Any]:
        """stack.json as it is now."""
        return dict(json.loads((self.folder / "stack.json").read_text()))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("process", "folder"):
            raise AttributeError(name)
        try:
            return self.state[name]
        except KeyError:
            raise AttributeError(f"this stack has no {name}") from None

    # ---- its pieces

    def pid(self, name: str) -> int:
        """The process id of a piece as it runs now."""
        return int(self.state["pids"][name])

    def log(self, name: str) -> str:
        """All that a piece has said."""
        return Path(self.state["commands"][name]["log"]).read_text(errors="replace")

    def stop(self, name: str, number: int = signal.SIGTERM, within_s: float = 30.0) -> None:
        """End a piece by its pid, and return when it is gone; `start` brings it back on its old port."""
        pid = self.pid(name)
        os.killpg(pid, number)  # each piece leads a session of its own
        wait_until(lambda: not is_running(pid), within_s, lambda: f"{name} (pid {pid}) does not end")

    def kill(self, name: str) -> None:
        """kill -9, and return when it is gone."""
        self.stop(name, signal.SIGKILL)

    def start(self, name: str) -> None:
        """Start a piece again, on its old port and data; returns when it answers."""
        words = stack_command("restart", "--dir", str(self.folder), name)
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment(), timeout=240)
        assert done.returncode == 0, done.stderr

    def pause(self, name: str) -> None:
        """Let a piece hang (SIGSTOP): it keeps its connections and answers nothing."""
        os.killpg(self.pid(name), signal.SIGSTOP)

    def resume(self, name: str) -> None:
        """End a `pause`."""
        os.killpg(self.pid(name), signal.SIGCONT)


def ask(address: str, data: bytes | None = None, kind: str = "application/x-www-form-urlencoded") -> Any:
    """The JSON of an address; an error's text is in what is raised."""
    try:
        with _opener.open(Request(address, data, {"Content-Type": kind} if data else {}), timeout=120) as reply:
            return json.load(reply)
    except HTTPError as error:
        raise RuntimeError(f"{address}: {error.code} {error.read()[:2000]!r}") from None


def text_of(address: str) -> str:
    """What an address answers, as text."""
    with _opener.open(address, timeout=30) as reply:
        return str(reply.read().decode())


def wait_until(condition: Callable[[], bool], within_s: float, otherwise: Callable[[], str]) -> None:
    """Return once `condition` holds; AssertionError with what `otherwise` says after the limit."""
    until = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > until:
            raise AssertionError(f"after {within_s:.0f} s: {otherwise()}")
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
