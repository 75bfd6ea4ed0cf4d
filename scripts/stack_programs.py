"""Which real programs the stack is made of, and how each is found on PATH or built from its own modules.

Each program has a folder below stack/ with committed checksums (go.sum; for Kafka's jars SHA512SUMS). What is built
lies in `$TRACELET_STACK_CACHE`, in a folder whose name holds a digest of all that went into it: a changed go.mod is
another folder, and one that is there is whole (it gets its name by a rename, last).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
MODULES = REPOSITORY / "stack"
MANIFEST = REPOSITORY / "collector-config" / "builder-manifest.yaml"
GO_NEEDED = (1, 26, 7)


class StackError(Exception):
    """What failed, and what to do about it: the text is for the person at the terminal."""


@dataclass(frozen=True)
class Program:
    """One program: the version that is used, how PATH is asked for it, and how it is built.

    `result` is what is handed out: a file, or for Kafka a folder of jars.
    """

    name: str
    version: str
    result: str
    folder: str  # below stack/
    on_path: tuple[tuple[str, ...], ...]  # commands that print a version
    make: Callable[[Program, Path, int], None]  # into a folder that exists and is empty
    package: str = "."
    tags: str = ""
    version_symbol: str = ""  # a Go variable that holds the version; release builds set it, a plain build doesn't
    more_sources: tuple[Path, ...] = ()

    def digest(self) -> str:
        """Of all that decides about the result; the same on each machine of one kind."""
        found = hashlib.sha256(repr((self.name, self.version, self.package, self.tags, self.version_symbol)).encode())
        own = sorted(path for path in (MODULES / self.folder).iterdir() if path.is_file())
        for path in [*own, *self.more_sources]:
            found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        return found.hexdigest()[:12]

    def place(self) -> Path:
        """Where it lies once it is built."""
        return self.home() / self.result

    def home(self) -> Path:
        """The folder of this program alone."""
        return cache() / f"{self.name}-{self.version}-{self.digest()}"


def cache() -> Path:
    """The folder for what is built: TRACELET_STACK_CACHE, else below the user's cache."""
    named = os.environ.get("TRACELET_STACK_CACHE")
    if named:
        return Path(named).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tracelet" / "stack"


# ---- finding ----------------------------------------------------------------------------------------------------


def find(name: str) -> Path:
    """The path of a program: of PATH where its version is the pinned one, else what was built.

    Raises:
        StackError: it is neither there nor built; the text says what to type.
    """
    program = PROGRAMS[name]
    there = program.place()
    if there.exists():
        return there
    found = on_path(program)
    if found is not None:
        return found
    raise StackError(
        f"{name} {program.version} is neither on PATH nor built: `scripts/stack.py build --only {name}` builds it "
        f"into {there.parent}"
    )


def on_path(program: Program) -> Path | None:
    """The program of PATH, if it is there and of the pinned version; it is asked for it."""
    for command in program.on_path:
        path = shutil.which(command[0])
        if path is None:
            continue
        try:
            said = subprocess.run(
                [path, *command[1:]], capture_output=True, text=True, timeout=30, check=False, stdin=subprocess.DEVNULL
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if re.search(rf"(?<![0-9.])v?{re.escape(program.version)}(?![0-9.])", said.stdout + said.stderr):
            # Kafka's scripts stand beside the folder of jars that is wanted.
            return Path(path).resolve().parent.parent / "libs" if program.name == "kafka" else Path(path)
    return None


# ---- building ---------------------------------------------------------------------------------------------------


def build(names: Sequence[str], jobs: int) -> None:
    """Have each program; says what it does, and how long it took.

    Several builders may run: one builds, the others wait for it. One that is killed leaves a folder with a temporary
    name, which the next removes.

    Raises:
        StackError: a tool is missing, a checksum is wrong, or the compiler said no.
    """
    for name in names:
        have(PROGRAMS[name], jobs)


def have(program: Program, jobs: int) -> None:
    """Have one program; what `build` does with each."""
    there = program.place()
    if there.exists():
        say(f"{program.name} {program.version}: built already, {there}")
        return
    found = on_path(program)
    if found is not None:
        say(f"{program.name} {program.version}: on PATH, {found}")
        return
    with only_one(program):
        if there.exists():
            say(f"{program.name} {program.version}: built meanwhile by another, {there}")
            return
        _build(program, there, jobs)


def _build(program: Program, there: Path, jobs: int) -> None:
    started = time.monotonic()
    say(f"{program.name} {program.version}: building from stack/{program.folder}")
    for left in cache().glob(f".{program.name}-*.tmp"):  # of a builder that died: we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{program.name}-", suffix=".tmp", dir=cache()))
    try:
        folder.chmod(0o755)
        program.make(program, folder, jobs)
        if not (folder / program.result).exists():
            raise StackError(f"{program.name}: the build ended well and left no {program.result}")
        shutil.rmtree(program.home(), ignore_errors=True)  # somebody took the program out of it
        os.replace(folder, program.home())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    size = sum(path.stat().st_size for path in program.home().rglob("*") if path.is_file())
    say(f"{program.name} {program.version}: built in {time.monotonic() - started:.0f} s, {size / 1e6:.0f} MB, {there}")


@contextlib.contextmanager
def only_one(program: Program) -> Iterator[None]:
    """Hold the lock of a program; the system takes it back from a builder that dies."""
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / f".{program.name}.lock").open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{program.name}: another build of it runs; waiting for that")
            fcntl.flock(held, fcntl.LOCK_EX)
        yield


