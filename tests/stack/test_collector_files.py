"""Each file of collector-config/ is valid, and what the files say about themselves is so."""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.stack.collectors import CONFIG
from tests.stack.harness import program
from tracelet.settings import SETTINGS, resolve

# Each variant as its head says it is run.
WAYS = [
    ("collector.yaml",),
    ("collector.yaml", "second-port.yaml"),
    ("collector.yaml", "gateways.yaml"),
    ("collector.yaml", "tenants.yaml"),
    ("collector.yaml", "auth-tls.yaml"),
    ("collector.yaml", "remote-write.yaml"),
    ("collector.yaml", "kafka-core.yaml"),
    ("kafka-edge.yaml",),
    ("legacy-names.yaml",),
]
COMPOSE_NAMES = {
    "TRACELET_OTLP_GRPC": "0.0.0.0:4317",
    "TRACELET_OTLP_HTTP": "0.0.0.0:4318",
    "TRACELET_COLLECTOR_HEALTH": "0.0.0.0:13133",
    "TRACELET_COLLECTOR_METRICS_HOST": "0.0.0.0",
    "TRACELET_COLLECTOR_METRICS_PORT": "8888",
    "TRACELET_QUEUE_DIR": "/var/lib/otelcol/queue",
    "TRACELET_QUEUE_BYTES": "1000000000",
    "TRACELET_QUEUE_FSYNC": "true",
    "TRACELET_METRIC_PREFIX": "ml.",
    "TRACELET_WINDOW_AGE": "143h",
    "TRACELET_WINDOW_AHEAD": "9m",
    "TRACELET_LOG_AGE": "143h",
    "TRACELET_PROMETHEUS_URL": "http://prometheus:9090/api/v1/otlp",
    "TRACELET_GATEWAY_URL": "http://gateway:4318",
    "TRACELET_GATEWAY_TOKEN": "",
    "TRACELET_LOKI_URL": "http://loki:3100/otlp",
    "TRACELET_TEMPO_ENDPOINT": "tempo:4317",
}


README = (CONFIG / "README.md").read_text()
SEVERAL = README.partition("## Several at once")[2].partition("\n## ")[0]
# As the README has them: the order, and pairs that are not for each other.
ORDER = list(dict.fromkeys(re.findall(r"`([\w-]+\.yaml)`", SEVERAL.partition("in this order")[2].partition("But")[0])))
APART = [set(pair) for pair in re.findall(r"^\| `([\w-]+\.yaml)`, `([\w-]+\.yaml)` \|", SEVERAL, re.MULTILINE)]
TOGETHER = [
    ("collector.yaml", *several)
    for count in (2, 3)
    for several in itertools.combinations(ORDER, count)
    if not any(apart <= set(several) for apart in APART)
]


def all_files() -> list[Path]:
    return sorted(path for path in CONFIG.glob("*.yaml") if path.name != "builder-manifest.yaml")


def with_defaults(text: str) -> str:
    return re.sub(r"\$\{env:\w+:-([^}]*)\}", r"\1", text)


def merged(way: tuple[str, ...]) -> dict[str, Any]:
    """The files as a collector merges them: maps by key, lists and values by the later file."""
    found: dict[str, Any] = {}
    for name in way:
        _merge(found, yaml.safe_load(with_defaults((CONFIG / name).read_text())))
    return found


def _merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def queues(config: dict[str, Any]) -> list[int]:
    """The size of each queue: an exporter has one for each signal it is used for."""
    used = {
        (exporter, name.partition("/")[0])
        for name, pipeline in config["service"]["pipelines"].items()
        for exporter in pipeline["exporters"]
        if exporter in config.get("exporters", {})
    }
    return [
        int(config["exporters"][exporter]["sending_queue"]["queue_size"])
        for exporter, _ in sorted(used)
        if "sending_queue" in config["exporters"][exporter]
    ]


def asked(word: str, way: tuple[str, ...]) -> str:
    """What the collector's own command says to these files."""
    argv = [str(program("collector")), word]
    for name in way:
        argv += ["--config", str(CONFIG / name)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env={})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("way", [*WAYS, *TOGETHER], ids="+".join)
def test_a_collector_takes_the_file_as_its_head_says(way: tuple[str, ...]) -> None:
    asked("validate", way)


def test_the_readme_speaks_of_every_pair_of_overlays_and_the_heads_of_those_that_are_apart() -> None:
    assert {("collector.yaml", name) for name in ORDER} == {way for way in WAYS if len(way) == 2}
    assert len(APART) == 4
    assert sum(len(way) == 3 for way in TOGETHER) == 15 - 4
    for pair in APART:
        for name, other in itertools.permutations(pair):
            head = (CONFIG / name).read_text().partition("\nreceivers:")[0].partition("\nexporters:")[0]
            assert other in head, f"{name} doesn't say that {other} is not for it"


