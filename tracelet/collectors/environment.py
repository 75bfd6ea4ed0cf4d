"""What is known of a run's surroundings at its start: host, Python, git, job; the Resource; MLflow's own tags.

Taken once, in the training process (the shipper would describe itself). Standard library only, no other process is
started, no network is asked; a few milliseconds. Nothing that may hold a secret is taken: no arguments of the
command line but the program's name, no variables but the ones named here, no user and password of a git remote.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from tracelet import ids
from tracelet.guard import logger
from tracelet.otlp import semconv
from tracelet.records import Scalar
from tracelet.settings import git_root, notebook_name
from tracelet.version import __version__

__all__ = ["Git", "Surroundings", "boot_id", "host_name", "notebook_shell", "read_git", "resource", "take"]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """`attributes` for the `run.started` event, and the tags that MLflow's own client would have set."""

    attributes: Mapping[str, Scalar]
    mlflow_tags: Mapping[str, str]


# ---- host --------------------------------------------------------------------------------------------------------


def host_name() -> str:
    """This host's name, as the kernel has it; a container's own in a container."""
    return os.uname().nodename or "localhost"


def boot_id(path: Path = Path("/proc/sys/kernel/random/boot_id")) -> str:
    """An id of this boot of this host; "unknown" where the kernel has none (macOS, no /proc)."""
    try:
        text = path.read_text().strip()
    except OSError:
        return "unknown"
    # It becomes part of a folder's name.
    return re.sub(r"[^A-Za-z0-9-]", "", text) or "unknown"


# ---- the Resource ------------------------------------------------------------------------------------------------


def resource(
    *,
    project: str,
    experiment_name: str,
    run_id: str,
    run_name: str,
    attempt_key: str,
    attempt_order: int,
    rank: int,
    environ: Mapping[str, str],
) -> dict[str, Scalar]:
    """The Resource of one rank of an attempt, exactly as the wire contract has it.

    `service.name` is OTEL_SERVICE_NAME, else the one in OTEL_RESOURCE_ATTRIBUTES, else the project;
    `service.namespace` the one in OTEL_RESOURCE_ATTRIBUTES, else "tracelet". What else stands in
    OTEL_RESOURCE_ATTRIBUTES is added, and can't replace anything.
    """
    given = _resource_attributes(environ.get("OTEL_RESOURCE_ATTRIBUTES", ""))
    ours: dict[str, Scalar] = {
        "service.name": environ.get("OTEL_SERVICE_NAME", "").strip() or given.get("service.name") or project,
        "service.namespace": given.get("service.namespace") or "tracelet",
        semconv.SERVICE_INSTANCE_ID: ids.instance_id(run_id, attempt_key, rank),
        semconv.PROJECT: project,
        semconv.EXPERIMENT_NAME: experiment_name,
        semconv.RUN_ID: run_id,
        semconv.RUN_NAME: run_name,
        semconv.RUN_ATTEMPT: attempt_key,
        semconv.ATTEMPT_ORDER: attempt_order,
        semconv.RANK: rank,
        semconv.RESOURCE_WIRE_VERSION: semconv.WIRE_VERSION,
        semconv.HOST_NAME: host_name(),
        "telemetry.sdk.name": "tracelet",
        "telemetry.sdk.language": "python",
        "telemetry.sdk.version": __version__,
    }
    return _clean({**given, **ours})


def _resource_attributes(text: str) -> dict[str, str]:
    """OTEL_RESOURCE_ATTRIBUTES: `key=value` with commas, values percent-encoded (OpenTelemetry's Resource SDK)."""
    attributes: dict[str, str] = {}
    for pair in text.split(","):
        key, equals, value = pair.partition("=")
        if equals and key.strip():
            attributes[key.strip()] = unquote(value.strip())
        elif pair.strip():
            logger.warning("OTEL_RESOURCE_ATTRIBUTES: %r is left out, it is no key=value", pair.strip())
    return attributes


