"""The image of examples/container and the guide's `docker run`: stopped, killed, and shipped by a later container.

Pattern: no docker here, so a container is made of what it is made of: namespaces for process ids, files and the host's
name, in which the image's command is process 1, under the image's user, with its variables and the volume at its place.
Limit: a minute a container.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.crash.clocks import other_clocks
from tests.programs import said_until
from tests.shipping import until
from tests.sinks import HttpSink, Say
from tests.system import Place, place, system_program
from tracelet.settings import parse_duration

LIMIT_S = 60.0
ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "examples" / "container" / "Dockerfile"
GUIDE = ROOT / "docs" / "guide" / "containers.md"

TRAIN = """
import os, time, tracelet
assert os.getpid() == 1
exp = tracelet.start_logging(exp_name="job", project="container", run_id=os.uname().nodename)
for i in range(5000):
    exp.log_metric("loss", 1 / (i + 1), iteration=i)
print("logged", flush=True)
time.sleep(600)
"""
# As a container's engine sets it up: a name of its own, and the volume where the image has its folder.
ENTER = """
hostname "$1" && mount -t tmpfs none /var/lib && mkdir -p "$3" && mount --bind "$2" "$3" && mount -t proc proc /proc &&
shift 3 && exec "$@"
"""


@dataclass(frozen=True)
class Image:
    """What a Dockerfile says, as far as the start of a container depends on it."""

    command: list[str]
    user: str
    uid: int
    environ: dict[str, str]
    owned: dict[str, tuple[str, int]]  # folders of the image: their owner and their mode
    installs: list[str]


def image() -> Image:
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    steps = [tuple(step.split(None, 1)) for step in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines() if step]
    commands = [shlex.split(part) for word, rest in steps if word == "RUN" for part in rest.split("&&")]
    (user,) = [rest for word, rest in steps if word == "USER"]
    (added,) = [words for words in commands if words[0] == "useradd" and words[-1] == user]
    folders = [words for words in commands if words[:2] == ["install", "-d"]]
    (command,) = [rest for word, rest in steps if word == "CMD"]
    return Image(
        command=json.loads(command),  # only the form in brackets is JSON; another one is a shell's
        user=user,
        uid=int(added[added.index("--uid") + 1]),
        environ=dict(pair.split("=", 1) for word, rest in steps if word == "ENV" for pair in shlex.split(rest)),
        owned={words[-1]: (words[words.index("-o") + 1], int(words[words.index("-m") + 1], 8)) for words in folders},
        installs=[
            word for words in commands if words[:2] == ["pip", "install"] for word in words[2:] if word[0] != "-"
        ],
    )


@dataclass(frozen=True)
class DockerRun:
    """A `docker run` line of the guide."""

    stop_timeout_s: float
    volume: tuple[str, str]
    environ: dict[str, str]
    image: str
    command: list[str]


def docker_runs() -> list[DockerRun]:
    blocks = re.findall(r"^```bash\n(docker run .*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    return [docker_run(shlex.split(block.replace("\\\n", " "))) for block in blocks]


def docker_run(words: list[str]) -> DockerRun:
    assert words[:2] == ["docker", "run"]
    given: dict[str, list[str]] = {}
    rest = words[2:]
    while rest[0].startswith("--"):
        name = rest.pop(0)
        given.setdefault(name, []).extend([] if name == "--rm" else [rest.pop(0)])
    ((name, at),) = [tuple(volume.split(":")) for volume in given["--volume"]]
    environ = dict(pair.split("=", 1) for pair in given.get("--env", []))
    return DockerRun(float(given.get("--stop-timeout", ["10"])[0]), (name, at), environ, rest[0], rest[1:])


class Engine:
    """Runs the image as the guide's lines say, each container under a name of its own, with one volume."""

    def __init__(self, at: Place, sink: HttpSink) -> None:
        self.place, self.sink, self.image = at, sink, image()
        self.train, self.ship = docker_runs()
        self.workdir = at.folder / "home"
        self.workdir.mkdir()
        (self.workdir / "train.py").write_text(TRAIN)
        owner, mode = self.image.owned[self.train.volume[1]]
        assert owner == self.image.user
        self.volume = at.folder / "volume"
        self.volume.mkdir()
        self.volume.chmod(mode)
        os.chown(self.volume, self.image.uid, self.image.uid)

    @contextmanager
    def run(self, line: DockerRun, name: str, day: int = 0) -> Iterator[subprocess.Popen[str]]:
        """A container, killed at the end of the block if it is still there; 50 s of grace pass in two."""
        clocks = other_clocks(self.place.folder / f"clocks-{day}", faster=25, days=day)
        environ = {"PATH": f"{self.place.programs}:/usr/bin:/bin", "HOME": "/nowhere", **clocks}
        environ |= self.image.environ | line.environ
        if "OTEL_EXPORTER_OTLP_ENDPOINT" in environ:
            environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = self.sink.url
        user = [system_program("setpriv"), f"--reuid={self.image.uid}", f"--regid={self.image.uid}", "--clear-groups"]
        inside = ["sh", "-c", ENTER, "sh", name, str(self.volume), line.volume[1], *user]
        namespaces = [system_program("unshare"), "--pid", "--fork", "--kill-child", "--mount", "--uts"]
        with subprocess.Popen(
            self.place.inside(*namespaces, *inside, *(line.command or self.image.command)),
            cwd=self.workdir, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) as process:  # fmt: skip
            try:
                yield process
            finally:
                process.kill()

    def signal(self, container: subprocess.Popen[str], number: int) -> None:
        """What `docker stop` and `docker kill` do to a container's process 1."""
        (inside,) = Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text().split()
        os.kill(int(inside), number)

    def arrived(self, run: str) -> list[int]:
        return [point.iteration for point in self.sink.points(run)]


