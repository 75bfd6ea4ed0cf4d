"""The launch: what the shipper's process is given, what it doesn't hold, and whether it can outlive the program."""

from __future__ import annotations

import gc
import json
import os
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tracelet import launch

# A package of the same name in a folder of its own, whose shipper writes down what it was given. It stands for the
# real one, so that these tests say what a shipper gets, and not what it does with it.
SHIPPER = """
import json, os, stat, sys, time
from pathlib import Path
import tracelet

def main(argv):
    folder = Path(argv[0])
    open_files = []
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2:
            try:
                os.fstat(fd)
            except OSError:
                continue  # the listing's own
            open_files.append(os.readlink(f"/proc/self/fd/{fd}"))
    facts = {
        "argv": argv, "stdin": sys.stdin.read(), "pid": os.getpid(), "session": os.getsid(0), "cwd": os.getcwd(),
        "environ": dict(os.environ), "package": tracelet.__file__, "path": sys.path, "open_files": open_files,
        "executable": sys.executable, "safe_path": sys.flags.safe_path,
    }
    print("a line for the log")
    (folder / "facts.tmp").write_text(json.dumps(facts))
    (folder / "facts.tmp").rename(folder / "facts.json")
    while not (folder / "end").exists():
        time.sleep(0.005)
    return 0
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "elsewhere" / "tracelet"
    (package / "shipper").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "shipper" / "__init__.py").touch()
    (package / "shipper" / "process.py").write_text(SHIPPER)
    monkeypatch.setattr(launch, "_PACKAGE_ROOT", str(package.parent))
    return package.parent


def eventually(condition: Callable[[], Any], within_s: float = 20.0) -> Any:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        found = condition()
        if found:
            return found
        time.sleep(0.005)
    raise AssertionError("not within the time")


def facts_of(folder: Path) -> dict[str, Any]:
    eventually((folder / "facts.json").exists)
    facts: dict[str, Any] = json.loads((folder / "facts.json").read_text())
    return facts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir()
    return made


def end(folder: Path, shipper: launch.ShipperProcess) -> None:
    (folder / "end").touch()
    eventually(shipper.has_ended)


def test_a_shipper_gets_folder_secrets_and_surroundings_and_a_session_of_its_own(root: Path, folder: Path) -> None:
    shipper = launch.start_shipper(folder, {"mlflow-1": {"tracking_uri": "s3cret"}}, environ={"SOME": "thing"})
    facts = facts_of(folder)
    assert facts["argv"] == [str(folder)]
    assert facts["stdin"] == '{"mlflow-1": {"tracking_uri": "s3cret"}}\n'
    assert facts["pid"] == facts["session"] == shipper.pid
    assert facts["cwd"] == os.getcwd()
    assert facts["environ"]["SOME"] == "thing"
    assert "s3cret" not in json.dumps(facts["environ"])
    assert facts["executable"] == sys.executable
    assert b"s3cret" not in Path(f"/proc/{shipper.pid}/cmdline").read_bytes()
    assert not shipper.has_ended()
    end(folder, shipper)
    assert (folder / "shipper.log").read_text() == "a line for the log\n"
    assert "s3cret" not in "".join(p.read_text() for p in folder.iterdir() if p.name != "facts.json")


def test_a_shipper_holds_no_descriptor_of_the_program(root: Path, folder: Path) -> None:
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    try:
        shipper = launch.start_shipper(folder, {}, environ={})
        assert facts_of(folder)["open_files"] == []
        os.close(writing)
        assert os.read(reading, 1) == b""  # end-of-file while the shipper lives: nobody waits for it
        assert not shipper.has_ended()
        end(folder, shipper)
    finally:
        os.close(reading)


def test_a_shipper_uses_the_very_package_of_the_program_and_nothing_beside_it_shadows_a_module(
    root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (root / "json.py").write_text("raise ImportError('shadowed')")
    script_folder = tmp_path / "script"
    script_folder.mkdir()
    (script_folder / "json.py").write_text("raise ImportError('shadowed')")
    monkeypatch.chdir(script_folder)
    shipper = launch.start_shipper(folder, {}, environ={})
    facts = facts_of(folder)
    assert facts["package"] == str(root / "tracelet" / "__init__.py")
    assert str(root) in facts["path"]
    assert facts["safe_path"]
    assert str(script_folder) not in facts["path"]
    end(folder, shipper)


def test_auto_instrumentation_is_not_handed_on(root: Path, folder: Path, tmp_path: Path) -> None:
    injected = tmp_path / "opentelemetry" / "instrumentation" / "auto_instrumentation"
    environ = {"PYTHONPATH": os.pathsep.join([str(injected), "/kept"])}
    shipper = launch.start_shipper(folder, {}, environ=environ)
    assert facts_of(folder)["environ"]["PYTHONPATH"] == "/kept"
    end(folder, shipper)


def test_a_shipper_that_has_ended_is_reaped_and_one_that_lives_on_makes_no_warning(root: Path, folder: Path) -> None:
    shipper = launch.start_shipper(folder, {}, environ={})
    pid = shipper.pid
    facts_of(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = folder.parent / "second"
        second.mkdir()
        left = launch.start_shipper(second, {}, environ={})
        facts_of(second)
        cycle: list[object] = [left]  # the garbage collector finalizes what is in a cycle in any order
        cycle.append(cycle)
        left_pid = left.pid
        del left, cycle
        gc.collect()
    end(folder, shipper)
    assert not Path(f"/proc/{pid}").exists()
    assert Path(f"/proc/{left_pid}").exists()
    (second / "end").touch()
    eventually(lambda: Path(f"/proc/{left_pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
    subprocess.run(["true"], check=True)  # any process that is started reaps the ones that were left
    assert not Path(f"/proc/{left_pid}").exists()


def test_a_program_that_ends_leaves_its_shipper_running(root: Path, folder: Path) -> None:
    code = f"""