def _clean(attributes: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Half characters (a path or variable that is no UTF-8) as their escapes: OTLP and JSON carry UTF-8 only."""
    return {
        key.encode("utf-8", "backslashreplace").decode(): value.encode("utf-8", "backslashreplace").decode()
        if isinstance(value, str)
        else value
        for key, value in attributes.items()
    }


# ---- the event, and MLflow's tags --------------------------------------------------------------------------------


def take(
    environ: Mapping[str, str], cwd: Path, argv: Sequence[str], *, modules: Mapping[str, object] | None = None
) -> Surroundings:
    """Describe the surroundings of this process. Never raises: what can't be found out is left out.

    `modules` None: `sys.modules`. Cost: 1 to 5 ms, most of it the versions of what is imported.
    """
    loaded = dict(sys.modules) if modules is None else modules
    script = argv[0] if argv else ""
    git = read_git(_script_folder(script, cwd) or cwd)
    system = os.uname()
    attributes: dict[str, Scalar | None] = {
        "os.type": system.sysname.lower(),
        "os.version": system.release,
        "host.arch": system.machine,
        "process.pid": os.getpid(),
        "process.owner": _user(environ),
        "process.command": os.path.basename(script) or None,
        "process.working_directory": str(cwd),
        "process.runtime.name": sys.implementation.name,
        "process.runtime.version": ".".join(str(part) for part in sys.version_info[:3]),
        "vcs.ref.head.revision": git.commit,
        "vcs.ref.head.name": git.branch,
        "vcs.repository.url.full": git.remote,
        "tracelet.packages": _versions(loaded) or None,
        **_job(environ),
    }
    given = {name: value for name, value in attributes.items() if value is not None}
    tags = _mlflow_tags(environ, cwd, argv, git, loaded)
    return Surroundings(_clean(given), {key: str(value) for key, value in _clean(tags).items()})


def _versions(modules: Mapping[str, object]) -> str:
    """`name==version` of every imported top-level package that says its version, with blanks between.

    One attribute, since log stores take at most 128. What is installed and not imported is not listed: reading the
    metadata of 200 distributions takes 60 to 200 ms, and most of them have no part in the run.
    """
    found = []
    for name, module in sorted(modules.items()):
        if "." in name or name.startswith("_") or name in sys.stdlib_module_names or name == "tracelet":
            continue
        # vars(), not getattr: some packages import half of themselves when an attribute is asked for.
        version = getattr(module, "__dict__", {}).get("__version__")
        if isinstance(version, str) and 0 < len(version) < 64:
            found.append(f"{name}=={version}")
    return " ".join(found)


# Attributes of OpenTelemetry's conventions where there are any; SLURM's are not among them yet.
_JOB = {
    "SLURM_JOB_ID": "tracelet.slurm.job_id",
    "SLURM_JOB_NAME": "tracelet.slurm.job_name",
    "SLURM_ARRAY_JOB_ID": "tracelet.slurm.array_job_id",
    "SLURM_ARRAY_TASK_ID": "tracelet.slurm.array_task_id",
    "SLURM_STEP_ID": "tracelet.slurm.step_id",
    "SLURM_CLUSTER_NAME": "tracelet.slurm.cluster",
    "SLURM_JOB_PARTITION": "tracelet.slurm.partition",
    "SLURM_RESTART_COUNT": "tracelet.slurm.restart_count",
    "PBS_JOBID": "tracelet.pbs.job_id",
    "LSB_JOBID": "tracelet.lsf.job_id",
}
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def _job(environ: Mapping[str, str]) -> dict[str, Scalar | None]:
    job: dict[str, Scalar | None] = {name: environ.get(variable) or None for variable, name in _JOB.items()}
    if environ.get("KUBERNETES_SERVICE_HOST"):
        job["k8s.pod.name"] = host_name()
        try:
            job["k8s.namespace.name"] = _NAMESPACE_FILE.read_text().strip() or None
        except OSError:
            pass  # a pod without a service account's token
    return job


def _user(environ: Mapping[str, str]) -> str:
    """The user's name by the rules of `getpass.getuser`, which MLflow asks; "unknown" where the uid has no name."""
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        if environ.get(variable):
            return environ[variable]
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return "unknown"


# ---- git ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Git:
    """The commit, branch and first remote of a repository; None for what it doesn't have."""

    commit: str | None = None
    branch: str | None = None
    remote: str | None = None


_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SECTION = re.compile(r'\[\s*remote\s+"(?P<name>.*)"\s*\]')
_URL = re.compile(r'url\s*=\s*"?(?P<url>[^"#;]*?)"?\s*(?:[#;].*)?', re.IGNORECASE)


def read_git(folder: Path) -> Git:
    """Commit, branch and remote of the repository `folder` is in, read from git's own files.

    No git process is started, so whether files were changed since the commit is not known. Worktrees, submodules and
    packed references are understood; the reftable format is not, and gives no commit.
    """
    root = git_root(folder)
    if root is None:
        return Git()
    try:
        return _read_git(root)
    except (OSError, ValueError):
        return Git()  # not readable by us, no text, an address that is none: then nothing is known


def _read_git(root: Path) -> Git:
    git = root / ".git"
    if git.is_file():  # a worktree or submodule: `gitdir: <path>`
        git = root / git.read_text().removeprefix("gitdir:").strip()
    common_file = git / "commondir"
    common = git / common_file.read_text().strip() if common_file.is_file() else git
    head = (git / "HEAD").read_text().strip()
    branch = None
    commit: str | None = head
    if head.startswith("ref:"):
        reference = head.removeprefix("ref:").strip()
        branch = reference.removeprefix("refs/heads/")
        commit = _resolve(reference, git, common)
    if commit is None or not _COMMIT.fullmatch(commit):
        return Git(remote=_first_remote(common))
    return Git(commit, branch, _first_remote(common))


def _resolve(reference: str, git: Path, common: Path) -> str | None:
    for folder in (git, common):
        try:
            return (folder / reference).read_text().strip()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            continue
    try:
        packed = (common / "packed-refs").read_text()
    except FileNotFoundError:
        return None
    return next((line.split()[0] for line in packed.splitlines() if line.endswith(f" {reference}")), None)


def _first_remote(common: Path) -> str | None:
    """The address of the first remote in git's configuration, without user and password."""
    try:
        lines = (common / "config").read_text().splitlines()
    except OSError:
        return None
    inside = False
    for line in map(str.strip, lines):
        if line.startswith("["):
            inside = _SECTION.fullmatch(line) is not None
        elif inside and (match := _URL.fullmatch(line)) and match["url"]:
            parts = urlsplit(match["url"])
            if parts.scheme and "@" in parts.netloc:
                return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
            return match["url"]
    return None


def _script_folder(script: str, cwd: Path) -> Path | None:
    """The folder of the program's file, unless it is one of the environment's own (pytest, a notebook's kernel)."""
    path = Path(os.path.abspath(cwd / script))
    if not script or not path.is_file() or _in_environment(path):
        return None
    return path.parent


def _in_environment(path: Path) -> bool:
    return any(
        path.is_relative_to(prefix) for prefix in {sys.prefix, sys.base_prefix} - {"/", "/usr", "/usr/local"}
    ) or ("site-packages" in path.parts or path.parent in (Path("/usr/bin"), Path("/usr/local/bin")))


# ---- MLflow's own tags -------------------------------------------------------------------------------------------


def _mlflow_tags(
    environ: Mapping[str, str], cwd: Path, argv: Sequence[str], git: Git, modules: Mapping[str, object]
) -> dict[str, Scalar]:
    """What mlflow.tracking.context's default, git, notebook and environment providers would set, in their order.

    Not: Databricks, and providers that other packages add; these need mlflow imported.
    """
    script = argv[0] if argv else ""
    tags: dict[str, Scalar] = {
        "mlflow.user": _mlflow_user(environ) or _user(environ),
        "mlflow.source.name": script or "<console>",
        "mlflow.source.type": "LOCAL",
    }
    # MLflow looks at the repository of the program's file alone (and not where git ignores it, as a virtual
    # environment), and sets nothing at all without a commit.
    if git.commit is not None and _script_folder(script, cwd) is not None:
        tags["mlflow.source.git.commit"] = git.commit
        if git.branch is not None:
            tags["mlflow.source.git.branch"] = git.branch
        if git.remote is not None:
            tags["mlflow.source.git.repoURL"] = git.remote
    shell = notebook_shell(modules)
    if shell is not None:
        tags["mlflow.source.type"] = "NOTEBOOK"
        named = getattr(shell, "user_ns", {}).get("__vsc_ipynb_file__")
        for path in (named, *(environ.get(v) for v in ("__vsc_ipynb_file__", "IPYNB_FILE", "JPY_SESSION_NAME"))):
            if path:
                tags["mlflow.source.name"] = os.path.basename(str(path))
                break
    elif notebook_name(environ, argv) is not None:
        tags["mlflow.source.type"] = "NOTEBOOK"
    try:
        extra = json.loads(environ.get("MLFLOW_RUN_CONTEXT") or "{}")
        tags.update({str(key): value if isinstance(value, str) else json.dumps(value) for key, value in extra.items()})
    except (ValueError, AttributeError) as error:
        logger.warning("MLFLOW_RUN_CONTEXT is left out, it is no JSON object: %s", error)
    return tags


def notebook_shell(modules: Mapping[str, object]) -> object | None:
    """IPython's shell if this process is a notebook's kernel. Only what is imported already is asked."""
    get_ipython = getattr(modules.get("IPython"), "get_ipython", None)
    shell = get_ipython() if callable(get_ipython) else None
    is_kernel = shell is not None and (type(shell).__name__ == "ZMQInteractiveShell" or hasattr(shell, "kernel"))
    return shell if is_kernel else None


def _mlflow_user(environ: Mapping[str, str]) -> str | None:
    """The user of MLflow's server, if one is set: MLflow's client takes it before the system's."""
    if environ.get("MLFLOW_TRACKING_USERNAME"):
        return environ["MLFLOW_TRACKING_USERNAME"]
    path = Path(environ.get("HOME") or os.path.expanduser("~"), ".mlflow", "credentials")
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError):
        return None
    inside = False
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            inside = line == "[mlflow]"
        key, equals, value = line.partition("=")
        if inside and equals and key.strip().lower() == "mlflow_tracking_username":
            return value.strip() or None
    return None
