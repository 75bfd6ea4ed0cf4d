"""What each program of the stack is started with: command line, environment, files, and how it shows that it serves.

The files of collector-config/ are taken as they are. What differs between machines comes by the environment names that
they read, and Prometheus' folder is copied because the addresses it scrapes stand in files beside it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import stack_programs as programs
from stack_programs import REPOSITORY, StackError, say
from stack_supervisor import Service, is_secret

CONFIG = REPOSITORY / "collector-config"
EXTRAS = ("loki", "kafka", "postgres")
MAY_GO = ("gateway", "mlflow")
HOST = "127.0.0.1"
DATABASE = "mlflow"
DATABASE_USER = "tracelet"


@dataclass(frozen=True)
class Wishes:
    """What `up` was asked for."""

    folder: Path
    extras: frozenset[str] = frozenset()
    without: frozenset[str] = frozenset()
    gateways: int = 1
    configs: tuple[Path, ...] = ()
    core_configs: tuple[Path, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


class Ports:
    """Loopback ports that are free now, and that no outgoing connection takes while their program is down.

    A port of the kernel's range for outgoing connections may be gone when a program is started again; and a client that
    keeps trying such a port sooner or later connects to itself. So they are taken from below that range, by this
    process's own stretch of it: two stacks that start at once don't meet.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._taken: dict[str, int] = json.loads(file.read_text()) if file.exists() else {}
        self._next = 10_000 + os.getpid() * 32 % 20_000
        self._last = _first_ephemeral()

    def take(self, name: str) -> int:
        """The free port of this name: the one of the last `up` in this folder where it can be.

        What waits in a spool knows its destination by its address; with other ports it would wait for ever.
        """
        before = self._taken.get(name)
        if before is None or not _is_free(before):
            if before is not None:
                say(f"port {before} of {name} is taken by another program; a new one is used")
            self._taken[name] = self._new()
            self._file.write_text(json.dumps(self._taken, indent=2) + "\n")
        return self._taken[name]

    def _new(self) -> int:
        others = set(self._taken.values())
        for _ in range(self._last - 10_000):
            port = self._next
            self._next = port + 1 if port + 1 < self._last else 10_000
            if port not in others and _is_free(port):
                return port
        raise StackError("no free port below the kernel's range for outgoing connections")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: old connections don't matter
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


@dataclass
class Plan:
    """All services of one stack, and the addresses under which others find them."""

    wishes: Wishes
    services: dict[str, Service] = field(default_factory=dict)
    addresses: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def ports(self) -> Ports:
        """The ports of this folder."""
        self.wishes.folder.mkdir(parents=True, exist_ok=True)
        return Ports(self.wishes.folder / "ports.json")

    def add(self, service: Service) -> None:
        """One more program."""
        self.services[service.name] = service

    def folder(self, name: str) -> Path:
        """A program's own folder; its data lies there, and stays."""
        path = self.wishes.folder / name
        path.mkdir(parents=True, exist_ok=True)
        return path


def _first_ephemeral() -> int:
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        return 32_768
    return first if first > 11_000 else 32_768


def plan(wishes: Wishes) -> Plan:
    """Find all programs, write the files they need, and say how each is started; starts nothing itself.

    Raises:
        StackError: a program is missing (the text says how to get it), or a file is.
    """
    made = Plan(wishes)
    environment = {}
    for name, value in wishes.environment.items():
        environment[name] = value.replace("{port}", str(made.ports.take(name))) if "{port}" in value else value
    told = {name: value for name, value in environment.items() if not is_secret(name)}
    if told:
        made.addresses["environment"] = told
    if "loki" in wishes.extras:
        add_loki(made)
    if "kafka" in wishes.extras:
        add_kafka(made)
    if "postgres" in wishes.extras:
        add_postgres(made)
    if "mlflow" not in wishes.without:
        add_mlflow(made, environment)
    elif "gateway" not in wishes.without:
        raise StackError("a gateway needs an MLflow: leave out both (--without mlflow,gateway), or none")
    for number in range(wishes.gateways if "gateway" not in wishes.without else 0):
        add_gateway(made, number, environment)
    add_collectors(made, environment)
    add_prometheus(made)  # last: it scrapes the others
    return made


# ---- MLflow, and what it stands on --------------------------------------------------------------------------------


