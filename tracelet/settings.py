"""The one reader of the environment: arguments, config, TRACELET_* and pyproject.toml become checked settings.

What is given first wins: an argument, the config object, the environment, `[tool.tracelet]` of the nearest
pyproject.toml, the default. `SETTINGS` is the table that drives all of it, the documentation included.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tracelet.errors import ConfigError

__all__ = [
    "READ_ELSEWHERE",
    "SETTINGS",
    "Keep",
    "Setting",
    "Settings",
    "from_process",
    "git_root",
    "notebook_name",
    "parse_duration",
    "parse_size",
    "resolve",
    "script_name",
]


@dataclass(frozen=True, slots=True)
class Keep:
    """How long, and how much, of what is delivered stays in the spool."""

    max_age_s: float = 7 * 86400.0
    max_bytes: int = 2_000_000_000


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting with its value, checked; `origins` says where each came from."""

    backend: object  # None: not named; else as given: a name, several, specifications (see backends.parse)
    tracking_uri: str | None  # of the destination mlflow; in the environment that is MLFLOW_TRACKING_URI, MLflow's own
    project: str
    experiment_name: str
    run_id: str | None
    dir: Path
    shipper: str  # "process", "thread" or "off"
    keep: Keep
    max_bytes: int | None
    ranks: str  # "zero", "all", "separate"
    grace_s: float
    otlp_headers_file: Path | None  # of the destination otlp
    prometheus_url: str | None  # of the destination prometheus
    prometheus_headers_file: Path | None
    prometheus_certificate: Path | None
    prometheus_client_certificate: Path | None
    prometheus_client_key: Path | None
    metric_prefix: str
    window_age_s: float
    window_ahead_s: float
    origins: Mapping[str, str] = field(repr=False)  # setting's name -> "argument", "config", "TRACELET_DIR", ...
    environ: Mapping[str, str] = field(repr=False)  # as it was then; may hold secrets: never printed, never written
    cwd: Path = field(repr=False)
    argv: tuple[str, ...] = field(repr=False)


# ---- parsers: what was given -> the value; ValueError says what would be right -----------------------------------

_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_BYTES = {
    unit: factor
    for power, letter in enumerate(("", "k", "m", "g", "t"))
    for unit, factor in ((f"{letter}b", 1000**power), (f"{letter}ib", 1024**power))
}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", re.ASCII)


def _quantity(value: object, units: Mapping[str, float], hint: str) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
        return value
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2].lower() not in units:
        raise ValueError(hint)
    return float(match[1]) * units[match[2].lower()]


def parse_duration(value: object) -> float:
    """Seconds of a number, or of text such as "25", "25s", "10min", "7d".

    Raises:
        ValueError: anything else; the text says what would be right.

    Examples:
        >>> from tracelet.settings import parse_duration
        >>> parse_duration("7d")
        604800.0
    """
    return float(_quantity(value, _SECONDS, "a number of seconds, or one with s, min, h, d or w, such as 25s"))


def parse_size(value: object) -> int:
    """Bytes of an integer, or of text such as "500MB" (1000**2) or "500MiB" (1024**2).

    Raises:
        ValueError: anything else; the text says what would be right.

    Examples:
        >>> from tracelet.settings import parse_size
        >>> parse_size("2GB")
        2000000000
    """
    units = {**_BYTES, "": 1}
    return int(_quantity(value, units, "a number of bytes, or one with kB, MB, GB, TB, MiB or GiB, such as 500MB"))


def _parse_keep(value: object) -> Keep:
    """A duration, a size, or both with a comma; the part that is left out keeps its default."""
    if isinstance(value, Keep):
        return value
    hint = "a duration, a size or both, such as 7d,2GB"
    if not isinstance(value, str):
        raise ValueError(hint)
    given: dict[str, Any] = {}
    for part in value.split(","):
        match = _QUANTITY.fullmatch(part)
        unit = "" if match is None else match[2].lower()
        if match is None or not unit:  # a number alone could be either
            raise ValueError(hint)
        name = "max_age_s" if unit in _SECONDS else "max_bytes"
        if name in given:
            raise ValueError(hint)
        given[name] = parse_duration(part) if name == "max_age_s" else parse_size(part)
    return Keep(**given)


def _parse_text(value: object) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError("text that is not empty")
    return value


