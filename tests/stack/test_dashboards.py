"""The dashboards: as Grafana's types have them, and every query gets data from a real Prometheus and Loki."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts import panel_queries
from scripts.panel_queries import Range, Servers, Values
from tests.stack import grafana_types
from tests.stack.fill import fill
from tests.stack.harness import REPOSITORY, Stack, require, wait_until

GRAFANA = REPOSITORY / "collector-config" / "grafana"
DASHBOARDS = {path.name: panel_queries.load(path) for path in sorted((GRAFANA / "dashboards").glob("*.json"))}
KINDS = ("timeseries", "table", "stat", "logs", "xychart")


def panels() -> list[Any]:
    return [
        pytest.param(name, panel, id=f"{name.removesuffix('.json')}-{panel['title']}")
        for name, dashboard in DASHBOARDS.items()
        for panel in dashboard["panels"]
    ]


# ---- as files ------------------------------------------------------------


def test_the_files_are_what_the_generator_writes() -> None:
    words = [sys.executable, str(REPOSITORY / "scripts" / "dashboards.py"), "--check"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_four_dashboards_have_ids_of_their_own_and_one_schema() -> None:
    assert list(DASHBOARDS) == ["compare.json", "fleet.json", "run.json", "runs.json"]
    assert len({dashboard["uid"] for dashboard in DASHBOARDS.values()}) == 4
    assert all(39 <= dashboard["schemaVersion"] <= 42 for dashboard in DASHBOARDS.values())


def test_grafanas_own_types_know_every_field_and_word(tmp_path: Path) -> None:
    said = grafana_types.check(DASHBOARDS, tmp_path)
    assert not said, said


def test_the_type_check_sees_a_misspelled_field_a_wrong_word_and_a_missing_one(tmp_path: Path) -> None:
    def broken(where: list[Any], value: Any) -> str:
        dashboard = copy.deepcopy(DASHBOARDS["run.json"])
        at: Any = dashboard
        for step in where[:-1]:
            at = at[step]
        if value is None:
            del at[where[-1]]
        else:
            at[where[-1]] = value
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        return grafana_types.check({"run.json": dashboard}, folder)

    assert "'pannels'" in broken(["pannels"], []) or '"pannels"' in broken(["pannels"], [])
    assert '"automatic"' in broken(["panels", 0, "options", "mapping"], "automatic")
    assert "sortOrder" in broken(["panels", -1, "options", "sortOrder"], None)


@pytest.mark.parametrize(("name", "panel"), panels())
def test_a_panel_has_a_title_a_unit_a_description_and_a_source_that_is_a_variable(
    name: str, panel: dict[str, Any]
) -> None:
    assert panel["type"] in KINDS
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["targets"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    variables = {f"${{{v['name']}}}" for v in DASHBOARDS[name]["templating"]["list"] if v["type"] == "datasource"}
    assert {target["datasource"]["uid"] for target in panel["targets"]} <= variables
    assert panel["datasource"]["uid"] in {*variables, "-- Mixed --"}


def test_ids_are_unique_and_panels_do_not_overlap() -> None:
    for dashboard in DASHBOARDS.values():
        ids = [panel["id"] for panel in dashboard["panels"]]
        assert len(set(ids)) == len(ids)
        taken: set[tuple[int, int]] = set()
        for panel in dashboard["panels"]:
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= 24
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & taken, panel["title"]
            taken |= cells


def test_nothing_is_selected_by_job_or_instance() -> None:
    for dashboard in DASHBOARDS.values():
        for query in re.findall(r'"(?:expr|query)": "((?:[^"\\]|\\.)*)"', json.dumps(dashboard)):
            assert not re.search(r"\b(job|instance)\b", query), query


def test_every_metric_of_a_run_is_selected_by_its_id_its_project_or_for_all() -> None:
    for name, dashboard in DASHBOARDS.items():
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                for series, selector in re.findall(
                    r"\b(tracelet_run\w+|tracelet_iteration)\{([^}]*)\}", target["expr"]
                ):
                    assert "tracelet_run_id" in selector or "$project" in selector, (name, panel["title"], series)


def test_what_is_selected_by_a_metrics_key_is_only_what_was_logged() -> None:
    # Alerts carry the labels of what they are about, ALERTS_FOR_STATE a time as its value: it was taken for a loss.
    found = 0
    for dashboard in DASHBOARDS.values():
        text = json.dumps(dashboard).replace('\\"', '"')
        for name, selector in re.findall(r"([\w$]*)\{([^{}]*tracelet_metric_key[=!][^{}]*)\}", text):
            found += 1
            assert name == "tracelet_iteration" or '__name__!~"(tracelet|ALERTS).*"' in selector
    assert found >= 12


def test_variables_come_before_those_that_use_them() -> None:
    for dashboard in DASHBOARDS.values():
        known: set[str] = set()
        for variable in dashboard["templating"]["list"]:
            text = json.dumps([variable.get("datasource"), variable["query"]])
            used = {name for name in re.findall(r"\$\{?([a-z]+)", text) if name != "__range"}
            assert used <= known, variable["name"]
            known.add(variable["name"])
        text = json.dumps([dashboard["panels"], dashboard["annotations"]])
        used = set(re.findall(r"\$\{?([a-z][a-z_]*)", text))
        assert used <= known, dashboard["title"]


def test_links_between_dashboards_lead_to_ids_and_variables_that_exist() -> None:
    by_uid = {dashboard["uid"]: dashboard for dashboard in DASHBOARDS.values()}
    links = re.findall(r"/d/([\w-]+)\?([^\"]*)", json.dumps(list(DASHBOARDS.values())).replace('\\"', "'"))
    assert links
    for uid, query in links:
        names = {variable["name"] for variable in by_uid[uid]["templating"]["list"]}
        assert set(re.findall(r"var-(\w+)=", query)) <= names


def test_links_to_explore_are_json_with_the_sources_of_the_dashboard() -> None:
    from urllib.parse import unquote

    found = set(re.findall(r"/explore\?schemaVersion=1&panes=([^\"]+)", json.dumps(DASHBOARDS["runs.json"])))
    assert len(found) == 2
    panes = [json.loads(unquote(text))["run"] for text in found]
    assert {pane["datasource"] for pane in panes} == {"${loki}", "${tempo}"}
    assert all("${__value.raw}" in json.dumps(pane["queries"]) for pane in panes)


def test_the_provisioned_sources_are_those_that_the_dashboards_ask_for() -> None:
    sources = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "tracelet.yaml").read_text())["datasources"]
    wanted = {
        variable["query"]
        for dashboard in DASHBOARDS.values()
        for variable in dashboard["templating"]["list"]
        if variable["type"] == "datasource"
    }
    assert {source["type"] for source in sources} == wanted == {"prometheus", "loki", "tempo"}
    assert len({source["uid"] for source in sources}) == len(sources)


# ---- with data ------------------------------------------------------------


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, dict[str, str]]]:
    """A stack with Loki and the gateway, three runs, their hosts' metrics, and what the filters take out."""
    require("loki")
    folder = tmp_path_factory.mktemp("dashboards")
    with Stack(folder / "stack", extras=("loki",)) as stack:
        yield stack, fill(stack, folder / "spool")


