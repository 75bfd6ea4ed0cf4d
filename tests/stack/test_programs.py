"""scripts/stack.py build and where: what is found, what is built, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests.stack.harness import REPOSITORY, stack_command

GO = """#!/bin/sh
[ "$1" = env ] && { echo go1.99.0; exit; }
echo built >> "$RECORD"
while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
sleep 1; echo '#!/bin/sh' > "$out"
"""


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module beside stack.py."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    import stack_programs

    return stack_programs


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """An environment with an empty cache and nothing on PATH but what a test puts into `bin`."""
    (tmp_path / "bin").mkdir()
    for name in ("sh", "sleep", "echo", "cat"):
        (tmp_path / "bin" / name).symlink_to(f"/bin/{name}")
    return {
        "PATH": str(tmp_path / "bin"),
        "HOME": str(tmp_path),
        "TRACELET_STACK_CACHE": str(tmp_path / "cache"),
        "RECORD": str(tmp_path / "record"),
    }


def put(shell: dict[str, str], name: str, text: str) -> Path:
    """A command of the test's own on its PATH."""
    path = Path(shell["PATH"]) / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def run(shell: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        stack_command(*words), capture_output=True, text=True, check=False, timeout=60, env=shell | {"LANG": "C.UTF-8"}
    )


def test_what_is_not_built_is_told_with_the_command_that_builds_it(shell: dict[str, str]) -> None:
    done = run(shell, "where", "loki")
    assert done.returncode == 1
    assert "scripts/stack.py build --only loki" in done.stderr
    assert done.stdout == ""


def test_without_go_the_text_says_what_to_install(shell: dict[str, str]) -> None:
    done = run(shell, "build", "--only", "collector")
    assert done.returncode == 1
    assert "no `go` on PATH" in done.stderr
    assert "https://go.dev/dl/" in done.stderr


def test_an_old_go_is_refused_before_it_tries(shell: dict[str, str]) -> None:
    put(shell, "go", "#!/bin/sh\necho go1.21.3\n")
    done = run(shell, "build", "--only", "prometheus")
    assert done.returncode == 1
    assert "is go1.21.3" in done.stderr


def test_without_maven_the_text_says_what_to_install(shell: dict[str, str]) -> None:
    done = run(shell, "build", "--only", "kafka")
    assert done.returncode == 1
    assert "apt-get install maven" in done.stderr


def test_a_program_on_path_is_taken_if_it_is_the_pinned_version(shell: dict[str, str]) -> None:
    path = put(shell, "prometheus", "#!/bin/sh\necho 'prometheus, version 3.16.0 (branch: HEAD)'\n")
    assert run(shell, "where", "prometheus").stdout.strip() == str(path)
    assert "on PATH" in run(shell, "build", "--only", "prometheus").stderr


@pytest.mark.parametrize("version", ["3.16.1", "13.16.0", "3.16.0.1", "2.42.0"])
def test_a_program_on_path_of_another_version_is_not(shell: dict[str, str], version: str) -> None:
    put(shell, "prometheus", f"#!/bin/sh\necho 'prometheus, version {version} (branch: HEAD)'\n")
    assert run(shell, "where", "prometheus").returncode == 1


