"""A run's surroundings: the Resource exactly as the contract has it, git from its files, no secret taken."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tracelet import ids
from tracelet.collectors import environment
from tracelet.collectors.environment import Git, boot_id, host_name, read_git, resource, take
from tracelet.version import __version__

KEY = "0123456789abcdef"
COMMIT = "0123456789" * 4


def made(environ: dict[str, str] | None = None, **changed: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "project": "vision",
        "experiment_name": "train",
        "run_id": "r1",
        "run_name": "train",
        "attempt_key": KEY,
        "attempt_order": 7,
        "rank": 0,
    }
    return resource(**{**given, **changed}, environ=environ or {})


# ---- the Resource ------------------------------------------------------------------------------------------------


def test_the_resource_is_exactly_that_of_the_wire_contract() -> None:
    assert made(rank=3) == {
        "service.name": "vision",
        "service.namespace": "tracelet",
        "service.instance.id": ids.instance_id("r1", KEY, 3),
        "tracelet.project": "vision",
        "tracelet.experiment.name": "train",
        "tracelet.run.id": "r1",
        "tracelet.run.name": "train",
        "tracelet.run.attempt": KEY,
        "tracelet.run.attempt.order": 7,
        "tracelet.rank": 3,
        "tracelet.wire.version": "1.0",
        "host.name": os.uname().nodename,
        "telemetry.sdk.name": "tracelet",
        "telemetry.sdk.language": "python",
        "telemetry.sdk.version": __version__,
    }


def test_the_services_name_is_otels_own_variable_then_the_attribute_then_the_project() -> None:
    attributes = {"OTEL_RESOURCE_ATTRIBUTES": "service.name=of attributes,service.namespace=team"}
    assert made({**attributes, "OTEL_SERVICE_NAME": "of variable"})["service.name"] == "of variable"
    assert made({**attributes, "OTEL_SERVICE_NAME": ""})["service.name"] == "of attributes"
    assert made(attributes)["service.namespace"] == "team"


def test_other_resource_attributes_are_decoded_and_added_and_replace_none_of_ours() -> None:
    text = (
        "deployment.environment.name=a%2Cb%20c , "
        "tracelet.run.id=x,host.name=y,telemetry.sdk.name=z,service.instance.id=q"
    )
    kept = made({"OTEL_RESOURCE_ATTRIBUTES": text})
    assert kept.pop("deployment.environment.name") == "a,b c"
    assert kept == made()


def test_a_pair_without_a_key_is_left_out_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    assert made({"OTEL_RESOURCE_ATTRIBUTES": "a=1,nonsense,=2,,b=x=y"})["b"] == "x=y"
    assert "'nonsense' is left out" in caplog.text


def test_what_is_no_utf8_is_escaped() -> None:
    kept = made({"OTEL_RESOURCE_ATTRIBUTES": "a=\udcff"}, experiment_name="\udcfe")
    assert (kept["a"], kept["tracelet.experiment.name"]) == ("\\udcff", "\\udcfe")


# ---- host --------------------------------------------------------------------------------------------------------


def test_the_boot_id_is_the_kernels_and_fit_for_a_folders_name(tmp_path: Path) -> None:
    assert boot_id(tmp_path / "nothing") == "unknown"
    (tmp_path / "id").write_text("f23ca3b0-dfc3/../x\n")
    assert boot_id(tmp_path / "id") == "f23ca3b0-dfc3x"
    assert host_name() == os.uname().nodename


# ---- git ---------------------------------------------------------------------------------------------------------


def repository(folder: Path, head: str = "ref: refs/heads/main", config: str = "") -> Path:
    git = folder / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text(head + "\n")
    (git / "config").write_text(config)
    return git


def test_commit_and_branch_are_read_from_a_folder_below_the_root(tmp_path: Path) -> None:
    git = repository(tmp_path)
    (git / "refs" / "heads" / "main").write_text(COMMIT + "\n")
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert read_git(tmp_path / "a" / "b") == Git(COMMIT, "main", None)


def test_packed_references_are_understood(tmp_path: Path) -> None:
    git = repository(tmp_path, "ref: refs/heads/feature/x")
    (git / "packed-refs").write_text(f"# pack-refs\n{'9' * 40} refs/heads/x\n{COMMIT} refs/heads/feature/x\n")
    assert read_git(tmp_path) == Git(COMMIT, "feature/x", None)


def test_a_detached_head_has_a_commit_and_no_branch(tmp_path: Path) -> None:
    repository(tmp_path, COMMIT)
    assert read_git(tmp_path) == Git(COMMIT, None, None)


@pytest.mark.parametrize("head", ["ref: refs/heads/main", "ref: refs/heads/.invalid", "", "nonsense"])
def test_without_a_commit_nothing_is_claimed(tmp_path: Path, head: str) -> None:
    repository(tmp_path, head)
    assert read_git(tmp_path) == Git()


def test_outside_a_repository_there_is_none(tmp_path: Path) -> None:
    assert read_git(tmp_path) == Git()


def test_a_git_folder_that_is_garbage_is_no_error(tmp_path: Path) -> None:
    (tmp_path / ".git").write_bytes(b"\xff\xfe")
    assert read_git(tmp_path) == Git()


@pytest.mark.parametrize(
    ("config", "remote"),
    [
        ('[remote "origin"]\n\turl = https://user:s3cret@host/a/b.git\n', "https://host/a/b.git"),
        ('[remote "origin"]\n\turl = https://s3cret@host:8443/a.git # mine\n', "https://host:8443/a.git"),
        ('[remote "origin"]\n\turl = git@github.com:a/b.git\n', "git@github.com:a/b.git"),
        (
            '[core]\n\turl = x\n[remote "b"]\n\tfetch = y\n\tURL = "ssh://git@h/b"\n[remote "c"]\n\turl = z\n',
            "ssh://h/b",
        ),
        ("[core]\n\tbare = false\n", None),
        ("", None),
    ],
)
def test_the_first_remote_is_read_without_its_credentials(tmp_path: Path, config: str, remote: str | None) -> None:
    repository(tmp_path, COMMIT, config)
    assert read_git(tmp_path).remote == remote


def run_git(folder: Path, *arguments: str) -> str:
    environ = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=True).stdout.strip()


def test_it_is_what_git_itself_says_in_a_worktree_too(tmp_path: Path) -> None:
    main, tree = tmp_path / "main", tmp_path / "tree"
    main.mkdir()
    run_git(main, "init", "-b", "trunk")
    run_git(main, "remote", "add", "origin", "https://u:s3cret@host/a.git")
    run_git(main, "commit", "--allow-empty", "-m", "one")
    run_git(main, "worktree", "add", "-b", "side", str(tree))
    run_git(tree, "commit", "--allow-empty", "-m", "two")
    run_git(main, "pack-refs", "--all")
    for folder, branch in ((main, "trunk"), (tree, "side")):
        assert read_git(folder) == Git(run_git(folder, "rev-parse", "HEAD"), branch, "https://host/a.git")


# ---- all of it ---------------------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path: Path) -> Path:
    git = repository(tmp_path / "repository", config='[remote "origin"]\n\turl = https://u:s3cret@host/a.git\n')
    (git / "refs" / "heads" / "main").write_text(COMMIT)
    path = tmp_path / "repository" / "train.py"
    path.touch()
    return path


def test_no_argument_variable_or_credential_is_taken(script: Path) -> None:
    environ = {"AWS_SECRET_ACCESS_KEY": "s3cret", "MLFLOW_TRACKING_PASSWORD": "s3cret", "USER": "ada"}
    seen = take(environ, script.parent, [str(script), "--token", "s3cret"])
    assert "s3cret" not in repr(seen)
    assert seen.attributes["process.command"] == "train.py"


def test_the_attributes_of_the_event(script: Path) -> None:
    seen = take({"USER": "ada"}, script.parent, [str(script)], modules={}).attributes
    assert {name: seen[name] for name in seen if name.startswith("vcs.")} == {
        "vcs.ref.head.revision": COMMIT,
        "vcs.ref.head.name": "main",
        "vcs.repository.url.full": "https://host/a.git",
    }
    assert seen["process.owner"] == "ada"
    assert seen["process.pid"] == os.getpid()
    assert seen["process.working_directory"] == str(script.parent)
    assert seen["process.runtime.version"] == ".".join(map(str, sys.version_info[:3]))
    assert seen["os.type"] == os.uname().sysname.lower()


def test_versions_are_those_of_imported_packages_and_importing_none(tmp_path: Path) -> None:
    class Lazy(types.ModuleType):
        def __getattr__(self, name: str) -> object:
            raise AssertionError(f"asked for {name}")

    def module(name: str, version: object) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__["__version__"] = version
        return made

    modules = {
        "torch": module("torch", "2.9"),
        "torch.nn": module("torch.nn", "2.9"),
        "numpy": module("numpy", "2.3.1"),
        "json": module("json", "2.0.9"),
        "_private": module("_private", "1"),
        "odd": module("odd", (1, 2)),
        "lazy": Lazy("lazy"),
    }
    seen = take({}, tmp_path, [""], modules=modules).attributes
    assert seen["tracelet.packages"] == "numpy==2.3.1 torch==2.9"


def test_the_ids_of_a_job_are_kept(tmp_path: Path) -> None:
    environ = {"SLURM_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    seen = take(environ, tmp_path, [""], modules={}).attributes
    assert seen["tracelet.slurm.job_id"] == "17"
    assert seen["tracelet.slurm.array_task_id"] == "3"
    assert seen["k8s.pod.name"] == host_name()


def test_a_folder_whose_name_is_no_utf8_is_escaped(tmp_path: Path) -> None:
    seen = take({}, tmp_path / "a\udcff", ["x\udcff.py"], modules={})
    assert str(seen.attributes["process.working_directory"]).endswith("a\\udcff")
    assert seen.mlflow_tags["mlflow.source.name"] == "x\\udcff.py"


def test_it_starts_no_process_asks_no_network_and_lists_no_distributions(script: Path) -> None:
    code = """
