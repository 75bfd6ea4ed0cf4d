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
from urllib.request import urlopen

import pytest
import yaml

from scripts import panel_queries
from scripts.panel_queries import Range, Servers, Values
from tests.sinks import HttpSink, until
from tests.stack import grafana_types
from tests.stack.cohort import PROJECT, RESUMED_AGE_S, Sent, say_alive, send_cohort
from tests.stack.collectors import MINUTE, Collector, Sender, made, now_ns, refuse, send
from tests.stack.fill import fill, send_older_host
from tests.stack.harness import REPOSITORY, Stack, require, wait_until
from tracelet.otlp.plan import Ledger, plan
from tracelet.records import AttemptEnded, Batch, ParamsLogged, Part, RunInfo, WriterOpened

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


@pytest.fixture(scope="module")
def cohort(filled: tuple[Stack, dict[str, str]]) -> Sent:
    """Beside them one run of each fate; they are of a project, and on a host, of their own."""
    stack, _ = filled
    send_older_host(stack, "node-1")
    return send_cohort(stack)


@pytest.fixture
def servers(filled: tuple[Stack, dict[str, str]], cohort: Sent) -> Servers:
    """With all of them, those that live having just said so."""
    stack, _ = filled
    say_alive(stack, cohort)
    return Servers(stack.prometheus, stack.loki)


def asked(name: str, servers: Servers, project: str | None = None) -> tuple[Values, Range]:
    """What a dashboard shows first, of all projects or of one."""
    over = Range(time.time() - 1800, time.time())
    given: dict[str, str | list[str]] = {"key": "train/loss"} if name == "compare.json" else {}
    if project is not None:
        given["project"] = project
    if name == "run.json" and project is not None:
        (variable,) = (v for v in DASHBOARDS[name]["templating"]["list"] if v["name"] == "run")
        known = panel_queries.chosen(DASHBOARDS[name], servers, over, given)
        given["run"] = [value for _, value in panel_queries.options(variable, known, servers, over)]
    return panel_queries.chosen(DASHBOARDS[name], servers, over, given), over


def parts_of(target: dict[str, Any]) -> list[dict[str, Any]]:
    """A target once for each way it may get its data: a half that has some hides a misspelt name in the other."""
    query = target["expr"].removesuffix(" or vector(0)")
    gpus = re.fullmatch(r"\((.+) or on \(host_name\) (.+)\) (and on \(host_name\) .+)", query)
    states = re.fullmatch(r"(.+)\((\w+\{[^}]*\}) or (\w+\{[^}]*\})\)(.+)", query)
    if gpus is not None:
        queries = [f"({gpus[half]}) {gpus[3]}" for half in (1, 2)]
    elif states is not None:
        queries = [f"{states[1]}({states[half]}){states[4]}" for half in (2, 3)]
    else:
        queries = [query]
    return [target | {"expr": query} for query in queries]


def is_about_trouble(target: dict[str, Any]) -> bool:
    """Of counters that a stack in which all goes well doesn't have; they are provoked in a test of their own."""
    return re.search(r"otelcol_\w+_(refused|failed)_", target["expr"]) is not None


@pytest.mark.parametrize(("name", "panel"), panels())
def test_every_query_of_a_panel_returns_data(name: str, panel: dict[str, Any], servers: Servers) -> None:
    parts = [part for t in panel["targets"] for part in ([t] if is_about_trouble(t) else parts_of(t))]
    lacking = [part["expr"] for part in parts]

    def all_there() -> bool:
        values, over = asked(name, servers, ".+")
        found = panel_queries.frames(panel | {"targets": parts}, values, servers, over)
        lacking[:] = [target["expr"] for target, result in found if not result]
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
    values, over = asked("runs.json", servers, "to-the-stack")
    (variable,) = (v for v in DASHBOARDS["runs.json"]["templating"]["list"] if v["name"] == "run")
    shown = panel_queries.options(variable, values, servers, over)
    newest_first = ["lr-0.9", "lr-0.01", "lr-0.1"]
    assert shown == [(f"{name} {runs[name][:8]}", runs[name]) for name in newest_first]