def _parse_prefix(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.:]*", value, re.ASCII):
        raise ValueError("letters, digits, dots and underscores that begin with a letter, such as ml.")
    return value


def _parse_uri(value: object) -> str:
    return _parse_text(os.fspath(value) if isinstance(value, os.PathLike) else value)


def _parse_dir(value: object) -> Path:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError("a folder")
    try:
        return Path(value).expanduser()
    except RuntimeError:  # nobody of that name, or no home to be found
        raise ValueError("a folder; whose home is meant by its ~ can't be told") from None


def _parse_file(value: object) -> Path:
    try:
        return _parse_dir(value)
    except ValueError:
        raise ValueError("a file") from None


def _parse_shipper(value: object) -> str:
    if value not in ("process", "thread", "off"):
        raise ValueError("process, thread or off")
    return str(value)


def _parse_ranks(value: object) -> str:
    if value not in ("zero", "all", "separate"):
        raise ValueError("zero, all or separate")
    return str(value)


def _as_given(value: object) -> object:
    return value


# ---- the table ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: its name in arguments, config and pyproject.toml, its variable, and what it is for."""

    name: str
    env: str | None  # None: an argument or a field of the config object only
    parse: Callable[[object], Any]
    default: str  # in words, for the documentation; the value itself is made by `_defaults`
    doc: str


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "backend",
        "TRACELET_BACKEND",
        _as_given,
        "what the environment names, else MLflow's local store if mlflow is installed, else the spool alone",
        "Where runs go: `mlflow`, `otlp`, `prometheus`, `console`, `file`, or several with commas.",
    ),
    Setting(
        "project",
        "TRACELET_PROJECT",
        _parse_text,
        "`MLFLOW_EXPERIMENT_NAME`, else the git root's or the folder's name",
        "What runs are gathered under; the experiment in MLflow.",
    ),
    Setting(
        "experiment_name",
        "TRACELET_EXPERIMENT_NAME",
        _parse_text,
        "the script's or notebook's name",
        "What a run is called; the run name in MLflow.",
    ),
    Setting(
        "run_id",
        "TRACELET_RUN_ID",
        _parse_text,
        "a new random id",
        "The id of the run; one that exists is resumed.",
    ),
    Setting(
        "dir",
        "TRACELET_DIR",
        _parse_dir,
        "`$XDG_STATE_HOME/tracelet`, else `~/.local/state/tracelet`",
        "The folder of the spool. A local disk is best.",
    ),
    Setting(
        "shipper",
        "TRACELET_SHIPPER",
        _parse_shipper,
        "`process`",
        "`process` delivers while training runs, by a process beside it; `thread` does, in training itself, where no"
        " process may be started; `off` leaves delivery to `tracelet ship`.",
    ),
    Setting(
        "keep",
        "TRACELET_KEEP",
        _parse_keep,
        "`7d,2GB`",
        "How long and how much of what is delivered stays in the spool; a part left out keeps its default.",
    ),
    Setting(
        "max_bytes",
        "TRACELET_MAX_BYTES",
        parse_size,
        "no limit",
        "The most bytes a run's spool folder may hold; beyond it new records are refused and counted.",
    ),
    Setting(
        "ranks",
        "TRACELET_RANKS",
        _parse_ranks,
        "`zero`",
        "Of a launch of several processes (torchrun, srun): `zero` logs what rank 0 logs, `all` what every rank does,"
        " and with `separate` each process is a run of its own.",
    ),
    Setting(
        "grace",
        "TRACELET_GRACE",
        parse_duration,
        "`25s`",
        "How long a program that gets SIGTERM drains, where the shipper can't outlive it.",
    ),
    Setting(
        "otlp_headers_file",
        "TRACELET_OTLP_HEADERS_FILE",
        _parse_file,
        "none",
        "A file with a token, or with lines `name: value`, for the destination `otlp`; read again when it changes.",
    ),
    Setting(
        "prometheus_url",
        "TRACELET_PROMETHEUS_URL",
        _parse_text,
        "`http://localhost:9090`",
        "The server of the destination `prometheus`: its address, or its OTLP base as the collector's file has it.",
    ),
    Setting(
        "prometheus_headers_file",
        "TRACELET_PROMETHEUS_HEADERS_FILE",
        _parse_file,
        "none",
        "The same for the destination `prometheus`.",
    ),
    Setting(
        "prometheus_certificate",
        "TRACELET_PROMETHEUS_CERTIFICATE",
        _parse_file,
        "the usual authorities, or `REQUESTS_CA_BUNDLE`",
        "The authority (PEM) that signed the certificate of the destination `prometheus`.",
    ),
    Setting(
        "prometheus_client_certificate",
        "TRACELET_PROMETHEUS_CLIENT_CERTIFICATE",
        _parse_file,
        "none",
        "The certificate (PEM) that this side shows to the destination `prometheus`: mutual TLS.",
    ),
    Setting(
        "prometheus_client_key",
        "TRACELET_PROMETHEUS_CLIENT_KEY",
        _parse_file,
        "in the certificate's file",
        "The key (PEM) of that certificate.",
    ),
    Setting(
        "metric_prefix",
        "TRACELET_METRIC_PREFIX",
        _parse_prefix,
        "`ml.`",
        "What the names of logged metrics begin with in Prometheus; the collector's file has the same.",
    ),
    Setting(
        "window_age",
        "TRACELET_WINDOW_AGE",
        parse_duration,
        "`143h`",
        "How old a point may be for Prometheus; less than its `out_of_order_time_window`. The collector's file has the"
        " same.",
    ),
    Setting(
        "window_ahead",
        "TRACELET_WINDOW_AHEAD",
        parse_duration,
        "`9m`",
        "How far a point may be ahead of the clock for Prometheus, whose own limit is 10 minutes.",
    ),
    Setting(
        "tracking_uri",
        None,
        _parse_uri,
        "`MLFLOW_TRACKING_URI`, else `mlflow.db` in the working folder",
        "The MLflow server or database of the destination `mlflow`; an argument or a field of the config only.",
    ),
)