def add_mlflow(made: Plan, environment: Mapping[str, str]) -> None:
    """`mlflow server` of this Python's environment."""
    if importlib.util.find_spec("mlflow") is None:
        raise StackError(
            f"{sys.executable} has no mlflow: start this with the Python of .venv (`make .venv/.ready-dev` makes it)"
        )
    folder, port = made.folder("mlflow"), made.ports.take("mlflow")
    store = f"sqlite:///{folder / 'mlflow.db'}"
    needs: tuple[str, ...] = ()
    more: dict[str, str] = {}
    if "postgres" in made.wishes.extras:
        if importlib.util.find_spec("psycopg2") is None:
            raise StackError(f"{sys.executable} has no psycopg2, which MLflow needs for PostgreSQL")
        # The driver named: which one a plain postgresql:// means changed with SQLAlchemy 2.1.
        store, needs = made.addresses["postgres"].replace("://", "+psycopg2://", 1), ("postgres",)
        more = {"PGPASSFILE": made.addresses["postgres_passfile"]}
    address = f"http://{HOST}:{port}"
    made.addresses["mlflow"] = address
    argv = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    argv += ["--backend-store-uri", store, "--artifacts-destination", str(folder / "artifacts")]
    argv += ["--allowed-hosts", "mlflow:*,localhost:*,127.0.0.1:*"]  # as in docker-compose.yml: any other is a 403
    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", **more}
    settings |= {name: value for name, value in environment.items() if name.startswith("MLFLOW_")}
    made.add(Service("mlflow", argv, folder, settings, says_ok(f"{address}/health"), needs, stop_round=3))


def add_postgres(made: Plan) -> None:
    """A PostgreSQL of its own: its data folder, its user, a password nobody has to know.

    The server refuses to run as root. Then it runs as the user `postgres`, and its data lies in /var/tmp, since folders
    of root are closed to it; stack.json says where.
    """
    initdb, server = (postgres_program(name) for name in ("initdb", "postgres"))
    port, password = made.ports.take("postgres"), made.wishes.folder / "postgres.pass"
    user, folder = None, made.wishes.folder.absolute() / "postgres"
    if os.geteuid() == 0:
        user, folder = _postgres_user(), _postgres_folder(made.wishes.folder)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if user is not None:
        os.chown(folder, *user)
    data = folder / "data"
    if not (data / "PG_VERSION").exists():
        secret = secrets.token_hex(16)
        owner: dict[str, Any] = {} if user is None else {"user": user[0], "group": user[1], "extra_groups": []}
        given = folder / "password"
        given.touch(mode=0o600)
        given.write_text(secret)
        if user is not None:
            os.chown(given, *user)
        make = [initdb, "-D", str(data), "-U", DATABASE_USER, f"--pwfile={given}", "--auth=scram-sha-256"]
        _quietly([*make, "-E", "UTF8", "--locale=C", "--no-sync"], folder, owner, None)
        given.unlink()
        # Without a server: there is none yet that one could ask.
        single = [server, "--single", "-D", str(data), "postgres"]
        _quietly(single, folder, owner, f"CREATE DATABASE {DATABASE};\n")
        password.touch(mode=0o600)
        password.write_text(f"*:*:*:{DATABASE_USER}:{secret}\n")
    made.addresses["postgres"] = f"postgresql://{DATABASE_USER}@{HOST}:{port}/{DATABASE}"
    made.addresses["postgres_passfile"] = str(password.absolute())
    made.addresses["postgres_folder"] = str(folder)
    argv = [server, "-D", str(data), "-h", HOST, "-p", str(port), "-c", "unix_socket_directories="]
    made.add(
        Service(
            "postgres",
            argv,
            folder,
            {},
            lambda: postgres_answers(port),
            stop_round=4,
            stop_signal=signal.SIGINT,  # its "fast" shutdown: ends the sessions, keeps the data
            user=user,
        )
    )


def postgres_program(name: str) -> str:
    """A program of PostgreSQL; distributions keep them in a folder of the version, off PATH."""
    found = shutil.which(name)
    if found is not None:
        return os.path.realpath(found)
    for path in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True):
        return str(path)
    raise StackError(f"PostgreSQL's `{name}` is not here: on Debian and Ubuntu `apt-get install postgresql`")


def _postgres_user() -> tuple[int, int]:
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return entry.pw_uid, entry.pw_gid
    raise StackError("PostgreSQL does not run as root, and there is neither a user postgres nor nobody")


def _postgres_folder(folder: Path) -> Path:
    key = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:12]
    place = Path("/var/tmp") / f"tracelet-postgres-{key}"  # the same for the same --dir: its data is found again
    if place.exists() and (place.is_symlink() or place.stat().st_uid not in (0, _postgres_user()[0])):
        raise StackError(f"{place} belongs to somebody else; remove it, or take another --dir")
    return place