def test_the_dashboard_run_begins_with_the_newest_run_alone(
    filled: tuple[Stack, dict[str, str]], servers: Servers
) -> None:
    _, runs = filled
    over = Range(time.time() - 1800, time.time())
    values = panel_queries.chosen(DASHBOARDS["run.json"], servers, over, {"project": "to-the-stack"})
    assert values.chosen["run"] == [runs["lr-0.9"]]
    assert set(values.chosen["shown"]) == {"epoch", "train/loss", "train/grad_norm", "val/accuracy"}
    (repeats,) = (p["repeat"] for p in DASHBOARDS["run.json"]["panels"] if "repeat" in p)
    (query,) = (v["query"]["query"] for v in DASHBOARDS["run.json"]["templating"]["list"] if v["name"] == repeats)
    assert query.startswith("query_result(topk(24, ")


@pytest.mark.parametrize("annotation", DASHBOARDS["run.json"]["annotations"]["list"], ids=lambda a: str(a["name"]))
def test_every_annotation_returns_marks(annotation: dict[str, Any], servers: Servers) -> None:
    values, over = asked("run.json", servers, "to-the-stack")
    step = panel_queries.seconds(annotation.get("step", "5s"))
    query = panel_queries.substituted(annotation["expr"], values, over, step)
    assert servers.ask(annotation, query, over, step)


def test_epochs_are_marked_where_they_begin(filled: tuple[Stack, dict[str, str]], servers: Servers) -> None:
    stack, runs = filled
    run_id = runs["lr-0.1"]
    (epochs,) = (a for a in DASHBOARDS["run.json"]["annotations"]["list"] if a["name"] == "Epochs")
    _, over = asked("run.json", servers)
    query = panel_queries.substituted(epochs["expr"], Values({"run": [run_id]}), over, 1)
    # Grafana marks what is above zero, and the first epoch is 0.
    marks = {at for series in servers.range(query, over, 1) for at, value in series["values"] if float(value) > 0}
    logged = [ms for labels, samples in stack.samples(f'ml_epoch{{tracelet_run_id="{run_id}"}}') for ms, _ in samples]
    assert len(marks) == len(logged) == 4
    assert all(any(0 <= at - ms / 1000 <= 1 for at in marks) for ms in logged)


def test_the_table_has_one_row_a_run_with_status_params_values_and_what_the_links_need(
    filled: tuple[Stack, dict[str, str]], servers: Servers
) -> None:
    stack, runs = filled
    (panel,) = (p for p in DASHBOARDS["runs.json"]["panels"] if p["type"] == "table")
    values, over = asked("runs.json", servers, "to-the-stack")
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
    values, over = asked("compare.json", servers, "to-the-stack")
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
    values, over = asked("compare.json", servers, "to-the-stack")
    lines = panel_queries.lines_by_iteration(panel, panel_queries.frames(panel, values, servers, over))
    named = {f"{name} {run_id[:8]}": run_id for name, run_id in runs.items()}
    assert {name for (name,) in lines} == set(named)
    for (name,), line in lines.items():
        run_id = named[name]
        (value,), (iteration,) = (
            stack.samples(f'{name}{{tracelet_metric_key="train/loss",tracelet_run_id="{run_id}"}}')
            for name in ("ml_train_loss", "tracelet_iteration")
        )
        logged = {(i, v) for (_, i), (_, v) in zip(iteration[1], value[1], strict=True)}
        assert len(line) >= 3
        assert set(line) <= logged


def table_of(name: str, servers: Servers) -> dict[str, dict[str, Any]]:
    """The rows of the cohort's runs in a dashboard's table, by the run's name; a run has one."""
    (panel,) = (p for p in DASHBOARDS[name]["panels"] if p["type"] == "table")
    values, over = asked(name, servers, PROJECT)
    rows = panel_queries.rows(panel, panel_queries.frames(panel, values, servers, over))
    by_name = {row["Run"]: row for row in rows}
    assert len(by_name) == len(rows), [row["Run"] for row in rows]
    return by_name


def test_a_run_is_one_row_however_many_attempts_hosts_and_ranks_it_had(cohort: Sent, servers: Servers) -> None:
    rows = table_of("runs.json", servers)
    assert {name: row["Run id"] for name, row in rows.items()} == cohort.runs
    assert {name: (row["Status"], row["Host"]) for name, row in rows.items()} == {
        "resumed": ("FINISHED", "node-2"),
        "spread": ("FAILED", "node-1"),
        "killed": ("KILLED", "node-1"),
        "late": ("FINISHED", "node-1"),
        "running": ("RUNNING", "node-1"),
        "slow": ("RUNNING", "node-1"),
        "stalled": ("RUNNING", "node-1"),
        "lost": ("LOST", "node-1"),
        "silent": ("RUNNING", "node-1"),
    }


