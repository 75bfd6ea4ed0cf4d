"""docker-compose.yml: valid, bound to this machine, and what its images run is what the tests run without docker."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.stack.harness import REPOSITORY, Stack, program, require

SERVICES = {"collector", "prometheus", "grafana", "tempo", "loki", "mlflow", "postgres", "gateway"}
NO_SHELL = {"collector", "tempo"}  # their images hold nothing that could ask them: the gateway's container does
NOT_HERE = {"grafana", "tempo"}  # not to be had without their images: `config` is all that is checked of them


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    """The file as docker compose reads it, variables of .env in their places."""
    return config()


def config() -> dict[str, Any]:
    return dict(json.loads(said("config", "--format", "json")))


def said(*words: str) -> str:
    words = (str(program("compose")), "--project-directory", str(REPOSITORY), *words)
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, timeout=60, env={"PATH": "/usr/bin:/bin"}, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr
    assert "variable is not set" not in done.stderr, done.stderr
    return done.stdout


def env_file() -> dict[str, str]:
    lines = (REPOSITORY / ".env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def flags(words: list[str]) -> dict[str, str | None]:
    """Options with their values, whichever way they are written; words without a dash belong to what is before."""
    found: dict[str, str | None] = {}
    last = ""
    for word in words:
        if word.startswith("-"):
            name, equals, value = word.partition("=")
            last = name.lstrip("-")
            found[last] = value if equals else None
        elif last and found[last] is None:
            found[last] = word
    return found


# ---- the file ------------------------------------------------------------


def test_compose_takes_the_file_and_it_has_all_services(composed: dict[str, Any]) -> None:
    assert set(composed["services"]) == SERVICES | {"queue-owner"}


def test_nothing_is_bound_beyond_this_machine(composed: dict[str, Any]) -> None:
    ports = [port for service in composed["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 6
    assert {port["host_ip"] for port in ports} == {"127.0.0.1"}
    assert len({port["published"] for port in ports}) == 6
    assert not any(service.get("network_mode") == "host" for service in composed["services"].values())


def test_images_are_pinned_and_of_the_versions_that_are_tested(composed: dict[str, Any]) -> None:
    images = {name: service["image"] for name, service in composed["services"].items()}
    for name in SERVICES - {"mlflow", "gateway"}:
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+(\.\d+)?", images[name]), images[name]
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    try:
        import stack_programs
    finally:
        sys.path.remove(str(REPOSITORY / "scripts"))
    for name in ("collector", "prometheus", "loki"):
        assert images[name].rpartition(":")[2].removeprefix("v") == stack_programs.PROGRAMS[name].version
    assert images["grafana"].rpartition(":")[2] == stack_programs.PROGRAMS["grafana-schema"].version
    packages = json.loads((REPOSITORY / "stack" / "grafana-schema" / "package.json").read_text())
    assert packages["dependencies"]["@grafana/schema"] == stack_programs.PROGRAMS["grafana-schema"].version


def test_one_service_builds_the_image_that_three_have_and_whoever_has_it_starts_after_that_one(
    composed: dict[str, Any],
) -> None:
    services = composed["services"]
    (builder,) = (name for name, service in services.items() if "build" in service)
    sharing = {name for name, service in services.items() if service["image"] == services[builder]["image"]}
    assert sharing == {builder, "mlflow", "gateway"}
    # No registry is asked for an image of this name.
    assert {services[name]["pull_policy"] for name in sharing} == {"never"}

    def before(name: str) -> set[str]:
        asked = set(services[name].get("depends_on", {}))
        return asked.union(*map(before, asked))

    for name in sharing - {builder}:
        # Also when it is started alone: `docker compose up mlflow` takes what it depends on.
        assert builder in before(name), name
    printed = json.loads(said("build", "--print"))
    assert list(printed["target"]) == [builder]


def test_the_example_is_a_program_of_the_same_image_that_sends_to_the_collector() -> None:
    example = json.loads(said("--profile", "example", "config", "--format", "json"))["services"]["example"]
    assert example["image"] == "tracelet-stack:local"
    assert "build" not in example
    assert set(example["depends_on"]) == {"collector"}
    assert example["environment"] == {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}
    (mounted,) = example["volumes"]
    program, path = example["command"]
    assert program == "python"
    there = Path(mounted["source"]) / Path(path).relative_to(mounted["target"])
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" in there.read_text()
    assert mounted["read_only"]


def test_every_service_is_asked_for_its_health_by_itself_or_by_the_gateway(composed: dict[str, Any]) -> None:
    services = composed["services"]
    assert {name for name in SERVICES if "healthcheck" not in services[name]} == NO_SHELL
    probe = services["gateway"]["healthcheck"]["test"]
    asked = {re.sub(r"^http://([^:/]+).*", r"\1", word) for word in probe if word.startswith("http://")}
    assert asked == {"127.0.0.1"} | NO_SHELL
    assert services["grafana"]["depends_on"]["gateway"]["condition"] == "service_healthy"
    assert services["loki"]["healthcheck"]["test"][-1] == "-health"


def test_each_name_of_the_env_file_is_used_and_each_that_is_used_is_there() -> None:
    used = set(re.findall(r"\$\{(\w+)\}", (REPOSITORY / "docker-compose.yml").read_text()))
    assert used == set(env_file())


def test_links_to_runs_lead_where_a_browser_on_this_machine_finds_mlflow(composed: dict[str, Any]) -> None:
    (port,) = composed["services"]["mlflow"]["ports"]
    public = composed["services"]["gateway"]["environment"]["TRACELET_GATEWAY_MLFLOW_PUBLIC"]
    assert public == f"http://localhost:{port['published']}"


def test_no_password_stands_in_the_compose_file() -> None:
    text = (REPOSITORY / "docker-compose.yml").read_text()
    assert not [value for name, value in env_file().items() if "PASSWORD" in name and value in text]


def test_prometheus_keeps_more_than_its_window(composed: dict[str, Any]) -> None:
    kept = flags(composed["services"]["prometheus"]["command"])["storage.tsdb.retention.time"]
    assert kept is not None
    assert int(kept.removesuffix("d")) > 7


def test_what_is_mounted_is_in_the_repository_and_read_only_or_a_volume(composed: dict[str, Any]) -> None:
    for service in composed["services"].values():
        for mount in service.get("volumes", []):
            if mount["type"] == "bind":
                assert mount["read_only"]
                assert Path(mount["source"]).is_relative_to(REPOSITORY)
                assert Path(mount["source"]).exists(), mount["source"]
            else:
                assert mount["source"] in composed["volumes"]


def test_the_collectors_volume_gets_its_owner_first(composed: dict[str, Any]) -> None:
    services = composed["services"]
    assert services["collector"]["depends_on"]["queue-owner"]["condition"] == "service_completed_successfully"
    (target,) = (mount["target"] for mount in services["queue-owner"]["volumes"])
    assert services["queue-owner"]["command"] == ["chown", "10001:10001", target]
    assert {"type": "volume", "source": "collector-queue", "target": target}.items() <= next(
        mount for mount in services["collector"]["volumes"] if mount["type"] == "volume"
    ).items()


def test_grafana_finds_its_dashboards_where_they_are_mounted(composed: dict[str, Any]) -> None:
    mounted = {mount["target"] for mount in composed["services"]["grafana"]["volumes"]}
    provider = yaml.safe_load(
        (REPOSITORY / "collector-config/grafana/provisioning/dashboards/tracelet.yaml").read_text()
    )
    assert provider["providers"][0]["options"]["path"] in mounted


# ---- the same programs, started the same way ------------------------------------------------------------


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """The commands of a stack that ran without docker; stack.py up ended it again."""
    require("loki")
    with Stack(tmp_path_factory.mktemp("compose") / "stack", extras=("loki",)) as stack:
        assert host_answer(stack, "mlflow:5000") == 200
        assert host_answer(stack, "localhost:5001") == 200
        assert host_answer(stack, "mlflow.evil.example") == 403
        return dict(stack.state["commands"])


def host_answer(stack: Stack, host: str) -> int:
    import http.client

    connection = http.client.HTTPConnection(stack.mlflow.removeprefix("http://"), timeout=20)
    connection.request("GET", "/api/2.0/mlflow/experiments/get?experiment_id=0", headers={"Host": host})
    try:
        return connection.getresponse().status
    finally:
        connection.close()


# What differs by nature: addresses, and folders.
PLACES = {
    "prometheus": {"config.file", "storage.tsdb.path", "web.listen-address", "storage.tsdb.retention.time"},
    "loki": {"config.file"},
    "mlflow": {"host", "port", "backend-store-uri", "artifacts-destination"},
    "gateway": {"host", "http-port", "grpc-port", "dir", "mlflow"},
}


@pytest.mark.parametrize("name", sorted(PLACES))
def test_a_service_has_the_flags_of_the_native_command(
    name: str, composed: dict[str, Any], native: Mapping[str, Any]
) -> None:
    inside, here = flags(composed["services"][name]["command"]), flags(native[name]["argv"][1:])
    assert set(inside) == set(here)
    for flag in set(inside) - PLACES[name]:
        assert inside[flag] == here[flag], flag
    files = [flag for flag in inside if flag == "config.file"]
    for flag in files:
        assert Path(str(inside[flag])).name == Path(str(here[flag])).name


def test_the_collector_reads_the_same_file_with_no_other_names_in_its_environment(
    composed: dict[str, Any], native: Mapping[str, Any]
) -> None:
    service = composed["services"]["collector"]
    file = REPOSITORY / "collector-config" / "collector.yaml"
    assert native["collector"]["argv"][1:3] == ["--config", str(file)]
    (mounted,) = (m for m in service["volumes"] if m["type"] == "bind")
    assert Path(mounted["source"]) == file
    assert service["command"] == ["--config", mounted["target"]]
    known = set(re.findall(r"\$\{env:(\w+)", file.read_text()))
    assert {name for name in service["environment"] if name.startswith("TRACELET_")} <= known
    assert {name for name in native["collector"]["environment"] if name.startswith("TRACELET_")} <= known
    assert service["environment"]["GOMEMLIMIT"] == native["collector"]["environment"]["GOMEMLIMIT"]


def test_mlflow_and_gateway_have_the_environment_of_the_native_ones(
    composed: dict[str, Any], native: Mapping[str, Any]
) -> None:
    inside = dict(composed["services"]["mlflow"]["environment"])
    assert inside.pop("PGPASSWORD") == env_file()["POSTGRES_PASSWORD"]
    assert inside == native["mlflow"]["environment"]
    from tracelet.gateway.options import GATEWAY_SETTINGS

    known = {setting.env for setting in GATEWAY_SETTINGS}
    assert set(composed["services"]["gateway"]["environment"]) <= known


def test_lokis_names_are_those_that_its_file_reads(composed: dict[str, Any], native: Mapping[str, Any]) -> None:
    known = set(re.findall(r"\$\{(\w+)", (REPOSITORY / "collector-config" / "loki" / "loki.yaml").read_text()))
    assert set(composed["services"]["loki"]["environment"]) <= known
    assert {name for name in native["loki"]["environment"] if name.startswith("TRACELET_")} <= known


def test_the_collectors_defaults_are_the_names_of_the_services(composed: dict[str, Any]) -> None:
    text = (REPOSITORY / "collector-config" / "collector.yaml").read_text()
    hosts = set(re.findall(r"\$\{env:TRACELET_\w+:-(?:http://)?([a-z]+):\d+", text))
    assert hosts <= set(composed["services"])
    assert {"prometheus", "gateway", "loki", "tempo"} <= hosts


def test_targets_of_prometheus_are_services(composed: dict[str, Any]) -> None:
    for path in (REPOSITORY / "collector-config" / "prometheus" / "targets").glob("*.yaml"):
        for group in yaml.safe_load(path.read_text()):
            assert {target.partition(":")[0] for target in group["targets"]} <= set(composed["services"])


# ---- the image of mlflow and gateway ------------------------------------------------------------


def dockerfile() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", "", (REPOSITORY / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def test_the_image_runs_as_a_user_without_rights_whose_folders_exist(composed: dict[str, Any]) -> None:
    steps = dockerfile()
    assert steps[0][0] == "FROM"
    assert re.fullmatch(r"python:3\.13\.\d+-slim", steps[0][1])  # to the patch release: what is built stays the same
    assert ("USER", "tracelet") in steps
    made = next(text for word, text in steps if word == "RUN" and "useradd" in text)
    for name in ("mlflow", "gateway"):
        (volume,) = (m["target"] for m in composed["services"][name]["volumes"])
        assert volume in made.split()


def test_what_the_image_copies_is_not_ignored_and_there() -> None:
    kept = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word.removeprefix("./") for step, text in dockerfile() if step == "COPY" for word in text.split()[:-1]}
    assert copied == kept
    assert all((REPOSITORY / name).exists() for name in copied)


def test_the_images_install_line_gives_programs_that_start_with_the_services_commands(
    tmp_path: Path, composed: dict[str, Any]
) -> None:
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    source = tmp_path / "src"
    source.mkdir()
    for step, text in dockerfile():
        if step == "COPY":
            *names, to = text.split()
            for name in names:
                place = source / to if len(names) == 1 else source / to / name
                if (REPOSITORY / name).is_dir():
                    shutil.copytree(REPOSITORY / name, place, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(REPOSITORY / name, place)
    (line,) = (text for step, text in dockerfile() if step == "RUN" and "pip install" in text)
    words = line.replace('"', "").split()
    assert words[:3] == ["pip", "install", "--no-cache-dir"]
    python = tmp_path / "venv" / "bin" / "python"
    if uv is None:  # pip: the same, some minutes slower
        make = [sys.executable, "-m", "venv", str(tmp_path / "venv")]
        install = [str(python), "-m", "pip", "install", "-q"]
    else:
        make = [uv, "venv", "-q", "--python", sys.executable, str(tmp_path / "venv")]
        install = [uv, "pip", "install", "-q", "--python", str(python)]
    for command in (
        make,
        [*install, *words[3:]],
        [str(python), "-c", "import psycopg2"],
        [str(python), "-m", "mlflow", "server", "--help"],
        [str(python), *composed["services"]["gateway"]["command"][1:4], "--help"],
    ):
        done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, (command, done.stdout[-2000:] + done.stderr[-2000:])
    probe = composed["services"]["gateway"]["healthcheck"]["test"]
    refused = subprocess.run(
        [str(python), *probe[2:7], "http://127.0.0.1:9/"], cwd=tmp_path, capture_output=True, check=False, timeout=60
    )
    assert refused.returncode == 1, refused.stderr
