"""Settings: which source wins, where each value came from, and what a misspelt name gets for an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tracelet import settings
from tracelet.errors import ConfigError
from tracelet.settings import Keep, Settings, parse_duration, parse_size, resolve, script_name


def made(
    folder: Path,
    arguments: dict[str, object] | None = None,
    config: dict[str, object] | None = None,
    environ: dict[str, str] | None = None,
    argv: tuple[str, ...] = ("train.py",),
) -> Settings:
    return resolve(arguments or {}, config or {}, environ=environ or {}, cwd=folder, argv=argv)


def pyproject(folder: Path, text: str) -> None:
    (folder / "pyproject.toml").write_text(text)


def test_the_first_source_that_gives_a_value_wins(tmp_path: Path) -> None:
    pyproject(tmp_path, '[tool.tracelet]\nproject = "of pyproject"\n')
    sources: dict[str, Any] = {
        "arguments": {"project": "of argument"},
        "config": {"project": "of config"},
        "environ": {"TRACELET_PROJECT": "of environment"},
    }
    seen = []
    for dropped in (None, "arguments", "config", "environ"):
        if dropped is not None:
            sources.pop(dropped)
        resolved = made(tmp_path, **sources)
        seen.append((resolved.project, resolved.origins["project"]))
    assert seen == [
        ("of argument", "argument"),
        ("of config", "config"),
        ("of environment", "TRACELET_PROJECT"),
        ("of pyproject", f"pyproject.toml ({tmp_path / 'pyproject.toml'})"),
    ]


def test_none_and_an_empty_variable_mean_not_given(tmp_path: Path) -> None:
    resolved = made(tmp_path, {"project": None}, {"project": None}, {"TRACELET_PROJECT": ""})
    assert (resolved.project, resolved.origins["project"]) == (tmp_path.name, "default (the folder's name)")


def test_every_setting_has_an_origin_and_a_value(tmp_path: Path) -> None:
    resolved = made(tmp_path)
    assert set(resolved.origins) == {setting.name for setting in settings.SETTINGS}


def test_defaults(tmp_path: Path) -> None:
    resolved = made(tmp_path, environ={"HOME": "/home/a"})
    assert resolved.backend is None
    assert resolved.dir == Path("/home/a/.local/state/tracelet")
    assert resolved.shipper == "process"
    assert resolved.keep == Keep(7 * 86400.0, 2_000_000_000)
    assert resolved.max_bytes is None
    assert resolved.grace_s == 25.0
    assert resolved.experiment_name == "train"


def test_the_state_folder_follows_xdg_only_when_absolute(tmp_path: Path) -> None:
    assert made(tmp_path, environ={"XDG_STATE_HOME": "/state"}).dir == Path("/state/tracelet")
    relative = made(tmp_path, environ={"XDG_STATE_HOME": "state", "HOME": "/home/a"})
    assert relative.dir == Path("/home/a/.local/state/tracelet")


def test_the_project_is_mlflows_experiment_then_the_git_root_then_the_folder(tmp_path: Path) -> None:
    inner = tmp_path / "vision" / "src"
    inner.mkdir(parents=True)
    assert made(inner).project == "src"
    (tmp_path / "vision" / ".git").mkdir()
    assert made(inner).project == "vision"
    assert made(inner, environ={"MLFLOW_EXPERIMENT_NAME": "of mlflow"}).project == "of mlflow"


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("TRACELET_BACKND", "TRACELET_BACKEND"),
        ("TRACELET_EXPERIMENT", "TRACELET_EXPERIMENT_NAME"),
        ("TRACELET_MAXBYTES", "TRACELET_MAX_BYTES"),
    ],
)
def test_a_misspelt_variable_is_named_with_the_nearest_right_one(tmp_path: Path, variable: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(tmp_path, environ={variable: "x"})
    assert variable in str(caught.value)
    assert f"did you mean {nearest}?" in str(caught.value)


def test_a_misspelt_key_of_pyproject_is_named_with_the_nearest_right_one(tmp_path: Path) -> None:
    pyproject(tmp_path, "[tool.tracelet]\nshiper = 'off'\n")
    with pytest.raises(ConfigError, match=r"shiper in \[tool.tracelet\] is no setting: did you mean shipper\?"):
        made(tmp_path)


def test_a_name_like_none_of_them_is_answered_with_all_of_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="TRACELET_BACKEND, TRACELET_DIR"):
        made(tmp_path, environ={"TRACELET_ZZZZZZZZ": "x"})


def test_variables_of_other_programs_are_no_misspellings(tmp_path: Path) -> None:
    environ = dict.fromkeys(settings.READ_ELSEWHERE, "x")
    assert made(tmp_path, environ=environ).backend is None


def test_what_kubernetes_sets_for_a_service_named_tracelet_is_no_misspelling(tmp_path: Path) -> None:
    environ = {
        "TRACELET_SERVICE_HOST": "10.0.0.1",
        "TRACELET_SERVICE_PORT": "4318",
        "TRACELET_SERVICE_PORT_OTLP_HTTP": "4318",
        "TRACELET_PORT": "tcp://10.0.0.1:4318",
        "TRACELET_PORT_4318_TCP": "tcp://10.0.0.1:4318",
        "TRACELET_PORT_4318_TCP_ADDR": "10.0.0.1",
        "TRACELET_GATEWAY_SERVICE_HOST": "10.0.0.2",
        "TRACELET_GATEWAY_PORT_4318_TCP_PROTO": "tcp",
    }
    assert made(tmp_path, environ=environ).backend is None


def test_the_nearest_pyproject_with_our_table_is_read_and_none_beyond_the_git_root(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    inner = repository / "package" / "src"
    inner.mkdir(parents=True)
    pyproject(tmp_path, "[tool.tracelet]\nproject = 'outside'\n")
    pyproject(repository / "package", "[tool.other]\nname = 'tracelet'\n")
    assert made(inner).project == "outside"
    (repository / ".git").mkdir()
    assert made(inner).project == "repository"
    pyproject(repository, "[tool.tracelet]\nproject = 'root'\n")
    assert made(inner).project == "root"


def test_a_pyproject_that_is_no_toml_is_named(tmp_path: Path) -> None:
    pyproject(tmp_path, "[tool.tracelet\n")
    with pytest.raises(ConfigError, match=r"pyproject.toml can't be read"):
        made(tmp_path)


def test_a_relative_folder_starts_where_it_was_written(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    pyproject(tmp_path, "[tool.tracelet]\ndir = 'spool'\n")
    assert made(inner).dir == tmp_path / "spool"
    assert made(inner, environ={"TRACELET_DIR": "spool"}).dir == inner / "spool"
    assert made(inner, {"dir": Path("spool")}).dir == inner / "spool"


def test_toml_numbers_and_lists_are_values(tmp_path: Path) -> None:
    pyproject(tmp_path, "[tool.tracelet]\nmax_bytes = 500_000\ngrace = 1.5\nbackend = ['mlflow', 'otlp']\n")
    resolved = made(tmp_path)
    assert (resolved.max_bytes, resolved.grace_s, resolved.backend) == (500_000, 1.5, ["mlflow", "otlp"])


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("TRACELET_SHIPPER", "proces"),
        ("TRACELET_KEEP", "7"),
        ("TRACELET_KEEP", "7d,8d"),
        ("TRACELET_KEEP", "lots"),
        ("TRACELET_MAX_BYTES", "-1"),
        ("TRACELET_MAX_BYTES", "5 apples"),
        ("TRACELET_GRACE", "nan"),
        ("TRACELET_PROJECT", "   "),
    ],
)
def test_a_value_that_cannot_be_right_names_the_variable_and_what_would_be(
    tmp_path: Path, variable: str, value: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        made(tmp_path, environ={variable: value})
    assert str(caught.value).startswith(f"{variable} is {value!r}, but has to be ")


def test_the_shipper_is_a_process_a_thread_or_off(tmp_path: Path) -> None:
    for word in ("process", "thread", "off"):
        assert made(tmp_path, environ={"TRACELET_SHIPPER": word}).shipper == word
    with pytest.raises(ConfigError, match="process, thread or off"):
        made(tmp_path, environ={"TRACELET_SHIPPER": "threads"})


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("7d,2GB", Keep(604800.0, 2_000_000_000)),
        ("30d", Keep(2592000.0)),
        ("10GB", Keep(max_bytes=10_000_000_000)),
        ("1GiB, 12h", Keep(43200.0, 1 << 30)),
        ("0s", Keep(0.0)),
    ],
)
def test_keep_takes_an_age_a_size_or_both(tmp_path: Path, text: str, keep: Keep) -> None:
    assert made(tmp_path, environ={"TRACELET_KEEP": text}).keep == keep


def test_durations_and_sizes_take_units() -> None:
    assert [parse_duration(text) for text in ("25", "25s", "1.5 min", "2h", 3)] == [25.0, 25.0, 90.0, 7200.0, 3.0]
    assert [parse_size(text) for text in ("10", "500MB", "1kib", "2 TB", 7)] == [10, 500_000_000, 1024, 2 * 10**12, 7]


@pytest.mark.parametrize("value", [True, -1, float("inf"), float("nan"), "", "s", "1x", None, b"1", "1e3"])
def test_what_is_no_quantity_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="a number of"):
        parse_duration(value)


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["/x/train.py", "--lr", "1"], "train"),
        (["/x/package/__main__.py"], "package"),
        ([""], "console"),
        ([], "console"),
        (["-c"], "command"),
        (["-"], "stdin"),
    ],
)
def test_the_experiment_is_called_as_the_program(argv: list[str], name: str) -> None:
    assert script_name(argv) == name


@pytest.mark.parametrize(
    ("variable", "value"),
    [("__vsc_ipynb_file__", "/x/fit.ipynb"), ("IPYNB_FILE", "fit.ipynb"), ("JPY_SESSION_NAME", "work/fit.ipynb")],
)
def test_in_a_notebook_the_experiment_is_called_as_the_notebook(tmp_path: Path, variable: str, value: str) -> None:
    kernel = ("/env/lib/ipykernel_launcher.py", "-f", "kernel.json")
    assert made(tmp_path, environ={variable: value}, argv=kernel).experiment_name == "fit"
    assert made(tmp_path, argv=kernel).experiment_name == "notebook"


def test_the_environment_is_not_printed_with_the_settings(tmp_path: Path) -> None:
    assert "s3cret" not in repr(made(tmp_path, environ={"MLFLOW_TRACKING_PASSWORD": "s3cret"}))


def test_from_process_reads_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACELET_PROJECT", "of environment")
    resolved = settings.from_process({"experiment_name": "x"})
    assert (resolved.project, resolved.experiment_name, resolved.cwd) == ("of environment", "x", tmp_path)


def test_a_working_folder_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ConfigError, match="working folder no longer exists"):
        settings.from_process()


def test_names_that_are_no_utf_8_are_their_escapes_wherever_they_come_from(tmp_path: Path) -> None:
    found = resolve({}, {}, environ={"TRACELET_PROJECT": "p\udcff"}, cwd=tmp_path, argv=["t\udcff.py"])
    assert (found.project, found.experiment_name) == ("p\\udcff", "t\\udcff")
    assert resolve({}, {}, environ={}, cwd=tmp_path / "w\udcff", argv=[""]).project == "w\\udcff"