READ_ELSEWHERE = frozenset(
    {
        # Names of other programs of this family. They are no settings of a run, and no misspelling either.
        "TRACELET_ARTIFACT_DIR",
        "TRACELET_ARTIFACT_GATEWAY",
        "TRACELET_ARTIFACT_STORE",
        "TRACELET_ARTIFACT_TOKEN",
        "TRACELET_ARTIFACT_TOKEN_FILE",
        "TRACELET_COLLECTOR_HEALTH",
        "TRACELET_COLLECTOR_METRICS_HOST",
        "TRACELET_COLLECTOR_METRICS_PORT",
        "TRACELET_KAFKA_BROKERS",
        "TRACELET_LOG_AGE",
        "TRACELET_LOKI_DIR",
        "TRACELET_LOKI_GRPC_PORT",
        "TRACELET_LOKI_HOST",
        "TRACELET_LOKI_PORT",
        "TRACELET_LOKI_RETENTION",
        "TRACELET_LOKI_URL",
        "TRACELET_LOST_AFTER",
        "TRACELET_OTLP_GRPC",
        "TRACELET_OTLP_HTTP",
        "TRACELET_PROMETHEUS_B_URL",
        "TRACELET_QUEUE_BYTES",
        "TRACELET_QUEUE_DIR",
        "TRACELET_QUEUE_FSYNC",
        "TRACELET_REMOTE_WRITE_URL",
        "TRACELET_SECOND_OTLP_GRPC",
        "TRACELET_SECOND_OTLP_HTTP",
        "TRACELET_SOAK",
        "TRACELET_STACK_CACHE",
        "TRACELET_TEMPO_ENDPOINT",
        "TRACELET_TEST_REQUIRE_STACK",
        "TRACELET_TLS_CERT",
        "TRACELET_TLS_KEY",
        "TRACELET_TOKENS_FILE",
    }
)

# The gateway has its own table, and is strict about it: tracelet/gateway/options.py.
_GATEWAY = "TRACELET_GATEWAY_"

# Kubernetes sets these in every container of a namespace that has a Service whose name begins with `tracelet`.
_KUBERNETES = re.compile(
    r"TRACELET_(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_\d+_(?:TCP|UDP|SCTP)(?:_\w+)?)?)"
)

_BY_NAME = {setting.name: setting for setting in SETTINGS}
_BY_ENV = {setting.env: setting for setting in SETTINGS if setting.env is not None}
_IN_PYPROJECT = {setting.name: setting for setting in SETTINGS if setting.env is not None}