def test_params_bring_no_column_of_the_platform(cohort: Sent, servers: Servers) -> None:
    rows = table_of("runs.json", servers)
    of_runs = {
        "Run",
        "Status",
        "Started",
        "Last seen",
        "Duration",
        "Iteration",
        "Project",
        "Experiment",
        "Host",
        "Trace",
    }
    logged = {"train/loss", "val/accuracy", "val/best", "val/loss", "extra"}
    assert set(rows["resumed"]) == of_runs | logged | {"Run id", "learning_rate", "optimizer", "epochs"}
    assert (rows["resumed"]["learning_rate"], rows["resumed"]["optimizer"]) == ("0.3", "adam")


def test_last_values_are_the_newest_attempts_and_of_it_the_lowest_ranks_that_has_one(
    cohort: Sent, servers: Servers
) -> None:
    rows = table_of("runs.json", servers)
    resumed, spread = rows["resumed"], rows["spread"]
    # The first attempt had come to 0.71 at iteration 119; only it has logged val/best.
    assert (resumed["train/loss"], resumed["val/accuracy"]) == (pytest.approx(0.21), pytest.approx(0.69))
    assert (resumed["Iteration"], resumed["val/best"]) == (79, 7.0)
    # Rank 0 ends at 0.21, rank 2 at 0.71, rank 10 at 0.01; without rank 0's word rank 2 has it, and not rank 10.
    assert (spread["train/loss"], spread["Iteration"], spread["extra"]) == (pytest.approx(0.21), 9, 1.0)
    compared = table_of("compare.json", servers)
    assert compared["resumed"]["Last"] == pytest.approx(0.21)
    assert compared["spread"]["Last"] == pytest.approx(0.21)
    assert compared["spread"]["Best"] == pytest.approx(0.01)  # of all ranks


def test_a_run_that_began_before_the_range_has_its_own_start_and_duration(cohort: Sent, servers: Servers) -> None:
    resumed = table_of("runs.json", servers)["resumed"]
    assert resumed["Started"] == pytest.approx(1000 * cohort.resumed_began, abs=10_000)
    assert resumed["Duration"] == pytest.approx((resumed["Last seen"] - resumed["Started"]) / 1000, abs=0.01)
    assert resumed["Duration"] > RESUMED_AGE_S - 300


def test_a_run_that_was_over_when_it_was_sent_is_there_with_its_own_times(cohort: Sent, servers: Servers) -> None:
    late = table_of("runs.json", servers)["late"]
    assert late["Duration"] == pytest.approx(300 - 130, abs=10)
    assert (late["Iteration"], late["epochs"]) == (4, "3")


def test_a_line_is_of_one_attempt_and_one_rank_and_is_named_as_short_as_it_can_be(
    cohort: Sent, servers: Servers
) -> None:
    panel = DASHBOARDS["compare.json"]["panels"][0]
    values, over = asked("compare.json", servers, PROJECT)
    lines = panel_queries.lines_by_iteration(panel, panel_queries.frames(panel, values, servers, over))
    short = {name: f"{name} {run_id[:8]}" for name, run_id in cohort.runs.items()}
    resumed = [f"{short['resumed']} attempt {key}" for key in ("1111", "2222")]
    spread = [short["spread"], f"{short['spread']} rank 2", f"{short['spread']} rank 10"]
    others = [short[name] for name in ("killed", "late", "running", "stalled", "lost", "silent")]
    assert {name for (name,) in lines} == {*resumed, *spread, *others}
    for (name,), line in lines.items():
        assert [x for x, _ in line] == sorted(x for x, _ in line), name
        assert [y for _, y in line] == sorted((y for _, y in line), reverse=True), name
    by_time = DASHBOARDS["compare.json"]["panels"][1]
    ((target, found),) = panel_queries.frames(by_time, values, servers, over)
    assert target["legendFormat"] == "{{line}}"
    assert {series["metric"]["line"] for series in found} == {name for (name,) in lines}


def fleet(servers: Servers, project: str | None = None) -> dict[str, float]:
    """The numbers at the top of the dashboard."""
    values, over = asked("fleet.json", servers, project)
    return {
        panel["title"]: float(found[0]["value"][1])
        for panel in DASHBOARDS["fleet.json"]["panels"]
        if panel["type"] == "stat"
        for _, found in panel_queries.frames(panel, values, servers, over)
    }