@pytest.fixture
def engine(otlp_sink: HttpSink) -> Iterator[Engine]:
    with place() as at:
        yield Engine(at, otlp_sink)


def test_the_image_makes_python_process_1_for_a_user_who_owns_the_folder() -> None:
    found, (train, ship) = image(), docker_runs()
    assert found.command == ["python", "train.py"]
    assert found.installs == ["tracelet-otel"]
    assert found.uid != 0
    assert found.environ["TRACELET_DIR"] == train.volume[1] == ship.volume[1]
    assert train.volume == ship.volume
    assert found.owned[found.environ["TRACELET_DIR"]] == (found.user, 0o700)
    assert parse_duration(train.environ["TRACELET_GRACE"]) < train.stop_timeout_s


def test_the_guides_excerpt_is_the_files_lines() -> None:
    (shown,) = re.findall(r"^```dockerfile\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    lines = DOCKERFILE.read_text().splitlines()
    assert [line for line in shown.splitlines() if line not in lines] == []


def test_a_stopped_container_has_delivered_its_run_as_killed_and_left_with_143(engine: Engine) -> None:
    with engine.run(engine.train, "stopped") as container:
        said_until(container, "logged\n")
        engine.signal(container, signal.SIGTERM)
        assert container.wait(LIMIT_S) == 143
    assert engine.arrived("stopped") == list(range(5000))
    assert engine.sink.ends("stopped") == ["KILLED"]


def test_what_stopped_and_killed_containers_left_in_the_volume_a_later_one_names_and_ships(engine: Engine) -> None:
    engine.sink.rule = lambda _: Say(503)
    with engine.run(engine.train, "stopped") as container:
        said_until(container, "logged\n")
        engine.signal(container, signal.SIGTERM)  # it gives up after its grace, before a SIGKILL would come
        said, _ = container.communicate(timeout=LIMIT_S)
        assert container.returncode == 143, said
        assert "tracelet ship" in said
    with engine.run(engine.train, "killed") as container:
        said_until(container, "logged\n")
        engine.signal(container, signal.SIGKILL)
        container.wait(LIMIT_S)
    engine.sink.rule = None
    with engine.run(engine.train, "later", day=1) as container:
        said = said_until(container, "logged\n")
        assert "2 earlier runs wait in" in said
        until(lambda: len(engine.arrived("later")) == 5000, LIMIT_S)
        assert engine.arrived("stopped") == engine.arrived("killed") == []  # its shipper is its own run's
        with engine.run(engine.ship, "shipping") as shipping:
            said, _ = shipping.communicate(timeout=LIMIT_S)
            assert shipping.returncode == 0, said
        assert container.poll() is None
        assert engine.sink.ends("later") == []  # it goes on
    for run in ("stopped", "killed"):
        assert engine.arrived(run) == list(range(5000))
        assert engine.sink.ends(run) == ["KILLED"]