import os, sys; from pathlib import Path; from tracelet.collectors.environment import take
events = []
sys.addaudithook(lambda event, _: events.append(event))
take(dict(os.environ), Path.cwd(), ["train.py"])
print([e for e in events if e.split(".")[0] in ("subprocess", "socket") or "fork" in e or "spawn" in e])
print([name for name in ("importlib.metadata", "subprocess", "getpass", "configparser") if name in sys.modules])
"""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.append({str(root)!r}){code}"],
        cwd=script.parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert done.stdout == "[]\n[]\n"


# ---- MLflow's own tags (compared with MLflow itself in tests/integration) ----------------------------------------


def test_a_script_in_a_repository_has_the_tags_that_mlflow_gives_it(script: Path) -> None:
    assert take({"USER": "ada"}, script.parent, ["train.py"], modules={}).mlflow_tags == {
        "mlflow.user": "ada",
        "mlflow.source.name": "train.py",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": COMMIT,
        "mlflow.source.git.branch": "main",
        "mlflow.source.git.repoURL": "https://host/a.git",
    }


@pytest.mark.parametrize("argv", [[], [""], ["-c"]])
def test_without_a_script_there_is_no_git_in_mlflows_tags(script: Path, argv: list[str]) -> None:
    tags = take({"USER": "ada"}, script.parent, argv, modules={}).mlflow_tags
    assert tags == {
        "mlflow.user": "ada",
        "mlflow.source.name": "".join(argv) or "<console>",
        "mlflow.source.type": "LOCAL",
    }


def test_mlflows_user_is_that_of_its_server_if_there_is_one(tmp_path: Path) -> None:
    def user(environ: dict[str, str]) -> str:
        return take({"USER": "ada", "HOME": str(tmp_path), **environ}, tmp_path, [""], modules={}).mlflow_tags[
            "mlflow.user"
        ]

    assert user({}) == "ada"
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow" / "credentials").write_text(
        "[other]\nmlflow_tracking_username = no\n[mlflow]\nmlflow_tracking_username = of file\n"
        "mlflow_tracking_password = x\n"
    )
    assert user({}) == "of file"
    assert user({"MLFLOW_TRACKING_USERNAME": "of variable"}) == "of variable"


def test_a_user_without_a_name_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 3_999_999_999)
    assert environment._user({}) == "unknown"


def test_mlflows_run_context_wins_and_garbage_in_it_is_left_out_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context = '{"mlflow.source.name": "job 7", "team": "ml"}'
    tags = take({"MLFLOW_RUN_CONTEXT": context}, tmp_path, [""], modules={}).mlflow_tags
    assert (tags["mlflow.source.name"], tags["team"]) == ("job 7", "ml")
    for garbage in ("{", "[1]"):
        take({"MLFLOW_RUN_CONTEXT": garbage}, tmp_path, [""], modules={})
    assert caplog.text.count("MLFLOW_RUN_CONTEXT is left out") == 2


def test_a_notebook_is_one_to_mlflow_too(tmp_path: Path) -> None:
    class ZMQInteractiveShell:
        def __init__(self) -> None:
            self.user_ns = {"__vsc_ipynb_file__": "/x/fit.ipynb"}

    ipython = types.ModuleType("IPython")
    ipython.__dict__["get_ipython"] = ZMQInteractiveShell
    kernel = ["/env/ipykernel_launcher.py", "-f", "x"]
    tags = take({}, tmp_path, kernel, modules={"IPython": ipython}).mlflow_tags
    assert (tags["mlflow.source.type"], tags["mlflow.source.name"]) == ("NOTEBOOK", "fit.ipynb")
    assert take({}, tmp_path, kernel, modules={}).mlflow_tags["mlflow.source.type"] == "NOTEBOOK"
    ipython.__dict__["get_ipython"] = lambda: None
    assert take({}, tmp_path, ["x.py"], modules={"IPython": ipython}).mlflow_tags["mlflow.source.type"] == "LOCAL"