def _quietly(command: Sequence[str], folder: Path, owner: Mapping[str, Any], text: str | None) -> None:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, input=text or "", check=False, timeout=120, **owner
    )
    if done.returncode:
        raise StackError(f"postgres: {command[0]} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")


def postgres_answers(port: int) -> bool:
    """Whether the server talks: it is asked for TLS, which it declines with one letter when it is up."""
    try:
        with socket.create_connection((HOST, port), timeout=1) as connection:
            connection.sendall(struct.pack("!ii", 8, 80877103))
            if connection.recv(1) not in (b"N", b"S"):
                return False
        with socket.create_connection((HOST, port), timeout=1) as connection:
            words = b"user\0" + DATABASE_USER.encode() + b"\0database\0" + DATABASE.encode() + b"\0\0"
            connection.sendall(struct.pack("!ii", 8 + len(words), 196608) + words)
            return connection.recv(1) == b"R"  # it asks for the password; an E would say that it is starting up
    except OSError:
        return False


# ---- the gateway and the collector ---------------------------------------------------------------------------------


def add_gateway(made: Plan, number: int, environment: Mapping[str, str]) -> None:
    """`tracelet gateway`; the first is called gateway, the next gateway-2, gateway-3, ..."""
    name = "gateway" if number == 0 else f"gateway-{number + 1}"
    folder, http, grpc = made.folder(name), made.ports.take(name), made.ports.take(f"{name} grpc")
    address = f"http://{HOST}:{http}"
    made.addresses.setdefault("gateway", address)
    made.addresses.setdefault("gateways", []).append(address)
    made.addresses.setdefault("gateways_grpc", []).append(f"{HOST}:{grpc}")
    argv = [sys.executable, "-m", "tracelet", "gateway", "--host", HOST, "--http-port", str(http)]
    argv += ["--grpc-port", str(grpc), "--dir", str(folder), "--mlflow", made.addresses["mlflow"], "--allow-anonymous"]
    made.add(Service(name, argv, folder, dict(environment), says_ok(f"{address}/readyz"), stop_round=2))


def add_collectors(made: Plan, environment: Mapping[str, str]) -> None:
    """The collector; with Kafka two: `collector`, which programs send to, and `collector-core` behind it."""
    wishes = made.wishes
    kafka = "kafka" in wishes.extras
    usual = [CONFIG / "collector.yaml"]
    if kafka:
        usual.append(CONFIG / "kafka-core.yaml")
    if wishes.gateways == 2:
        usual.append(CONFIG / "gateways.yaml")
    if wishes.gateways > 2 and not (wishes.core_configs if kafka else wishes.configs):
        option = "--core-config" if kafka else "--config"
        raise StackError(
            f"collector-config/gateways.yaml is for two gateways: write one for more, and name it by {option}"
        )
    if kafka:
        add_collector(made, "collector", wishes.configs or (CONFIG / "kafka-edge.yaml",), "", environment)
        add_collector(made, "collector-core", wishes.core_configs or usual, "core_", environment)
    else:
        add_collector(made, "collector", wishes.configs or usual, "", environment)