# ---- resolving ---------------------------------------------------------------------------------------------------


def resolve(
    arguments: Mapping[str, object],
    config: Mapping[str, object],
    *,
    environ: Mapping[str, str],
    cwd: Path,
    argv: Sequence[str],
) -> Settings:
    """Settings from `arguments`, else `config`, else TRACELET_*, else pyproject.toml, else the default.

    A None in `arguments` or `config`, and an empty variable, mean "not given".

    Raises:
        ConfigError: a value that can't be right, or a name that is no setting; the text says where it stands
            and, for a name, the nearest right one.

    Cost: the environment is walked once; one `stat` for each folder up to the git root.
    """
    for unknown in sorted(name for name in environ if name.startswith("TRACELET_") and name not in _BY_ENV):
        if unknown.startswith(_GATEWAY) or unknown in READ_ELSEWHERE or _KUBERNETES.fullmatch(unknown):
            continue
        raise _unknown("the environment", unknown, _BY_ENV)
    folder, table = _pyproject(cwd)
    pyproject = f"pyproject.toml ({folder / 'pyproject.toml'})" if folder is not None else "pyproject.toml"
    variables = {setting.name: environ[env] for env, setting in _BY_ENV.items() if environ.get(env)}
    # Where a relative folder starts: each source has its own place.
    sources: tuple[tuple[str | None, Mapping[str, object], Mapping[str, Setting], Path], ...] = (
        ("argument", arguments, _BY_NAME, cwd),
        ("config", config, _BY_NAME, cwd),
        (None, variables, _BY_NAME, cwd),
        (pyproject, table, _IN_PYPROJECT, folder or cwd),
    )
    for origin, values, known, _ in sources:
        for name in values:
            if name not in known:
                raise _unknown("[tool.tracelet]" if origin == pyproject else f"the {origin}s", name, known)
    given: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for setting in SETTINGS:
        for label, values, _, base in sources:
            value = values.get(setting.name)
            if value is None:
                continue
            origin = label if label is not None else str(setting.env)
            given[setting.name] = _parsed(setting, value, origin, base)
            origins[setting.name] = origin
            break
    defaults = _defaults(environ, cwd, argv)
    for name in _BY_NAME:
        if name not in given:
            given[name], origins[name] = defaults[name]
    for name in ("project", "experiment_name"):
        # Half characters (a folder, script or variable that is no UTF-8) as their escapes: no backend takes them, and a
        # run whose name none takes would never be delivered.
        given[name] = given[name].encode("utf-8", "backslashreplace").decode()
    for name in ("grace", "window_age", "window_ahead"):
        given[f"{name}_s"] = given.pop(name)
    return Settings(**given, origins=origins, environ=environ, cwd=cwd, argv=tuple(argv))


def from_process(arguments: Mapping[str, object] | None = None, config: Mapping[str, object] | None = None) -> Settings:
    """`resolve` with this process's environment, working folder and command line, as they are now."""
    try:
        cwd = Path.cwd()
    except FileNotFoundError:
        raise ConfigError("the working folder no longer exists: change to another one") from None
    # An embedded interpreter may have no argv.
    argv = getattr(sys, "argv", None) or [""]
    return resolve(arguments or {}, config or {}, environ=dict(os.environ), cwd=cwd, argv=argv)


def _parsed(setting: Setting, value: object, origin: str, base: Path) -> object:
    try:
        parsed = setting.parse(value)
    except ValueError as error:
        where = origin if origin == setting.env else f"{setting.name} ({origin})"
        raise ConfigError(f"{where} is {value!r}, but has to be {error}", setting=setting.name, value=value) from None
    return base / parsed if isinstance(parsed, Path) else parsed


def _unknown(where: str, name: str, known: Mapping[str, object]) -> ConfigError:
    import difflib  # only on the way to an error

    # Without the prefix they share, which would make everything near to everything.
    short = {key.removeprefix("TRACELET_"): key for key in known}
    near = [short[match] for match in difflib.get_close_matches(name.removeprefix("TRACELET_"), short, n=1, cutoff=0.5)]
    advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
    return ConfigError(f"{name} in {where} is no setting: {advice}", setting=name, nearest=near[0] if near else None)