def test_two_builders_build_once(shell: dict[str, str]) -> None:
    put(shell, "go", GO)
    words = stack_command("build", "--only", "prometheus")
    both = [subprocess.Popen(words, env=shell, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert Path(shell["RECORD"]).read_text().count("built") == 1
    assert run(shell, "where", "prometheus").returncode == 0
    assert "built already" in run(shell, "build", "--only", "prometheus").stderr


def test_a_builder_that_was_killed_leaves_nothing_that_counts_as_built(shell: dict[str, str]) -> None:
    put(shell, "go", GO.replace("sleep 1", 'echo half > "$out"; sleep 600'))
    process = subprocess.Popen(stack_command("build", "--only", "prometheus"), env=shell, stderr=subprocess.DEVNULL)
    cache = Path(shell["TRACELET_STACK_CACHE"])
    until = time.monotonic() + 30
    while not list(cache.glob("*/prometheus")) and not list(cache.glob(".*/prometheus")):
        assert time.monotonic() < until
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    for child in children:
        os.kill(int(child), 9)
    assert run(shell, "where", "prometheus").returncode == 1
    put(shell, "go", GO)
    assert run(shell, "build", "--only", "prometheus").returncode == 0
    assert len(list(cache.glob("*prometheus*/"))) == 1  # what the killed one left is cleared away too


def test_what_a_compiler_says_is_shown(shell: dict[str, str]) -> None:
    put(shell, "go", '#!/bin/sh\n[ "$1" = env ] && { echo go1.99.0; exit; }\necho "checksum mismatch" >&2; exit 1\n')
    done = run(shell, "build", "--only", "compose")
    assert done.returncode == 1
    assert "checksum mismatch" in done.stderr
    assert run(shell, "where", "compose").returncode == 1


def test_the_collector_s_checksums_are_for_what_the_manifest_names(programs: ModuleType) -> None:
    manifest, go_mod = programs.MANIFEST.read_text(), (programs.MODULES / "collector" / "go.mod").read_text()
    programs.check_manifest(manifest, go_mod)
    for other in (
        manifest.replace("filterprocessor v0.158.0", "filterprocessor v0.157.0"),
        re.sub(r"\n\nconnectors:", "\n  - gomod: example.com/another v1.0.0\\g<0>", manifest),
    ):
        assert other != manifest
        with pytest.raises(programs.StackError, match="lock collector"):
            programs.check_manifest(other, go_mod)


def test_a_jar_that_is_changed_missing_or_new_is_refused(programs: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.jar").write_bytes(b"a")
    (tmp_path / "b.jar").write_bytes(b"b")
    sums = "".join(f"{hashlib.sha512(name[:1].encode()).hexdigest()}  {name}\n" for name in ("a.jar", "b.jar"))
    programs.check_jars(tmp_path, sums)
    (tmp_path / "b.jar").write_bytes(b"other")
    with pytest.raises(programs.StackError, match=r"b\.jar$"):
        programs.check_jars(tmp_path, sums)
    (tmp_path / "b.jar").unlink()
    with pytest.raises(programs.StackError, match=r"b\.jar$"):
        programs.check_jars(tmp_path, sums)
    (tmp_path / "b.jar").write_bytes(b"b")
    (tmp_path / "c.jar").write_bytes(b"c")
    with pytest.raises(programs.StackError, match=r"c\.jar$"):
        programs.check_jars(tmp_path, sums)


def test_every_program_has_committed_checksums(programs: ModuleType) -> None:
    kinds = ("go.sum", "SHA512SUMS", "package-lock.json")
    for program in programs.PROGRAMS.values():
        folder = programs.MODULES / program.folder
        (sums,) = [folder / kind for kind in kinds if (folder / kind).exists()]
        text = sums.read_text()
        if sums.name == "go.sum":
            lines = re.sub(r"^(replace|exclude) .*$", "", (folder / "go.mod").read_text(), flags=re.MULTILINE)
            required = re.findall(r"^(?:require)?\s+(\S+) (v\S+)(?: // indirect)?$", lines, re.MULTILINE)
            replaced = re.findall(r"^replace (\S+) => (\S+) (v\S+)$", (folder / "go.mod").read_text(), re.MULTILINE)
            others = {path: (other, version) for path, other, version in replaced}
            required = [others.get(path, (path, version)) for path, version in required]
            assert len(required) > 5
            assert all(f"{path} {version}/go.mod h1:" in text for path, version in required)
        elif sums.name == "SHA512SUMS":
            assert len(re.findall(r"^[0-9a-f]{128}  \S+\.jar$", text, re.MULTILINE)) == len(text.splitlines()) > 40
        else:
            packages = {name: entry for name, entry in json.loads(text)["packages"].items() if name}
            assert packages
            assert all(entry["integrity"].startswith("sha512-") for entry in packages.values())


def test_a_changed_module_is_another_place(
    programs: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = programs.PROGRAMS["loki"].place()
    (tmp_path / "loki").mkdir()
    (tmp_path / "loki" / "go.mod").write_text("module example.com/loki\n")
    monkeypatch.setattr(programs, "MODULES", tmp_path)
    assert programs.PROGRAMS["loki"].place() != before


def test_help_needs_nothing_but_python(shell: dict[str, str]) -> None:
    """`build` and `where` work before there is a .venv: nothing outside the standard library is imported."""
    done = subprocess.run(
        [sys.executable, "-S", str(REPOSITORY / "scripts" / "stack.py"), "--help"],
        capture_output=True,
        text=True,
        check=False,
        env=shell,
    )
    assert done.returncode == 0, done.stderr
    assert "restart" in done.stdout


def test_the_images_of_the_compose_file_are_the_versions_that_are_tested(programs: ModuleType) -> None:
    services = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())["services"]
    for name in ("collector", "prometheus", "loki"):
        tag = services[name]["image"].rpartition(":")[2]
        assert tag.removeprefix("v") == programs.PROGRAMS[name].version, name