def add_collector(made: Plan, name: str, configs: Sequence[Path], prefix: str, environment: Mapping[str, str]) -> None:
    """One collector with these files; `prefix` stands before its addresses' names in stack.json."""
    missing = [str(path) for path in configs if not path.is_file()]
    if missing:
        raise StackError(f"there is no {', '.join(missing)}")
    program, folder, wishes = str(programs.find("collector")), made.folder(name), made.wishes
    grpc, http, health, metrics = (made.ports.take(f"{name} {use}") for use in ("grpc", "http", "health", "metrics"))
    if not prefix:  # the one behind Kafka listens to nobody else
        made.addresses |= {"otlp_http": f"http://{HOST}:{http}", "otlp_grpc": f"http://{HOST}:{grpc}"}
    made.addresses |= {
        f"{prefix}collector_health": f"http://{HOST}:{health}",
        f"{prefix}collector_metrics": f"http://{HOST}:{metrics}/metrics",
    }
    made.addresses.setdefault("prometheus", f"http://{HOST}:{made.ports.take('prometheus')}")
    settings = {
        "TRACELET_OTLP_GRPC": f"{HOST}:{grpc}",
        "TRACELET_OTLP_HTTP": f"{HOST}:{http}",
        "TRACELET_COLLECTOR_HEALTH": f"{HOST}:{health}",
        "TRACELET_COLLECTOR_METRICS_HOST": HOST,
        "TRACELET_COLLECTOR_METRICS_PORT": str(metrics),
        "TRACELET_QUEUE_DIR": str(folder / "queue"),
        "TRACELET_PROMETHEUS_URL": f"{made.addresses['prometheus']}/api/v1/otlp",
        "GOMEMLIMIT": "1GiB",
    }
    for number, address in enumerate(made.addresses.get("gateways", [])):
        settings["TRACELET_GATEWAY_URL" if number == 0 else f"TRACELET_GATEWAY_{number + 1}_URL"] = address
    if "loki" in made.addresses:
        settings["TRACELET_LOKI_URL"] = f"{made.addresses['loki']}/otlp"
    if "kafka" in made.addresses:
        settings["TRACELET_KAFKA_BROKERS"] = made.addresses["kafka"]
    if any("TRACELET_SECOND_OTLP_HTTP" in path.read_text() for path in configs):
        second_http, second_grpc = (made.ports.take(f"{name} second {use}") for use in ("http", "grpc"))
        settings |= {
            "TRACELET_SECOND_OTLP_HTTP": f"{HOST}:{second_http}",
            "TRACELET_SECOND_OTLP_GRPC": f"{HOST}:{second_grpc}",
        }
        made.addresses |= {
            f"{prefix}second_otlp_http": f"http://{HOST}:{second_http}",
            f"{prefix}second_otlp_grpc": f"http://{HOST}:{second_grpc}",
        }
    settings |= environment
    argv = [program]
    for path in configs:
        argv += ["--config", str(path.absolute())]
    unreachable = [
        backend
        for backend, variable, there in (
            ("tempo", "TRACELET_TEMPO_ENDPOINT", False),
            ("loki", "TRACELET_LOKI_URL", "loki" in made.addresses),
            ("gateway", "TRACELET_GATEWAY_URL", "gateway" in made.addresses),
        )
        if not there and variable not in environment
    ]
    argv += _switched_off(configs, unreachable)
    needs = ("kafka",) if "kafka" in wishes.extras else ()
    made.add(Service(name, argv, folder, settings, says_ok(f"http://{HOST}:{health}/"), needs, stop_round=1))


def _switched_off(configs: Sequence[Path], backends: Sequence[str]) -> list[str]:
    """Arguments that put `nop` where an exporter has no backend here: its queue would fill for nothing."""
    import yaml

    pipelines: dict[str, list[str]] = {}
    connectors: set[str] = set()
    for path in configs:
        config = yaml.safe_load(path.read_text()) or {}
        found = config.get("service", {}).get("pipelines") or {}
        pipelines |= {name: p["exporters"] for name, p in found.items() if p and "exporters" in p}
        connectors |= (config.get("connectors") or {}).keys()
    arguments: list[str] = []
    for name, exporters in pipelines.items():
        # A connector only leads on to the next pipeline.
        kept = [
            e
            for e in exporters
            if e in connectors or not any(e.rpartition("/")[2].startswith(backend) for backend in backends)
        ]
        if kept != exporters:
            listed = ", ".join(kept) or "nop"
            arguments += ["--config", f"yaml:service::pipelines::{name}::exporters: [{listed}]"]
    return [*arguments, "--config", "yaml:exporters::nop: {}"] if arguments else []


# ---- Prometheus, Loki, Kafka ----------------------------------------------------------------------------------------


def add_prometheus(made: Plan) -> None:
    """Prometheus with a copy of collector-config/prometheus, in which only the addresses to scrape differ."""
    folder = made.folder("prometheus")
    config = folder / "config"
    shutil.rmtree(config, ignore_errors=True)
    shutil.copytree(CONFIG / "prometheus", config)
    write_targets(config / "targets", made.addresses)
    address = made.addresses.setdefault("prometheus", f"http://{HOST}:{made.ports.take('prometheus')}")
    argv = [str(programs.find("prometheus")), f"--config.file={config / 'prometheus.yaml'}"]
    argv += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address.removeprefix('http://')}"]
    argv += ["--storage.tsdb.retention.time=30d", "--web.enable-otlp-receiver", "--web.enable-lifecycle"]
    made.add(Service("prometheus", argv, folder, {}, says_ok(f"{address}/-/ready"), stop_round=2))