import sys; from pathlib import Path; from tracelet import launch
launch._PACKAGE_ROOT = {str(root)!r}
print(launch.start_shipper(Path({str(folder)!r}), {{}}, environ={{}}).pid)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stderr == ""
    pid = int(done.stdout)
    assert facts_of(folder)["pid"] == pid
    assert Path(f"/proc/{pid}").exists()
    (folder / "end").touch()


def test_a_shipper_that_ends_before_it_reads_its_secrets_is_no_error(root: Path, folder: Path) -> None:
    (root / "tracelet" / "shipper" / "process.py").write_text("raise SystemExit(3)")
    shipper = launch.start_shipper(folder, {"x": {"y": "z" * 200_000}}, environ={})
    eventually(shipper.has_ended)
    with pytest.raises(OSError, match="more than a pipe holds"):
        launch.start_shipper(folder, {"x": {"y": "z" * 2_000_000}}, environ={})


def test_an_interpreter_that_is_gone_is_an_oserror(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(OSError, match=r"sys\.executable is empty"):
        launch.start_shipper(folder, {}, environ={})
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(FileNotFoundError):
        launch.start_shipper(folder, {}, environ={})


def test_the_log_is_for_the_user_alone(root: Path, folder: Path) -> None:
    shipper = launch.start_shipper(folder, {}, environ={})
    assert stat.S_IMODE((folder / "shipper.log").stat().st_mode) & 0o077 == 0
    facts_of(folder)
    end(folder, shipper)


# ---- can it outlive the program? ---------------------------------------------------------------------------------


def proc(tmp_path: Path, namespace: str) -> Path:
    made = tmp_path / "proc"
    (made / "self" / "ns").mkdir(parents=True)
    (made / "self" / "ns" / "pid").symlink_to(namespace)
    return made


def test_in_the_initial_pid_namespace_a_shipper_outlives_the_program(tmp_path: Path) -> None:
    assert launch.can_outlive({}, proc=proc(tmp_path, "pid:[4026531836]")) is None


def test_in_another_pid_namespace_it_does_not(tmp_path: Path) -> None:
    reason = launch.can_outlive({}, proc=proc(tmp_path, "pid:[4026532211]"))
    assert reason is not None
    assert "PID namespace" in reason


@pytest.mark.parametrize(
    ("variable", "system"), [("SLURM_JOB_ID", "SLURM"), ("PBS_JOBID", "PBS"), ("LSB_JOBID", "LSF")]
)
def test_in_a_batch_job_it_does_not(tmp_path: Path, variable: str, system: str) -> None:
    reason = launch.can_outlive({variable: "17"}, proc=proc(tmp_path, "pid:[4026531836]"))
    assert reason == f"this is a {system} job ({variable} is set), whose processes are killed at its end"


def test_without_proc_there_are_no_pid_namespaces(tmp_path: Path) -> None:
    assert launch.can_outlive({}, proc=tmp_path / "no proc") is None


def test_the_shipper_finds_packages_where_the_program_does_but_not_beside_its_script(
    root: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script"
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script / "train.py"), raising=False)
    monkeypatch.setattr(sys, "path", [str(script), "", "relative", *sys.path, "/vendored/b\udcff", "/vendored/a"])
    shipper = launch.start_shipper(folder, {}, environ=os.environ)
    path = facts_of(folder)["path"]
    end(folder, shipper)
    assert path[-2:] == ["/vendored/b\udcff", "/vendored/a"]
    assert path.index(str(root)) < len(path) - 2  # nothing comes before the package's own place
    assert not {str(script), "", "relative"} & set(path)
    assert len(path) == len(set(path))
