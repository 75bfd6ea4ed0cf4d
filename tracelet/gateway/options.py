"""The gateway's own settings: TRACELET_GATEWAY_* and the options of `tracelet gateway`, checked.

What is given first wins: an option, the environment, the default. `GATEWAY_SETTINGS` is the table that drives all of
it, the documentation included; the client takes no notice of these names.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tracelet import destinations
from tracelet.addresses import without_credentials
from tracelet.backends import MLflow
from tracelet.errors import ConfigError
from tracelet.settings import Setting, parse_duration, parse_size

__all__ = ["GATEWAY_SETTINGS", "Options", "destination", "is_known", "is_loopback", "resolve"]


@dataclass(frozen=True, slots=True)
class Options:
    """Every setting with its value."""

    host: str
    http_port: int
    grpc_port: int | None  # None: no gRPC
    dir: Path
    mlflow: str | None  # None: MLFLOW_TRACKING_URI
    mlflow_public: str | None  # None: the same
    tokens: Path | None
    allow_anonymous: bool
    tls_cert: Path | None
    tls_key: Path | None
    tls_client_ca: Path | None
    max_body: int
    max_compressed: int
    max_in_flight: int
    max_bytes: int | None
    unknown_bytes: int
    body_timeout: float
    threads: int
    lost_after: float
    grace: float
    artifact_prefixes: tuple[str, ...]
    artifact_max_bytes: int | None
    artifact_quota: int | None


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("text that is not empty")
    return value.strip()


def _web_address(value: object) -> str:
    address = without_credentials(_text(value)).rstrip("/")  # everybody is told it
    parts = urlsplit(address)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.query
        or parts.fragment
        or not address.isprintable()
    ):
        raise ValueError("a web address, such as https://mlflow.example.com")
    return address


def _port(value: object) -> int:
    number = int(value) if isinstance(value, (int, str)) and re.fullmatch(r"[0-9]{1,5}", str(value)) else -1
    if not 0 <= number <= 65535:
        raise ValueError("a port, 0 to 65535 (0: a free one)")
    return number


def _port_or_off(value: object) -> int | None:
    if value == "off":
        return None
    try:
        return _port(value)
    except ValueError:
        raise ValueError("a port, 0 to 65535 (0: a free one), or off") from None


def _path(value: object) -> Path:
    try:
        return Path(_text(value)).expanduser().absolute()
    except RuntimeError:
        raise ValueError("a path; whose home is meant by its ~ can't be told") from None


def _yes(value: object) -> bool:
    known = {True: True, "1": True, "true": True, "yes": True, False: False, "0": False, "false": False, "no": False}
    key = value.strip().lower() if isinstance(value, str) else value
    if not isinstance(key, (str, bool)) or key not in known:
        raise ValueError("true or false")
    return known[key]


def _positive(value: object) -> int:
    if not isinstance(value, (int, str)) or not re.fullmatch(r"[1-9][0-9]{0,3}", str(value)):
        raise ValueError("a number, 1 to 9999")
    return int(value)


def _size(value: object) -> int:
    size = parse_size(value)
    if size == 0:
        raise ValueError("more than 0 bytes, such as 16MiB")
    return size


def _prefixes(value: object) -> tuple[str, ...]:
    parts = value.replace(",", " ").split() if isinstance(value, str) else list(value or ())  # type: ignore[call-overload]
    return tuple(_text(part) for part in parts)


GATEWAY_SETTINGS: tuple[Setting, ...] = (
    Setting(
        "host",
        "TRACELET_GATEWAY_HOST",
        _text,
        "`127.0.0.1`",
        "The address to listen on. Beyond loopback it needs a tokens file, or `--allow-anonymous`.",
    ),
    Setting(
        "http_port",
        "TRACELET_GATEWAY_HTTP_PORT",
        _port,
        "`4318`",
        "The port of OTLP/HTTP, /metrics, /healthz; 0: a free one.",
    ),
    Setting(
        "grpc_port",
        "TRACELET_GATEWAY_GRPC_PORT",
        _port_or_off,
        "`4317`",
        "The port of OTLP/gRPC; 0: a free one; `off`: none.",
    ),
    Setting(
        "dir",
        "TRACELET_GATEWAY_DIR",
        _path,
        "`$XDG_STATE_HOME/tracelet-gateway`, else `~/.local/state/tracelet-gateway`",
        "The folder of the gateway: its spool (`runs`), artifacts, and what it could not understand (`unknown`).",
    ),
    Setting(
        "mlflow",
        "TRACELET_GATEWAY_MLFLOW",
        _text,
        "`MLFLOW_TRACKING_URI`",
        "The MLflow server or database that runs go to. Credentials are read from MLflow's own variables.",
    ),
    Setting(
        "mlflow_public",
        "TRACELET_GATEWAY_MLFLOW_PUBLIC",
        _web_address,
        "the address that runs go to",
        "Where people's browsers find that MLflow, for `/runs/<run id>`, if it has another name for them.",
    ),
    Setting(
        "tokens",
        "TRACELET_GATEWAY_TOKENS",
        _path,
        "none: everybody may send",
        "The TOML file of bearer tokens; read again when it changes.",
    ),
    Setting(
        "allow_anonymous",
        "TRACELET_GATEWAY_ALLOW_ANONYMOUS",
        _yes,
        "`false`",
        "Listen beyond loopback without a tokens file.",
    ),
    Setting(
        "tls_cert",
        "TRACELET_GATEWAY_TLS_CERT",
        _path,
        "none: plain text",
        "The server's certificate chain, PEM; read again when it changes.",
    ),
    Setting("tls_key", "TRACELET_GATEWAY_TLS_KEY", _path, "none", "Its private key, PEM."),
    Setting(
        "tls_client_ca",
        "TRACELET_GATEWAY_TLS_CLIENT_CA",
        _path,
        "none: clients need no certificate",
        "The authority, PEM, of which every client has to show a certificate.",
    ),
    Setting("max_body", "TRACELET_GATEWAY_MAX_BODY", _size, "`16MiB`", "The most bytes of a request, once inflated."),
    Setting(
        "max_compressed",
        "TRACELET_GATEWAY_MAX_COMPRESSED",
        _size,
        "`16MiB`",
        "The most bytes of a compressed request, as sent.",
    ),
    Setting(
        "max_in_flight",
        "TRACELET_GATEWAY_MAX_IN_FLIGHT",
        _size,
        "`256MiB`",
        "The most bytes of all requests being received or taken; beyond it: come again.",
    ),
    Setting(
        "max_bytes",
        "TRACELET_GATEWAY_MAX_BYTES",
        _size,
        "no limit but the disk",
        "The most bytes of the spool; beyond it nothing is taken, and senders are told to come again.",
    ),
    Setting(
        "unknown_bytes",
        "TRACELET_GATEWAY_UNKNOWN_BYTES",
        _size,
        "`100MB`",
        "The most bytes of requests set aside because this release does not understand their wire version.",
    ),
    Setting(
        "body_timeout",
        "TRACELET_GATEWAY_BODY_TIMEOUT",
        parse_duration,
        "`60s`",
        "How long a request's body may take; a sixth of it is the longest pause in it.",
    ),
    Setting(
        "threads", "TRACELET_GATEWAY_THREADS", _positive, "`16`", "How many requests are decoded and written at once."
    ),
    Setting(
        "lost_after",
        "TRACELET_LOST_AFTER",
        parse_duration,
        "`1h`",
        "After how long without a sign of life a run gets the tag `tracelet.state=LOST`.",
    ),
    Setting(
        "grace",
        "TRACELET_GATEWAY_GRACE",
        parse_duration,
        "`25s`",
        "After SIGTERM: how long requests are finished and runs delivered; the rest waits for the next start.",
    ),
    Setting(
        "artifact_prefixes",
        "TRACELET_GATEWAY_ARTIFACT_PREFIXES",
        _prefixes,
        "none: artifacts elsewhere stay references",
        "URLs, with commas, below which the gateway opens artifacts that a run names.",
    ),
    Setting(
        "artifact_max_bytes",
        "TRACELET_GATEWAY_ARTIFACT_MAX_BYTES",
        _size,
        "`5GiB`",
        "The largest artifact that is brought to MLflow; a larger one stays a reference.",
    ),
    Setting(
        "artifact_quota",
        "TRACELET_GATEWAY_ARTIFACT_QUOTA",
        _size,
        "no limit but the disk",
        "The most bytes of artifacts put to the gateway that MLflow has not taken yet; beyond it, files wait.",
    ),
)

# The collector's names for its way to the gateway: see collector-config.
_ELSEWHERE = re.compile(r"TRACELET_GATEWAY_(?:\d+_)?(?:URL|TOKEN|TOKEN_FILE|CA)")
# What Kubernetes tells every container of a namespace with a Service `tracelet-gateway`.
_KUBERNETES = re.compile(
    r"TRACELET_GATEWAY_(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_\d+_(?:TCP|UDP|SCTP)(?:_\w+)?)?)"
)


def is_known(name: str) -> bool:
    """Whether a variable is one of the gateway's, or the collector's for its way here.

    Examples:
        >>> from tracelet.gateway.options import is_known
        >>> is_known("TRACELET_GATEWAY_TOKENS"), is_known("TRACELET_GATEWAY_URL"), is_known("TRACELET_GATEWAY_" + "X")
        (True, True, False)
    """
    return any(name == setting.env for setting in GATEWAY_SETTINGS) or bool(_ELSEWHERE.fullmatch(name))


def resolve(arguments: Mapping[str, object], environ: Mapping[str, str]) -> Options:
    """Options from `arguments`, else the environment, else the defaults; None and empty mean "not given".

    Raises:
        ConfigError: a value that can't be right, a name that is no setting, an address beyond loopback that nobody
            guards, half of a certificate.

    Examples:
        >>> from tracelet.gateway.options import resolve
        >>> resolve({"mlflow": "http://mlflow:5000"}, {"TRACELET_GATEWAY_MAX_BODY": "1MB"}).max_body
        1000000
    """
    known = {str(setting.env): setting for setting in GATEWAY_SETTINGS}
    for name in sorted(environ):
        if name.startswith("TRACELET_GATEWAY_") and not is_known(name) and not _KUBERNETES.fullmatch(name):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
            advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
            raise ConfigError(f"{name} in the environment is no setting of the gateway: {advice}", setting=name)
    values = _defaults(environ)
    for setting in GATEWAY_SETTINGS:
        given = arguments.get(setting.name)
        origin = f"--{setting.name.replace('_', '-')}"
        if given is None or given == ():
            text = environ.get(str(setting.env), "").strip()
            if not text or (setting.name.endswith("_port") and "://" in text):  # Kubernetes' TRACELET_GATEWAY_HTTP_PORT
                continue
            given, origin = text, str(setting.env)
        try:
            values[setting.name] = setting.parse(given)
        except ValueError as error:
            raise ConfigError(
                f"{origin} is {given!r}, but has to be {error}", setting=setting.name, value=given
            ) from None
    options = Options(**values)
    _check(options, environ)
    return options


def _defaults(environ: Mapping[str, str]) -> dict[str, Any]:
    state = environ.get("XDG_STATE_HOME", "")
    home = environ.get("HOME") or os.path.expanduser("~")
    folder = Path(state) if os.path.isabs(state) else Path(home, ".local/state")
    mib = 1 << 20
    return {
        **{setting.name: None for setting in GATEWAY_SETTINGS},
        "host": "127.0.0.1",
        "http_port": 4318,
        "grpc_port": 4317,
        "dir": folder / "tracelet-gateway",
        "allow_anonymous": False,
        "max_body": 16 * mib,
        "max_compressed": 16 * mib,
        "max_in_flight": 256 * mib,
        "unknown_bytes": 100_000_000,
        "body_timeout": 60.0,
        "threads": 16,
        "lost_after": 3600.0,
        "grace": 25.0,
        "artifact_prefixes": (),
        "artifact_max_bytes": 5 * 1024 * mib,
    }


def _check(options: Options, environ: Mapping[str, str]) -> None:
    if options.tokens is None and not options.allow_anonymous and not is_loopback(options.host):
        raise ConfigError(
            f"{options.host} is no loopback address, and there is no tokens file, so anybody could write: give"
            " --tokens FILE, or --allow-anonymous if something else guards the port",
            host=options.host,
        )
    if (options.tls_cert is None) != (options.tls_key is None):
        raise ConfigError("TLS needs both --tls-cert and --tls-key")
    if options.tls_client_ca is not None and options.tls_cert is None:
        raise ConfigError("--tls-client-ca needs --tls-cert and --tls-key")
    if options.max_in_flight < 2 * options.max_body:
        raise ConfigError(
            f"--max-in-flight ({options.max_in_flight}) has to hold a request twice, as sent and as inflated: at least"
            f" {2 * options.max_body}"
        )
    if options.mlflow is None and not environ.get("MLFLOW_TRACKING_URI", "").strip():
        raise ConfigError("nothing says where the runs go: give --mlflow URI, or set MLFLOW_TRACKING_URI")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address.

    Examples:
        >>> from tracelet.gateway.options import is_loopback
        >>> is_loopback("localhost"), is_loopback("::1"), is_loopback("0.0.0.0")
        (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def destination(options: Options, environ: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The MLflow that runs go to, as a destination, and its secrets.

    Raises:
        ConfigError: an address that can't be right.
    """
    found, secrets = destinations.to_destination(MLflow(tracking_uri=options.mlflow), environ, Path.cwd())
    spec = {
        **found["spec"],
        "artifact_dir": str(options.dir / "artifacts"),
        "artifact_prefixes": list(options.artifact_prefixes),
        "artifact_max_bytes": options.artifact_max_bytes,
    }
    return {**found, "spec": spec}, secrets