@pytest.fixture
def servers(filled: tuple[Stack, dict[str, str]]) -> Servers:
    stack, _ = filled
    return Servers(stack.prometheus, stack.loki)


def asked(name: str, servers: Servers) -> tuple[Values, Range]:
    over = Range(time.time() - 600, time.time())
    return panel_queries.chosen(
        DASHBOARDS[name], servers, over, {"key": "train/loss"} if name == "compare.json" else {}
    ), over


@pytest.mark.parametrize(("name", "panel"), panels())
def test_every_query_of_a_panel_returns_data(name: str, panel: dict[str, Any], servers: Servers) -> None:
    lacking = [target["expr"] for target in panel["targets"]]

    def all_there() -> bool:
        values, over = asked(name, servers)
        lacking[:] = [
            target["expr"] for target, found in panel_queries.frames(panel, values, servers, over) if not found
        ]
        return not lacking

    # The stack's own counters need two scrapes before they have a rate.
    wait_until(all_there, 60, lambda: f"no data for {lacking}")


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_variable_has_choices(name: str, servers: Servers) -> None:
    values, over = asked(name, servers)
    for variable in DASHBOARDS[name]["templating"]["list"]:
        if variable["type"] == "query":
            assert panel_queries.options(variable, values, servers, over), variable["name"]


def test_runs_are_shown_by_name_and_chosen_by_id(filled: tuple[Stack, dict[str, str]], servers: Servers) -> None:
    _, runs = filled
    values, over = asked("runs.json", servers)
    (variable,) = (v for v in DASHBOARDS["runs.json"]["templating"]["list"] if v["name"] == "run")
    shown = panel_queries.options(variable, values, servers, over)
    assert shown == sorted((f"{name} {run_id[:8]}", run_id) for name, run_id in runs.items())