def go_build(program: Program, into: Path, jobs: int) -> None:
    """Compile `program.package` of its module; nothing that go.sum does not list gets in."""
    _go_build(program, MODULES / program.folder, into / program.result, jobs)


def _go_build(program: Program, module: Path, output: Path, jobs: int) -> None:
    flags = "-s -w"
    if program.version_symbol:
        flags += f" -X {program.version_symbol}={program.version}"
    command = [go(), "build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-p", str(jobs)]
    command += ["-tags", program.tags, "-ldflags", flags, "-o", str(output), program.package]
    # GOWORK: a go.work in a folder above would change what is built. CGO: one static file, whatever compiler is there.
    run(command, module, {"GOWORK": "off", "CGO_ENABLED": "0"}, program.name)


def collector_build(program: Program, into: Path, jobs: int) -> None:
    """Generate the collector's sources from the manifest that users see, then compile them with committed checksums."""
    with tempfile.TemporaryDirectory(prefix="tracelet-collector-") as scratch:
        folder = Path(scratch)
        builder = folder / "builder"
        tool = [go(), "build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-p", str(jobs), "-o", str(builder)]
        run(
            [*tool, "go.opentelemetry.io/collector/cmd/builder"],
            MODULES / "builder",
            {"GOWORK": "off", "CGO_ENABLED": "0"},
            program.name,
        )
        shutil.copy(MANIFEST, folder / "builder-manifest.yaml")
        generate = [str(builder), "--config", "builder-manifest.yaml", "--skip-compilation", "--skip-get-modules"]
        run(generate, folder, {}, program.name)
        sources = folder / "_build"
        for name in ("go.mod", "go.sum"):
            shutil.copy(MODULES / program.folder / name, sources / name)
        check_manifest(MANIFEST.read_text(), (sources / "go.mod").read_text())
        _go_build(program, sources, into / program.result, jobs)


def check_manifest(manifest: str, go_mod: str) -> None:
    """The manifest and the committed go.mod name the same components in the same versions, or StackError."""
    wanted = set(re.findall(r"^\s*-\s*gomod:\s*(\S+) (v\S+)", manifest, re.MULTILINE))
    direct = re.findall(r"^(?:require)?\s+(\S+) (v\S+)$", go_mod, re.MULTILINE)
    missing = sorted(wanted - set(direct))
    if missing or not wanted:
        listed = ", ".join(f"{path} {version}" for path, version in missing)
        raise StackError(
            f"stack/collector/go.mod lacks what collector-config/builder-manifest.yaml names: {listed}. "
            "`scripts/stack.py lock collector` writes go.mod and go.sum anew."
        )


def lock_collector() -> None:
    """Write stack/collector/go.mod and go.sum anew, for what the manifest names now (a maintainer's step)."""
    with tempfile.TemporaryDirectory(prefix="tracelet-collector-") as scratch:
        folder = Path(scratch)
        builder = folder / "builder"
        package = "go.opentelemetry.io/collector/cmd/builder"
        run([go(), "build", "-mod=readonly", "-o", str(builder), package], MODULES / "builder", {}, "builder")
        shutil.copy(MANIFEST, folder / "builder-manifest.yaml")
        run([str(builder), "--config", "builder-manifest.yaml", "--skip-compilation"], folder, {}, "builder")
        for name in ("go.mod", "go.sum"):
            shutil.copyfile(folder / "_build" / name, MODULES / "collector" / name)
    say("stack/collector/go.mod and go.sum are written; look at the difference before it is committed")


def kafka_build(program: Program, into: Path, jobs: int) -> None:
    """Let Maven copy the broker's jars, and compare each with its committed SHA-512."""
    maven = shutil.which("mvn")
    if maven is None:
        raise StackError(
            "kafka needs Maven and a Java runtime (17 or newer): on Debian and Ubuntu `apt-get install maven`"
        )
    module = MODULES / program.folder
    jars = into / program.result
    # `into` as Maven's working place too: it writes a `target` folder beside a pom, and the repository stays clean.
    shutil.copy(module / "pom.xml", into / "pom.xml")
    command = [maven, "-B", "-q", "-f", str(into / "pom.xml"), "dependency:copy-dependencies"]
    run([*command, f"-DoutputDirectory={jars}"], into, {}, program.name)
    check_jars(jars, (module / "SHA512SUMS").read_text())