def write_targets(folder: Path, addresses: Mapping[str, Any]) -> None:
    """Put the addresses of this machine into the target files; a target that doesn't run here goes.

    The files name hosts as docker-compose.yml does (`gateway:4318`); the service's name decides.
    """
    here: dict[str, list[str]] = {
        "prometheus": [_address(addresses.get("prometheus"))],
        "collector": [_address(addresses.get(name)) for name in ("collector_metrics", "core_collector_metrics")],
        "gateway": [_address(gateway) for gateway in addresses.get("gateways", [])],
        "loki": [_address(addresses.get("loki"))],
        "mlflow": [_address(addresses.get("mlflow"))],
    }
    import yaml

    for path in folder.glob("*.y*ml"):
        groups = yaml.safe_load(path.read_text()) or []
        for group in groups:
            hosts = [str(target).partition(":")[0].rstrip("0123456789").rstrip("-") for target in group["targets"]]
            group["targets"] = [native for host in dict.fromkeys(hosts) for native in here.get(host, []) if native]
        path.write_text(yaml.safe_dump([group for group in groups if group["targets"]]))


def _address(url: str | None) -> str:
    return "" if url is None else re.sub(r"^https?://([^/]+).*$", r"\1", url)


def add_loki(made: Plan) -> None:
    """Loki with collector-config/loki/loki.yaml and its files in a folder."""
    config = CONFIG / "loki" / "loki.yaml"
    if not config.is_file():
        raise StackError(f"there is no {config}")
    folder, http, grpc = made.folder("loki"), made.ports.take("loki"), made.ports.take("loki grpc")
    address = f"http://{HOST}:{http}"
    made.addresses["loki"] = address
    argv = [str(programs.find("loki")), f"-config.file={config}", "-config.expand-env=true"]
    settings = {
        "TRACELET_LOKI_HOST": HOST,
        "TRACELET_LOKI_PORT": str(http),
        "TRACELET_LOKI_GRPC_PORT": str(grpc),
        "TRACELET_LOKI_DIR": str(folder / "data"),
    }
    made.add(Service("loki", argv, folder, settings, says_ok(f"{address}/ready"), stop_round=2))


def add_kafka(made: Plan) -> None:
    """One Kafka broker that is its own controller."""
    java = shutil.which("java")
    if java is None:
        raise StackError("kafka needs Java 17 or newer: on Debian and Ubuntu `apt-get install default-jre-headless`")
    jars, folder = programs.find("kafka"), made.folder("kafka")
    port, controller = made.ports.take("kafka"), made.ports.take("kafka controller")
    made.addresses["kafka"] = f"{HOST}:{port}"
    settings = folder / "server.properties"
    settings.write_text(
        f"""process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{HOST}:{controller}
listeners=PLAINTEXT://{HOST}:{port},CONTROLLER://{HOST}:{controller}
advertised.listeners=PLAINTEXT://{HOST}:{port}
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
log.dirs={folder / "data"}
num.partitions=4
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
"""
    )
    run = [java, "-Xmx512m", "-Dorg.slf4j.simpleLogger.showDateTime=true", "-cp", f"{jars}/*"]
    identity = "dHJhY2VsZXQtc3RhY2stMA"  # 16 bytes in base64: any will do, it has to stay the same
    form = [*run, "kafka.tools.StorageTool", "format", "--ignore-formatted", "-t", identity, "-c", str(settings)]
    done = subprocess.run(form, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise StackError(f"kafka: the storage could not be formatted:\n{(done.stdout + done.stderr)[-2000:]}")
    argv = [*run, "kafka.Kafka", str(settings)]
    made.add(Service("kafka", argv, folder, {}, lambda: kafka_answers(port), stop_round=2))


def kafka_answers(port: int) -> bool:
    """Whether the broker answers a request (ApiVersions, version 0); it listens long before it does."""
    body = struct.pack("!hhih", 18, 0, 7, -1)
    try:
        with socket.create_connection((HOST, port), timeout=1) as connection:
            connection.sendall(struct.pack("!i", len(body)) + body)
            answer = connection.recv(10)
    except OSError:
        return False
    return len(answer) == 10 and struct.unpack("!iih", answer)[1:] == (7, 0)


def says_ok(address: str) -> Callable[[], bool]:
    """A question whether an address answers 200."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask() -> bool:
        try:
            with opener.open(address, timeout=2) as reply:
                return bool(reply.status == 200)
        except (OSError, urllib.error.HTTPError, ValueError):
            return False

    return ask


def report(made: Plan) -> None:
    """Where everything listens, for the person who waits."""
    for name, value in made.addresses.items():
        if isinstance(value, str):
            say(f"  {name:18} {value}")