def _pyproject(cwd: Path) -> tuple[Path | None, Mapping[str, object]]:
    """Folder and table of the nearest pyproject.toml with [tool.tracelet], not beyond the git root."""
    for folder in (cwd, *cwd.parents):
        path = folder / "pyproject.toml"
        try:
            content = path.read_bytes()
        except OSError:
            content = b""
        if b"tracelet" in content:
            import tomllib  # 5 ms; most projects have nothing to read here

            try:
                tools = tomllib.loads(content.decode()).get("tool")
            except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
                raise ConfigError(f"{path} can't be read: {error}", path=str(path)) from None
            table = tools.get("tracelet") if isinstance(tools, dict) else None
            if isinstance(table, dict):
                return folder, table
        if _is_git_root(folder):
            break
    return None, {}


# ---- defaults ----------------------------------------------------------------------------------------------------


def _defaults(environ: Mapping[str, str], cwd: Path, argv: Sequence[str]) -> dict[str, tuple[object, str]]:
    """Value and origin of each setting that was not given."""
    root = git_root(cwd)
    project = environ.get("MLFLOW_EXPERIMENT_NAME", "").strip()
    state = environ.get("XDG_STATE_HOME", "")
    home = environ.get("HOME") or os.path.expanduser("~")
    return {
        "backend": (None, "default"),
        "tracking_uri": (None, "default"),
        "project": (project, "MLFLOW_EXPERIMENT_NAME")
        if project
        else (
            (root or cwd).name or "default",
            "default (the git root's name)" if root else "default (the folder's name)",
        ),
        "experiment_name": (
            notebook_name(environ, argv) or script_name(argv),
            "default (the script's or notebook's name)",
        ),
        "run_id": (None, "default"),
        # The XDG specification: a path that is not absolute is to be ignored.
        "dir": (Path(state, "tracelet"), "default ($XDG_STATE_HOME)")
        if os.path.isabs(state)
        else (Path(home, ".local/state/tracelet"), "default"),
        "shipper": ("process", "default"),
        "keep": (Keep(), "default"),
        "max_bytes": (None, "default"),
        "ranks": ("zero", "default"),
        "grace": (25.0, "default"),
        "otlp_headers_file": (None, "default"),
        "prometheus_url": (None, "default"),
        "prometheus_headers_file": (None, "default"),
        "prometheus_certificate": (None, "default"),
        "prometheus_client_certificate": (None, "default"),
        "prometheus_client_key": (None, "default"),
        "metric_prefix": ("ml.", "default"),
        "window_age": (143 * 3600.0, "default"),
        "window_ahead": (540.0, "default"),
    }


def git_root(path: Path) -> Path | None:
    """The nearest folder at or above `path` that holds `.git` (a folder, or a worktree's file), or None."""
    return next((folder for folder in (path, *path.parents) if _is_git_root(folder)), None)


def _is_git_root(folder: Path) -> bool:
    try:
        return (folder / ".git").exists()
    except OSError:  # a folder that this user may not look into: `su` leaves one there
        return False


_KERNELS = frozenset({"ipykernel_launcher.py", "colab_kernel_launcher.py"})


def notebook_name(environ: Mapping[str, str], argv: Sequence[str]) -> str | None:
    """The name of the notebook this process is the kernel of, "notebook" if it can't be known, None if it is none.

    VS Code, and MLflow's own convention, and Jupyter Server name the file in the environment.
    """
    if not argv or os.path.basename(argv[0]) not in _KERNELS:
        return None
    for variable in ("__vsc_ipynb_file__", "IPYNB_FILE", "JPY_SESSION_NAME"):
        name = Path(environ.get(variable, "")).stem
        if name:
            return name
    return "notebook"


def script_name(argv: Sequence[str]) -> str:
    """The name of the program as a person would call it.

    Examples:
        >>> from tracelet.settings import script_name
        >>> script_name(["/home/a/train.py"]), script_name(["/x/mypkg/__main__.py"]), script_name([""])
        ('train', 'mypkg', 'console')
    """
    first = argv[0] if argv else ""
    special = {"": "console", "-c": "command", "-": "stdin", "-m": "module"}
    if first in special:
        return special[first]
    path = Path(first)
    return (path.parent.name if path.stem == "__main__" else path.stem) or "console"