def npm_build(program: Program, into: Path, jobs: int) -> None:
    """Install the packages of package-lock.json, each with its committed SHA-512, and run nothing of theirs."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise StackError(f"{program.name} needs Node.js and npm: on Debian and Ubuntu `apt-get install nodejs npm`")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(MODULES / program.folder / name, into / name)
    run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], into, {}, program.name)


def check_jars(folder: Path, sums: str) -> None:
    """The folder holds exactly the files listed, each with its digest, or StackError."""
    wanted = {name: digest for digest, name in (line.split() for line in sums.splitlines() if line.strip())}
    there = {path.name: path for path in folder.iterdir()}
    odd = sorted(wanted.keys() ^ there.keys())
    odd += sorted(n for n in wanted.keys() & there.keys() if _sha512(there[n]) != wanted[n])
    if odd:
        raise StackError(f"kafka: not what stack/kafka/SHA512SUMS lists, or not that content: {', '.join(odd)}")


def _sha512(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha512").hexdigest()


def go() -> str:
    """The Go tool, new enough; StackError says what to install."""
    path = shutil.which("go")
    hint = f"Go {'.'.join(map(str, GO_NEEDED))} or newer is needed to build this: https://go.dev/dl/"
    if path is None:
        raise StackError(f"there is no `go` on PATH. {hint}")
    said = subprocess.run([path, "env", "GOVERSION"], capture_output=True, text=True, check=False, cwd="/").stdout
    match = re.match(r"go([0-9]+)\.([0-9]+)(?:\.([0-9]+))?", said.strip())
    if match is None or tuple(int(part or 0) for part in match.groups()) < GO_NEEDED:
        raise StackError(f"{path} is {said.strip() or 'of no known version'}. {hint}")
    return path


def run(command: Sequence[str], folder: Path, environ: Mapping[str, str], name: str) -> None:
    """Run one step of a build; a line of progress every 20 seconds, and its last lines if it fails."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **environ},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None:
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    say(f"{name}: at it for {time.monotonic() - started:.0f} s")
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if process.returncode:
            output.seek(0)
            last = "\n".join(output.read().decode(errors="replace").splitlines()[-15:])
            step = " ".join(command[:2])
            raise StackError(f"{name}: `{step} ...` ended with {process.returncode}; its last words:\n{last}")


def say(text: str) -> None:
    """A line for the person who waits; standard output belongs to results."""
    print(text, file=sys.stderr, flush=True)


PROGRAMS: Mapping[str, Program] = {
    program.name: program
    for program in (
        Program(
            name="collector",
            version="0.158.0",
            result="otelcol-tracelet",
            folder="collector",
            on_path=(("otelcol-tracelet", "--version"), ("otelcol-contrib", "--version")),
            make=collector_build,
            more_sources=(MANIFEST, MODULES / "builder" / "go.mod", MODULES / "builder" / "go.sum"),
        ),
        Program(
            name="prometheus",
            version="3.16.0",
            result="prometheus",
            folder="prometheus",
            on_path=(("prometheus", "--version"),),
            make=go_build,
            package="github.com/prometheus/prometheus/cmd/prometheus",
            # No assets of the web pages (they are not in the module), no service discovery of clouds: files only.
            tags="netgo,builtinassets_none,remove_all_sd",
            version_symbol="github.com/prometheus/common/version.Version",
        ),
        Program(
            name="promtool",
            version="3.16.0",
            result="promtool",
            folder="prometheus",
            on_path=(("promtool", "--version"),),
            make=go_build,
            package="github.com/prometheus/prometheus/cmd/promtool",
            tags="netgo,builtinassets_none,remove_all_sd",
            version_symbol="github.com/prometheus/common/version.Version",
        ),
        Program(
            name="compose",
            version="2.40.3",
            result="docker-compose",
            folder="compose",
            on_path=(("docker-compose", "version", "--short"),),
            make=go_build,
            package="github.com/docker/compose/v2/cmd",
            version_symbol="github.com/docker/compose/v2/internal.Version",
        ),
        Program(
            name="kafka",
            version="4.1.0",
            result="lib",
            folder="kafka",
            on_path=(("kafka-server-start.sh", "--version"),),
            make=kafka_build,
        ),
        Program(
            name="loki",
            version="3.7.8",
            result="loki",
            folder="loki",
            on_path=(("loki", "--version"),),
            make=go_build,
            package="github.com/grafana/loki/v3/cmd/loki",
            version_symbol="github.com/grafana/loki/v3/pkg/util/build.Version",
        ),
        Program(
            name="grafana-schema",  # Grafana's own types and a compiler: what the dashboards are checked with
            version="13.2.3",
            result="node_modules",
            folder="grafana-schema",
            on_path=(),
            make=npm_build,
        ),
    )
}
