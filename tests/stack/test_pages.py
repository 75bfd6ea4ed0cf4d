"""Pages of the guide that need a stack, typed as their reader would: start, send a run, see it, stop."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.docs.page import Block, blocks_of, matches
from tests.servers import free_port
from tests.stack.harness import REPOSITORY, environment, program, require, wait_until

GUIDE = REPOSITORY / "docs" / "guide"


class Reader:
    """Somebody with a page, an empty folder, and this repository's programs on PATH.

    Args:
        folder: empty; a link to scripts/ is made there.
        page: its name below docs/guide/.
        ports: what each port of the page is on this machine.
    """

    def __init__(self, folder: Path, page: str, ports: Mapping[int, int] | None = None) -> None:
        self.folder = folder
        self.ports = dict(ports or {})
        self.blocks = blocks_of((GUIDE / page).read_text())
        (folder / "scripts").symlink_to(REPOSITORY / "scripts")
        (folder / "bin").mkdir()
        path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        state = {"TRACELET_DIR": str(folder / "spool"), "XDG_STATE_HOME": str(folder / "state")}
        self.variables = {**environment(), "PATH": path, **state}
        self.said: dict[str, Path] = {}
        self._typed = ""  # the page's Python is one session

    def block(self, word: str) -> Block:
        """The first block of code that has this word."""
        found = [each for each in self.blocks if word in each.code and each.language != "text"]
        assert found, f"no block with {word!r} on the page"
        return found[0]

    def here(self, code: str) -> str:
        """A block with the ports of this machine."""
        for there, here in self.ports.items():
            code = re.sub(rf"(?<![0-9]){there}(?![0-9])", str(here), code)
        return code

    @contextmanager
    def goes_on(self, word: str, until: Callable[[str], bool], more: str = "") -> Iterator[None]:
        """Start the block's command, wait for what shows that it serves, and end it with SIGTERM."""
        log = self.said[word] = self.folder / f"{word.split(maxsplit=1)[0].replace('/', '-')}.log"
        words = ["bash", "-c", f"exec {self.here(self.block(word).code).strip()}{more}"]
        with log.open("wb") as out:
            process = subprocess.Popen(words, cwd=self.folder, env=self.variables, stdout=out, stderr=out)
        try:
            wait_until(
                lambda: process.poll() is not None or until(log.read_text(errors="replace")),
                240,
                lambda: log.read_text(errors="replace")[-4000:],
            )
            assert process.poll() is None, log.read_text(errors="replace")[-4000:]
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(90)
            finally:
                process.kill()

    def types(self, word: str) -> None:
        """Run a block of Python; it prints nothing."""
        code = self.here(self.block(word).code)
        done = self._python(self._typed + code)
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        self._typed += "".join(re.findall(r"^(?:import|from) .*\n|^stack = .*\n", code, re.MULTILINE))

    def sees(self, word: str, within_s: float = 90.0) -> None:
        """Run a block of Python until it prints what the page says: what is on its way needs seconds to arrive."""
        block = self.block(word)
        looked: list[str] = []

        def seen() -> bool:
            done = self._python(self._typed + self.here(block.code))
            looked.append(done.stdout + done.stderr[-2000:])
            return done.returncode == 0 and matches(str(block.output), done.stdout)

        wait_until(seen, within_s, lambda: f"printed {looked[-1]!r}")

    def runs(self, word: str) -> None:
        """Run a block of the shell to its end."""
        code = self.here(self.block(word).code)
        subprocess.run(["bash", "-euc", code], cwd=self.folder, env=self.variables, check=True, timeout=120)

    def _python(self, code: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-W", "ignore", "-c", code]
        return subprocess.run(
            words, cwd=self.folder, env=self.variables, capture_output=True, text=True, check=False, timeout=180
        )


def ready(said: str) -> bool:
    """Whether stack.py has said that all serve."""
    return "ready" in said.splitlines()


def test_the_stack_without_docker(tmp_path: Path) -> None:
    require("collector", "prometheus")
    reader = Reader(tmp_path, "stack-without-docker.md")
    with reader.goes_on("scripts/stack.py up", ready):
        reader.types("start_logging")
        reader.sees("def samples")
        reader.runs("stack.py restart")


def test_mlflow_behind_your_collector(tmp_path: Path) -> None:
    ports = {port: free_port() for port in (5000, 4318, 4319)}
    reader = Reader(tmp_path, "mlflow-behind-your-collector.md", ports)
    (tmp_path / "bin" / "otelcol-contrib").symlink_to(program("collector"))
    (tmp_path / "collector.yaml").write_text(reader.here(reader.block("# collector.yaml").code))
    # The only thing added: the collector's own metrics, which by default are on a fixed port, 8888.
    quiet = " --config 'yaml:service::telemetry::metrics::level: none'"
    with ExitStack() as up:
        up.enter_context(reader.goes_on("mlflow server", lambda said: "startup complete" in said))
        up.enter_context(
            reader.goes_on("tracelet gateway", lambda said: f"listening on http://127.0.0.1:{ports[4319]}" in said)
        )
        up.enter_context(reader.goes_on("otelcol-contrib", lambda said: "Everything is ready" in said, quiet))
        reader.types("start_logging")
        reader.sees("search_runs")


def test_when_one_machine_is_not_enough(tmp_path: Path) -> None:
    require("collector", "prometheus", "kafka")
    reader = Reader(tmp_path, "more-than-one-machine.md")
    with reader.goes_on("scripts/stack.py up", ready):
        reader.types("tracelet.Experiment")
        reader.sees("search_runs")