@pytest.mark.parametrize("annotation", DASHBOARDS["run.json"]["annotations"]["list"], ids=lambda a: str(a["name"]))
def test_every_annotation_returns_marks(annotation: dict[str, Any], servers: Servers) -> None:
    values, over = asked("run.json", servers)
    step = panel_queries.seconds(annotation.get("step", "5s"))
    query = panel_queries.substituted(annotation["expr"], values, over, step)
    assert servers.ask(annotation, query, over, step)


def test_epochs_are_marked_where_they_begin(filled: tuple[Stack, dict[str, str]], servers: Servers) -> None:
    stack, runs = filled
    run_id = runs["lr-0.1"]
    (epochs,) = (a for a in DASHBOARDS["run.json"]["annotations"]["list"] if a["name"] == "Epochs")
    _, over = asked("run.json", servers)
    query = panel_queries.substituted(epochs["expr"], Values({"run": [run_id]}), over, 1)
    marks = {at for series in servers.range(query, over, 1) for at, _ in series["values"]}
    logged = [ms for labels, samples in stack.samples(f'ml_epoch{{tracelet_run_id="{run_id}"}}') for ms, _ in samples]
    assert len(marks) == len(logged) == 4
    assert all(any(0 <= at - ms / 1000 <= 1 for at in marks) for ms in logged)


def test_the_table_has_one_row_a_run_with_status_params_values_and_what_the_links_need(
    filled: tuple[Stack, dict[str, str]], servers: Servers
) -> None:
    stack, runs = filled
    (panel,) = (p for p in DASHBOARDS["runs.json"]["panels"] if p["type"] == "table")
    values, over = asked("runs.json", servers)
    rows = panel_queries.rows(panel, panel_queries.frames(panel, values, servers, over))
    assert {row["Run"]: row["Run id"] for row in rows} == runs
    assert len(rows) == 3
    by_name = {row["Run"]: row for row in rows}
    assert {name: row["Status"] for name, row in by_name.items()} == {
        "lr-0.1": "FINISHED",
        "lr-0.01": "FINISHED",
        "lr-0.9": "FAILED",
    }
    for name, row in by_name.items():
        assert row["learning_rate"] == name.removeprefix("lr-")
        assert row["optimizer"] == "sgd"
        assert 0 < row["Duration"] < 60
        assert row["Started"] < row["Last seen"]
        assert re.fullmatch(r"[0-9a-f]{32}", row["Trace"])
        last = stack.query(f'last_over_time(ml_train_loss{{tracelet_run_id="{row["Run id"]}"}}[1h])')
        assert row["train/loss"] == float(last[0]["value"][1])


def test_compare_shows_the_best_and_the_last_value_of_each_run(
    filled: tuple[Stack, dict[str, str]], servers: Servers
) -> None:
    stack, runs = filled
    (panel,) = (p for p in DASHBOARDS["compare.json"]["panels"] if p["type"] == "table")
    values, over = asked("compare.json", servers)
    for row in panel_queries.rows(panel, panel_queries.frames(panel, values, servers, over)):
        ((_, samples),) = stack.samples(f'ml_train_loss{{tracelet_run_id="{runs[row["Run"]]}"}}')
        assert row["Best"] == min(value for _, value in samples)
        assert row["Last"] == samples[-1][1]


def test_a_metric_by_iteration_has_only_pairs_that_were_logged(
    filled: tuple[Stack, dict[str, str]], servers: Servers
) -> None:
    stack, runs = filled
    panel = DASHBOARDS["compare.json"]["panels"][0]
    assert panel["type"] == "xychart"
    values, over = asked("compare.json", servers)
    lines = panel_queries.lines_by_iteration(panel, panel_queries.frames(panel, values, servers, over))
    assert {name for name, _ in lines} == set(runs)
    for (_, run_id), line in lines.items():
        (value,), (iteration,) = (
            stack.samples(f'{name}{{tracelet_metric_key="train/loss",tracelet_run_id="{run_id}"}}')
            for name in ("ml_train_loss", "tracelet_iteration")
        )
        logged = {(i, v) for (_, i), (_, v) in zip(iteration[1], value[1], strict=True)}
        assert len(line) >= 3
        assert set(line) <= logged


def test_the_fleet_counts_each_run_once_by_its_newest_word(servers: Servers) -> None:
    values, over = asked("fleet.json", servers)
    counted = {
        panel["title"]: float(found[0]["value"][1])
        for panel in DASHBOARDS["fleet.json"]["panels"]
        if panel["type"] == "stat"
        for _, found in panel_queries.frames(panel, values, servers, over)
    }
    assert counted == {"Running": 0, "Stalled": 0, "Silent": 0, "Failed": 1, "Killed": 0, "Finished": 2}