@pytest.mark.parametrize("way", TOGETHER, ids="+".join)
def test_what_goes_together_keeps_each_ones_promise(way: tuple[str, ...]) -> None:
    """By the file that a collector makes of them: ways from receivers to exporters, who is asked for a token."""
    config = yaml.safe_load(asked("print-config", way))
    pipelines = config["service"]["pipelines"]
    into = {name for name, pipeline in pipelines.items() if pipeline["receivers"][0] not in config["connectors"]}
    for name in into:
        assert pipelines[name]["processors"] == ["memory_limiter"], name
    doors = {receiver for name in into for receiver in pipelines[name]["receivers"]}
    assert doors == {
        "kafka" if "kafka-core.yaml" in way else "otlp",
        *(["otlp/gateway"] if "second-port.yaml" in way else []),
    }

    def ways_to(name: str) -> set[str]:
        """The receivers that a pipeline is reached from."""
        signal = name.partition("/")[0]
        froms = set(pipelines[name]["receivers"])
        found = froms - config["connectors"].keys()
        for other, pipeline in pipelines.items():
            if other.partition("/")[0] == signal and froms & set(pipeline["exporters"]) & config["connectors"].keys():
                found |= ways_to(other)
        return found

    to_gateways = {
        name: pipeline
        for name, pipeline in pipelines.items()
        if any(exporter.startswith("otlp_http/gateway") for exporter in pipeline["exporters"])
    }
    for name in pipelines.keys() - into:
        # Each branch has one way in, so that it gets everything once.
        behind_second = name in to_gateways and "second-port.yaml" in way
        assert ways_to(name) == ({"otlp/gateway"} if behind_second else doors - {"otlp/gateway"}), name
    assert len(to_gateways) == (6 if "gateways.yaml" in way else 3)
    for name, pipeline in to_gateways.items():
        number = "2" if name.endswith("_2") else "1"
        shared = [f"filter/gateway_{number}"] if "gateways.yaml" in way else []
        assert pipeline["processors"] == ["filter/runs", *shared], name
    if "tenants.yaml" in way:
        for name in pipelines.keys() - into - to_gateways.keys():
            tenant = "b" if name.endswith("_b") else "a"
            assert pipelines[name]["processors"][0] == f"filter/tenant_{tenant}"
            (exporter,) = pipelines[name]["exporters"]
            # (Values are not printed.)
            assert list(merged(way)["exporters"][exporter]["headers"].values()) == [tenant]
            assert [each["name"].lower() for each in config["exporters"][exporter]["headers"]] == ["x-scope-orgid"]
    for door in doors - {"kafka"}:
        for protocol in config["receivers"][door]["protocols"].values():
            guarded = "auth-tls.yaml" in way
            assert (protocol.get("auth") is not None) == (protocol.get("tls") is not None) == guarded
    for pipeline in to_gateways.values():
        (exporter,) = pipeline["exporters"]
        given = config["exporters"][exporter]
        assert bool(given.get("auth")) != bool(given.get("headers"))
        assert bool(given.get("auth")) == ("auth-tls.yaml" in way)


def test_every_file_of_the_folder_is_checked_here() -> None:
    assert {path.name for path in all_files()} == {name for way in WAYS for name in way}


def test_the_defaults_are_the_names_of_the_compose_file() -> None:
    found = re.findall(r"\$\{env:(TRACELET_\w+):-([^}]*)\}", (CONFIG / "collector.yaml").read_text())
    assert dict(found) == COMPOSE_NAMES
    for path in all_files():
        for name, default in re.findall(r"\$\{env:(TRACELET_\w+):-([^}]*)\}", path.read_text()):
            assert COMPOSE_NAMES.get(name, default) == default, f"{name} in {path.name}"


def test_a_run_beside_the_collector_takes_none_of_its_names_for_a_misspelt_setting(tmp_path: Path) -> None:
    text = "".join(path.read_text() for path in CONFIG.rglob("*.yaml"))
    names = set(re.findall(r"\$\{(?:env:)?(TRACELET_\w+)", text))
    assert len(names) > 25
    known = {setting.env for setting in SETTINGS}
    resolve({}, {}, environ=dict.fromkeys(names - known, "x"), cwd=tmp_path, argv=("train.py",))
    for path in all_files():
        for name in re.findall(r"\$\{env:(TRACELET_\w+)", path.read_text()):
            assert name in README or f"`{name[name.rindex('_') :]}`" in README, name


@pytest.mark.parametrize("way", WAYS, ids="+".join)
def test_every_name_in_a_file_has_a_default(way: tuple[str, ...]) -> None:
    for name in way:
        text = (CONFIG / name).read_text()
        assert len(re.findall(r"\$\{env:\w+:-[^}]*\}", text)) == len(re.findall(r"\$\{env:\w", text))