def test_the_fleet_counts_each_run_once_by_its_newest_word(cohort: Sent, servers: Servers) -> None:
    of_cohort = {"Running": 3, "Stalled": 1, "Silent": 2, "Failed": 1, "Killed": 1, "Finished": 2}
    of_example = {"Running": 0, "Stalled": 0, "Silent": 0, "Failed": 1, "Killed": 0, "Finished": 2}
    assert fleet(servers, PROJECT) == of_cohort
    assert fleet(servers, "to-the-stack") == of_example
    assert fleet(servers) == {title: of_cohort[title] + of_example[title] for title in of_cohort}


def test_points_a_second_are_of_the_chosen_projects_and_are_all_there_whatever_the_step(
    cohort: Sent, servers: Servers
) -> None:
    (panel,) = (p for p in DASHBOARDS["fleet.json"]["panels"] if p["title"] == "Points a second")
    for points in (1000, 7):  # steps of 30 s, and of 5 minutes
        values, over = asked("fleet.json", servers, PROJECT)
        # To the end of a step: what comes after the last one is on no grid yet.
        over = Range(over.start, (over.end // 300 + 1) * 300, points)
        step = over.step(panel["interval"])
        assert step == (30 if points == 1000 else 300)
        ((_, found),) = panel_queries.frames(panel, values, servers, over)
        counted = {
            series["metric"]["line"]: sum(float(value) for _, value in series["values"]) * step for series in found
        }
        assert {name.split()[0] for name in counted} == set(cohort.runs)
        assert counted[f"killed {cohort.runs['killed'][:8]}"] == pytest.approx(10)
        assert counted[f"spread {cohort.runs['spread'][:8]}"] == pytest.approx(62)


def test_a_metric_logged_every_few_minutes_has_a_speed_while_the_run_lives(cohort: Sent, servers: Servers) -> None:
    (panel,) = (p for p in DASHBOARDS["run.json"]["panels"] if p["title"] == "Iterations a second")
    _, over = asked("run.json", servers)
    over = Range(over.start, over.end + 15)  # a step after the last heartbeat
    values = Values({"run": [cohort.runs[name] for name in ("running", "killed", "slow")]})
    ((_, found),) = panel_queries.frames(panel, values, servers, over)
    speeds = {series["metric"]["line"].split()[0]: [float(value) for _, value in series["values"]] for series in found}
    assert speeds["slow"][-1] == pytest.approx(1 / 200)
    assert len(speeds["killed"]) < 100  # it ended after 10 s


def test_counters_of_trouble_are_named_as_a_collector_in_trouble_has_them(tmp_path: Path) -> None:
    (panel,) = (p for p in DASHBOARDS["fleet.json"]["panels"] if p["title"] == "Refused or dropped")
    asked_for = {name for t in panel["targets"] for name in re.findall(r"\botelcol_\w+", t["expr"])}
    assert len(asked_for) == 9
    who, batch = Sender("trouble"), made(100, "loss", start=now_ns(MINUTE))
    said = ParamsLogged(now_ns(), {"lr": 0.1})
    over = AttemptEnded("FINISHED", now_ns(MINUTE), now_ns(), True, None, {}, {}, (), {})
    opened = WriterOpened(now_ns(MINUTE), "first", 1, 0, "a" * 16, now_ns(MINUTE), who.resource)
    run = RunInfo("trouble", "vision", "cnn", "name of trouble")
    loads = plan(Batch(1, run, "/nowhere", (Part("w" * 16, opened, (said, over), batch),)), Ledger()).loads
    with (
        HttpSink() as gateway,
        Collector(tmp_path / "collector", gateway=gateway.url, TRACELET_QUEUE_BYTES="20000") as collector,
    ):

        def provoke(status: int) -> set[str]:
            gateway.rule = lambda _: refuse(status)
            for load in loads:
                send(collector.http, [load.encode()], signal=load.signal)
            with urlopen(collector.own_metrics, timeout=10) as answer:
                return set(re.findall(r"^(otelcol_\w+)\{", answer.read().decode(), re.MULTILINE))

        until(lambda: {name for name in asked_for if "send_failed" in name} <= provoke(400), 30)
        until(lambda: asked_for <= provoke(503), 60)