@pytest.mark.parametrize(
    ("way", "gigabytes"),
    [
        (("collector.yaml",), "7.2 GB"),
        (("collector.yaml", "gateways.yaml"), "10.8 GB"),
        (("collector.yaml", "tenants.yaml"), "10.8 GB"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else value,
)
def test_the_volume_that_a_file_names_holds_all_its_queues_and_a_fifth_more(
    way: tuple[str, ...], gigabytes: str
) -> None:
    assert f"{sum(queues(merged(way))) * 1.2 / 1e9:.1f} GB" == gigabytes
    assert gigabytes in (CONFIG / way[-1]).read_text()


@pytest.mark.parametrize("way", [way for way in WAYS if "remote-write.yaml" not in way], ids="+".join)
def test_every_exporter_waits_on_disk_in_bytes_for_ever_and_blocks_nobody(way: tuple[str, ...]) -> None:
    config = merged(way)
    used = {exporter for pipeline in config["service"]["pipelines"].values() for exporter in pipeline["exporters"]}
    for name in used & config["exporters"].keys():
        exporter = config["exporters"][name]
        queue = exporter["sending_queue"]
        assert queue["storage"] == "file_storage/queue", name
        assert (queue["sizer"], queue["block_on_overflow"]) == ("bytes", False), name
        assert exporter["retry_on_failure"]["max_elapsed_time"] == 0, name
        assert "batch" not in queue, name
    assert not any(name.startswith("batch") for name in config["processors"])


@pytest.mark.parametrize("way", [way for way in WAYS if "tenants.yaml" not in way], ids="+".join)
def test_callers_headers_are_kept_out_of_the_queues(way: tuple[str, ...]) -> None:
    for receiver in merged(way)["receivers"].values():
        assert not any(each.get("include_metadata") for each in receiver.get("protocols", {}).values())


def test_the_filter_leaves_room_in_the_window_for_the_outage_that_is_promised() -> None:
    window_h, outage_h, ahead_h = 7 * 24, 24, 9 / 60
    age_h = int(COMPOSE_NAMES["TRACELET_WINDOW_AGE"].removesuffix("h"))
    assert age_h + outage_h + ahead_h < window_h


def test_the_manifest_has_every_component_that_the_files_use() -> None:
    manifest = yaml.safe_load((CONFIG / "builder-manifest.yaml").read_text())
    modules = " ".join(each["gomod"] for kind in ("receivers", "processors", "exporters") for each in manifest[kind])
    for way in WAYS:
        config = merged(way)
        for kind in ("receivers", "processors", "exporters"):
            for name in config.get(kind, {}):
                word = name.partition("/")[0].replace("_", "").replace("otlphttp", "otlphttpexporter")
                assert word.replace("otlpgrpc", "otlp") in modules, name
    assert set(re.findall(r" v0\.(\d+)\.0", modules)) == {"158"}


def test_what_the_manifest_has_beyond_the_files_is_as_many_as_it_says() -> None:
    text = (CONFIG / "builder-manifest.yaml").read_text()
    used = {
        name.partition("/")[0].replace("_", "")
        for way in WAYS
        for kind in ("extensions", "receivers", "processors", "exporters", "connectors")
        for name in merged(way).get(kind, {})
    } | {"otlphttp"}
    parts = re.findall(r"/(\w+?)(?:extension|receiver|processor|exporter|connector)? v0\.", text)
    more = [part for part in parts if part not in used]
    assert sorted(more) == ["debug", "file", "headerssetter", "nop", "otlpjsonfile"]
    assert "five\n# more" in text


def test_every_place_names_the_same_release_from_which_the_newer_names_are_known() -> None:
    # otlp_http and otlp_grpc came with 0.144, metric_conditions and its like with 0.146: the later of the two counts.
    pages = [CONFIG / "README.md", CONFIG.parent / "docs" / "guide" / "collector.md", *all_files()]
    told = [v for page in pages for v in re.findall(r"(?:before|older than) (0\.14\d)", page.read_text())]
    assert len(told) >= 4
    assert set(told) == {"0.146"}


def test_the_older_names_are_the_same_file_but_for_the_names() -> None:
    newer, older = merged(("collector.yaml",)), merged(("legacy-names.yaml",))
    told: dict[str, Any] = yaml.safe_load(
        yaml.safe_dump(newer).replace("otlp_http", "otlphttp").replace("otlp_grpc", "otlp")
    )
    filters = [name for name in newer["processors"] if name.startswith("filter/")]
    assert filters == [name for name in older["processors"] if name.startswith("filter/")]
    for name in filters:
        # Another form, the same conditions: contexts by place instead of by prefix.
        new, old = told["processors"].pop(name), older["processors"].pop(name)
        assert list(map(bare, conditions(new))) == list(map(bare, conditions(old))), name
    assert older == told


def conditions(tree: Any) -> list[str]:
    if isinstance(tree, dict):
        return [each for key, below in tree.items() if key != "error_mode" for each in conditions(below)]
    return list(tree)


def bare(condition: str) -> str:
    return re.sub(r"\b(datapoint|metric|log)\.", "", condition.replace("instrumentation_scope.", "scope."))
