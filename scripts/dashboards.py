"""Write the Grafana dashboards of collector-config/grafana/dashboards: what they share stands here once.

.venv/bin/python scripts/dashboards.py           # writes them; a test proves that they are as this makes them
.venv/bin/python scripts/dashboards.py --check   # says what differs, and writes nothing
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

FOLDER = Path(__file__).resolve().parent.parent / "collector-config" / "grafana" / "dashboards"
Json = dict[str, Any]

PROMETHEUS: Json = {"type": "prometheus", "uid": "${datasource}"}
LOKI: Json = {"type": "loki", "uid": "${loki}"}
COLORS = {"RUNNING": "blue", "FINISHED": "green", "FAILED": "red", "KILLED": "orange", "LOST": "purple"}

# ---- the queries ----------------------------------------------------------------------------------------------------
#
# A run is selected by its id; job and instance differ between servers and collectors. What is over is no longer in an
# instant query (its series have ended), so tables look back over the whole of the range.

RUN = 'tracelet_run_id=~"$run"'
BY_RUN = "by (tracelet_run_id)"
ATTEMPT = "tracelet_run_id, tracelet_run_attempt"
SERIES = f"{ATTEMPT}, tracelet_rank, tracelet_run_name"
LEGEND = "{{line}}"
# What Loki keeps apart as streams; without it each query reads all that the range has of any service. All that tells
# runs apart comes after it.
EVENTS = '{service_name=~"$service"}'


# What was logged, whatever its prefix: not the companion series, nor alerts, nor what tracelet says of a metric.
LOGGED = '__name__!~"(tracelet|ALERTS).*"'
CHOSEN = 'tracelet_metric_key=~"$key"'  # where several may be chosen: Grafana escapes what a pattern would misread
SHOWN = 'tracelet_metric_key=~"$shown"'
MOST_PANELS = 24
ONE_CHOSEN = 'tracelet_metric_key="$key"'


def value_of(key: str = CHOSEN) -> str:
    """Any metric by the name it was logged with."""
    return f"{{{LOGGED},{key},{RUN}}}"


def lately(series: str) -> str:
    """What was logged since the step before: each point once, the last one too, after which its series has ended."""
    return f"last_over_time({series}[$__interval])"


def latest(series: str, which: str = RUN, each: str = "tracelet_run_id") -> str:
    """The last word in the range of each run (or `each`): its newest attempt's, and of that its lowest rank's.

    An attempt or a rank that has said nothing of it is passed over: what is resumed keeps its last validation until the
    next one. With `max` in its place the best attempt, the worst rank, and two states at once would be the last.
    """
    said = f"last_over_time({series}[$__range])"
    attempt = f"{each}, tracelet_run_attempt"
    began = f"max by ({ATTEMPT}) (last_over_time(tracelet_run_attempt_start_time_seconds{{{which}}}[$__range]))"
    newest = f"topk by ({each}) (1, group by ({attempt}) ({said}) * on ({ATTEMPT}) group_left () {began})"
    # PromQL compares values and not labels (as texts 10 would come before 2). The one label that it takes for a number
    # is a histogram's `le`: of buckets that all hold the same one observation, the quantile 1 is the lowest bound.
    ranks = f'group by ({attempt}, le) (label_replace({said}, "le", "$1", "tracelet_rank", "(.+)"))'
    above = f'label_replace(group by ({attempt}) ({said}), "le", "+Inf", "", "")'
    lowest = f'count_values by ({attempt}) ("tracelet_rank", histogram_quantile(1, {ranks} or {above}))'
    return f"({said} and on ({attempt}) {newest} and on ({attempt}, tracelet_rank) {lowest})"


def in_state(states: str, which: str = RUN) -> str:
    """Newest attempts whose last word is this state (or one of several, with `|` between)."""
    told = latest(f'tracelet_run_status{{tracelet_run_state=~"{states}",{which}}}', which)
    return f"max by ({ATTEMPT}) ({told}) == 1"


def of_project(expression: str) -> str:
    """Only runs of the chosen projects."""
    info = 'last_over_time(tracelet_run_info{tracelet_project=~"$project"}[$__range])'
    return f"({expression}) and on (tracelet_run_id) {info}"


def age(series: str) -> str:
    """Seconds since what a series says as a time."""
    return f"(time() - max by ({ATTEMPT}) (last_over_time({series}[$__range])))"


def last_sign() -> str:
    """When a run was last heard of in the range, in seconds: its end has a heartbeat too."""
    return f"max {BY_RUN} (max_over_time(tracelet_run_heartbeat_seconds{{{RUN}}}[$__range]))"


def start() -> str:
    """When a run began, in seconds, also where that was before the range."""
    return f"min {BY_RUN} (min_over_time(tracelet_run_start_time_seconds{{{RUN}}}[$__range]))"


def of_run(expression: str) -> str:
    """With the label `id`, the run's id in short; one that a person gave stays whole, since such ones begin alike."""
    return f'label_replace({expression}, "id", " $1$2", "tracelet_run_id", "([0-9a-f]{{8}})[0-9a-f]{{24}}|(.+)")'


def lines(expression: str, shown: str, more: str = "") -> str:
    """What a chart draws, a line for each run, attempt and rank (and `more`), named by the label `line`.

    The name has what tells lines apart: a rank that is not 0, and of a run with several attempts among the `shown`
    series which one it is. Without them a resumed run would be one line that goes back and forth.
    """
    each = f"{SERIES}, {more}" if more else SERIES
    run = of_run(f"max by ({each}) ({expression})")
    rank = f'label_replace({run}, "rank", " rank $1", "tracelet_rank", "([1-9].*)")'
    short = "([0-9a-f]{4})[0-9a-f]{12}|(.+)"
    attempt = f'label_replace({rank}, "attempt", " attempt $1$2", "tracelet_run_attempt", "{short}")'
    # `@ end()`: asked once, and not at each step of the chart.
    attempts = f"group by ({ATTEMPT}) (last_over_time({shown}[$__range] @ end()))"
    named = f"{attempt} and on (tracelet_run_id) (count {BY_RUN} ({attempts}) > 1) or on ({each}) {rank}"
    joined = f'label_join({named}, "line", "", "tracelet_run_name", "id", "rank", "attempt")'
    return f"max by ({f'line, {more}' if more else 'line'}) ({joined})"


def column(name: str, expression: str) -> str:
    """A table's column: `labelsToFields` names the value after this label, `merge` puts the columns side by side."""
    return f'label_replace({expression}, "column", "{name}", "", "")'


def columns_by_key(expression: str) -> str:
    """A column for each metric, named as it was logged, after a word that lets it through among the fields."""
    named = f'label_replace({expression}, "column", "{METRIC}$1", "tracelet_metric_key", "(.+)")'
    return f"max by (tracelet_run_id, column) ({named})"


def params() -> str:
    """Params stand in Loki's events, as labels of one series a run; they are never in Prometheus.

    What else an event carries is dropped where its name is known, so that an attempt or a host makes no series of its
    own. LogQL can keep no labels by a pattern: what platforms add (k8s, clouds, teams) is left to the table's filter.
    """
    dropped = ", ".join(_OF_EVENTS)
    found = f'{EVENTS} | tracelet_event="tracelet.params" | {RUN} | drop {dropped}'
    return f'label_replace(count_over_time({found} [$__range]), "column", "drop", "", "")'


# ---- panels ---------------------------------------------------------------------------------------------------------


class Page:
    """Panels one after the other on Grafana's grid of 24 columns, each with an id of its own."""

    def __init__(self) -> None:
        self.panels: list[Json] = []
        self._x = self._y = self._row = 0

    def add(self, panel: Json, width: int, height: int) -> None:
        """Put a panel right of the last, or below it where there is no room."""
        if self._x + width > 24:
            self._x, self._y, self._row = 0, self._y + self._row, 0
        panel["id"] = len(self.panels) + 1
        panel["gridPos"] = {"x": self._x, "y": self._y, "w": width, "h": height}
        self.panels.append(panel)
        self._x, self._row = self._x + width, max(self._row, height)


def panel(kind: str, title: str, description: str, targets: list[Json], unit: str = "short", **more: Any) -> Json:
    """What all panels have; `more` is added to it."""
    loki = all(target["datasource"] is LOKI for target in targets)
    mixed = not loki and any(target["datasource"] is LOKI for target in targets)
    for letter, target in zip("ABCDEFGHIJ", targets, strict=False):
        target["refId"] = letter
    made: Json = {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": {"type": "datasource", "uid": "-- Mixed --"} if mixed else LOKI if loki else PROMETHEUS,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": unit, "custom": {}}, "overrides": []},
        "options": {},
        "transparent": False,
    }
    return made | more


def at_end(expression: str, legend: str = "") -> Json:
    """An instant query at the end of the range."""
    return {
        "datasource": PROMETHEUS,
        "expr": expression,
        "instant": True,
        "range": False,
        "format": "time_series",
        "legendFormat": legend or "__auto",
    }


def over_time(expression: str, legend: str, form: str = "time_series") -> Json:
    """A range query."""
    return {
        "datasource": PROMETHEUS,
        "expr": expression,
        "instant": False,
        "range": True,
        "format": form,
        "legendFormat": legend,
    }


def events(expression: str, kind: str = "range") -> Json:
    """A query of Loki."""
    return {"datasource": LOKI, "expr": expression, "queryType": kind}


def curves(title: str, description: str, targets: list[Json], unit: str = "short", **more: Any) -> Json:
    """Lines over wall time. Gaps between sparse values are joined; where a run ends its line does."""
    made = panel("timeseries", title, description, targets, unit, **more)
    made["fieldConfig"]["defaults"]["custom"] = {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 0,
        "showPoints": "auto",
        "pointSize": 4,
        "spanNulls": True,
    }
    made["options"] = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "none"},
    }
    return made


def by_iteration(title: str, description: str, key: str, **more: Any) -> Json:
    """A metric over its iteration: value and iteration on one grid of times, made pairs by `merge`.

    Both series have the same timestamps, so at each step of the grid both are of the same logged point.
    """
    value = lines(lately(value_of(key)), value_of(key))
    iteration = lines(lately(f"tracelet_iteration{{{key},{RUN}}}"), value_of(key))
    made = panel(
        "xychart",
        title,
        description,
        [over_time(value, "", "table"), over_time(iteration, "", "table")],
        interval="1s",
        maxDataPoints=1500,
        **more,
    )
    made["fieldConfig"]["defaults"]["custom"] = {"show": "points+lines", "pointSize": {"fixed": 3}, "lineWidth": 1}
    made["options"] = {
        "mapping": "auto",
        "series": [
            {
                "x": {"matcher": {"id": "byName", "options": "iteration"}},
                "y": {"matcher": {"id": "byName", "options": "value"}},
            }
        ],
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "single", "sort": "none"},
    }
    made["transformations"] = [
        {"id": "merge", "options": {}},
        {
            "id": "organize",
            "options": {
                "excludeByName": {"Time": True},
                "renameByName": {"Value #A": "value", "Value #B": "iteration"},
                "indexByName": {"Value #B": 0, "Value #A": 1},
            },
        },
        {
            "id": "partitionByValues",
            "options": {
                "fields": ["line"],  # of a run, an attempt and a rank
                "keepFields": False,
                "naming": {"asLabels": False},
            },
        },
    ]
    return made


def table(title: str, description: str, targets: list[Json], names: dict[str, str], **more: Any) -> Json:
    """One row a run: each query gives some columns, and what they share is the run's id. `names` orders and renames."""
    made = panel("table", title, description, targets, **more)
    made["fieldConfig"]["defaults"]["custom"] = {"align": "auto", "cellOptions": {"type": "auto"}, "filterable": True}
    made["options"] = {
        "frameIndex": 0,
        "showHeader": True,
        "cellHeight": "sm",
        "sortBy": [{"displayName": "Started", "desc": True}],
    }
    made["transformations"] = [
        {"id": "labelsToFields", "options": {"mode": "columns", "valueLabel": "column"}},
        # Of an event's labels only its params: all else in it would make rows that can't be merged.
        {"id": "filterFieldsByName", "options": {"include": {"pattern": kept(names)}}},
        {"id": "merge", "options": {}},
        {"id": "renameByRegex", "options": {"regex": f"(?:{PARAM}|{METRIC})(.*)", "renamePattern": "$1"}},
        {
            "id": "organize",
            "options": {
                "excludeByName": {},
                "renameByName": names,
                "indexByName": {name: index for index, name in enumerate(names)},
            },
        },
    ]
    return made


# What columns of unknown names begin with, so that a list of what may pass can be written: a list of what may not would
# let through each attribute that somebody's platform adds to its Resources.
PARAM, METRIC = "tracelet_param_", "metric "
# What an event says that Prometheus says too (and both would have to be equal on one row), or that is never shown.
_OF_EVENTS = (
    "tracelet_run_name",
    "tracelet_project",
    "tracelet_experiment_name",
    "tracelet_run_attempt",
    "tracelet_rank",
    "tracelet_wire_version",
    "tracelet_event_part",
    "tracelet_event_parts",
    "host_name",
    "service_instance_id",
    "telemetry_sdk_version",
    "trace_id",
    "span_id",
    "observed_timestamp",
)


def kept(names: Iterable[str]) -> str:
    """Fields of a table: those it names, params, metrics. Not the time of the query, nothing else of Loki's records."""
    return f"^({'|'.join(names)}|{PARAM}.*|{METRIC}.*)$"


def logs(title: str, description: str, expression: str) -> Json:
    """Lines of Loki."""
    made = panel("logs", title, description, [events(expression)])
    made["options"] = {
        "showTime": True,
        "showLabels": False,
        "showCommonLabels": False,
        "showLogContextToggle": True,
        "wrapLogMessage": True,
        "prettifyLogMessage": False,
        "enableLogDetails": True,
        "dedupStrategy": "none",
        "sortOrder": "Descending",
    }
    return made


def number(title: str, description: str, expression: str, color: str) -> Json:
    """A count, large."""
    made = panel("stat", title, description, [at_end(expression)])
    made["fieldConfig"]["defaults"] |= {
        "color": {"mode": "fixed", "fixedColor": color},
        "decimals": 0,
        "noValue": "0",
    }
    made["options"] = {
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "auto",
        "textMode": "auto",
        "orientation": "auto",
        "wideLayout": True,
        "showPercentChange": False,
        "percentChangeColorMode": "standard",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    }
    return made


def link(title: str, url: str) -> Json:
    """A link from a cell; opens beside the dashboard."""
    return {"title": title, "url": url, "targetBlank": True}


def explore(uid: str, query: Json) -> str:
    """The address of Grafana's Explore with a query; its variables stay variables."""
    pane = {"datasource": uid, "queries": [query], "range": {"from": "${__from}", "to": "${__to}"}}
    text = json.dumps({"run": pane}, separators=(",", ":"))
    parts = re.split(r"(\$\{(?:[^{}])*\})", text)  # the odd ones are variables
    return "/explore?schemaVersion=1&panes=" + "".join(p if i % 2 else quote(p, safe="") for i, p in enumerate(parts))


def override(name: str, **properties: Any) -> Json:
    """Settings of one column, by the name it is shown under."""
    named = {"matcher": {"id": "byName", "options": name}}
    return named | {"properties": [{"id": key.replace("__", "."), "value": v} for key, v in properties.items()]}


# ---- variables and dashboards ---------------------------------------------------------------------------------------


def sources(*kinds: str) -> list[Json]:
    """Which of the Grafana's data sources are meant; nothing is bound to an id."""
    names = {"prometheus": ("datasource", "Prometheus"), "loki": ("loki", "Loki"), "tempo": ("tempo", "Tempo")}
    return [
        {
            "type": "datasource",
            "name": names[kind][0],
            "label": names[kind][1],
            "query": kind,
            "regex": "",
            "refresh": 1,
            "options": [],
            "multi": False,
            "includeAll": False,
            "hide": 0,
            "skipUrlSync": False,
        }
        for kind in kinds
    ]


def choice(
    name: str,
    label: str,
    query: str,
    *,
    regex: str = "",
    multi: bool = True,
    everything: bool = True,
    all_value: str = "",
    ordered: bool = False,
    hidden: bool = False,
) -> Json:
    """A variable that Prometheus fills, again whenever the range changes.

    `everything`: starts on all of it; else on the first. `ordered`: the query's order stays.
    """
    made: Json = {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": PROMETHEUS,
        "query": {"query": query, "refId": "StandardVariableQuery"},
        "regex": regex,
        "refresh": 2,
        "sort": 0 if ordered else 1,
        "multi": multi,
        "includeAll": multi and everything,
        "options": [],
        "hide": 2 if hidden else 0,
        "skipUrlSync": False,
    }
    if made["includeAll"]:
        made["current"] = {"text": ["All"], "value": ["$__all"]}
    return made | ({"allValue": all_value} if all_value else {})


def project() -> Json:
    """The projects of the range."""
    return choice("project", "Project", "label_values(tracelet_run_info, tracelet_project)", all_value=".+")


def service(which: str) -> Json:
    """The services of the runs that were chosen, for Loki. Not chosen by anybody, hence hidden."""
    return choice("service", "Service", f"label_values(tracelet_run_info{{{which}}}, service_name)", hidden=True)


def runs(*, everything: bool = True) -> list[Json]:
    """Project, experiment, and runs: chosen by name and the beginning of the id, used as ids; the newest come first.

    "All" of runs means those listed, so it holds to the projects and experiments that were chosen.
    """
    info = 'tracelet_run_info{tracelet_project=~"$project",tracelet_experiment_name=~"$experiment"}'
    short = f'label_replace(last_over_time({info}[$__range]), "short", "$1", "tracelet_run_id", "(.{{1,8}}).*")'
    label = f'label_join({short}, "label", " ", "tracelet_run_name", "short")'
    began = 'last_over_time(tracelet_run_attempt_start_time_seconds{tracelet_run_id!=""}[$__range])'
    by_start = f"* on (tracelet_run_id) group_left () max {BY_RUN} ({began})"
    of_projects = 'label_values(tracelet_run_info{tracelet_project=~"$project"}, tracelet_experiment_name)'
    return [
        project(),
        choice("experiment", "Experiment", of_projects, all_value=".+"),
        choice(
            "run",
            "Run",
            f"query_result(sort_desc(max by (tracelet_run_id, label) ({label}) {by_start}))",
            regex='/tracelet_run_id="(?<value>[^"]+)|label="(?<text>[^"]+)/g',
            everything=everything,
            ordered=True,
        ),
        service(RUN),
    ]


def key(*, multi: bool = True) -> Json:
    """Metrics by the names they were logged with."""
    query = f'label_values({{{LOGGED},tracelet_metric_key!="",{RUN}}}, tracelet_metric_key)'
    return choice("key", "Metric", query, multi=multi, all_value=".+" if multi else "")


def shown() -> Json:
    """Of the metrics chosen those with the most points, so many as a page can draw: some runs log thousands."""
    points = f"sum by (tracelet_metric_key) (count_over_time({value_of()}[$__range]))"
    query = f"query_result(topk({MOST_PANELS}, {points}))"
    return choice("shown", "Drawn", query, regex='/tracelet_metric_key="(?<value>[^"]+)"/', hidden=True)


def fixed(name: str, label: str, text: str) -> Json:
    """A text that one may change."""
    value = {"text": text, "value": text}
    return {
        "type": "textbox",
        "name": name,
        "label": label,
        "query": text,
        "current": value,
        "options": [value | {"selected": True}],
        "hide": 0,
        "skipUrlSync": False,
    }


def one_of(name: str, label: str, values: Sequence[str]) -> Json:
    """One of a few words."""
    options = [{"text": value, "value": value, "selected": value == values[0]} for value in values]
    return {
        "type": "custom",
        "name": name,
        "label": label,
        "query": ",".join(values),
        "current": {"text": values[0], "value": values[0]},
        "options": options,
        "multi": False,
        "includeAll": False,
        "hide": 0,
        "skipUrlSync": False,
    }


def dashboard(
    name: str, description: str, page: Page, *, variables: list[Json], annotations: Sequence[Json] = ()
) -> Json:
    """A whole dashboard, as Grafana's classic JSON."""
    return {
        "uid": f"tracelet-{name}",
        "title": name.capitalize(),
        "description": description,
        "tags": ["tracelet"],
        "schemaVersion": 41,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "fiscalYearStartMonth": 0,
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timepicker": {},
        "links": [
            {
                "title": "tracelet",
                "type": "dashboards",
                "icon": "external link",
                "tags": ["tracelet"],
                "asDropdown": False,
                "includeVars": True,
                "keepTime": True,
                "targetBlank": False,
                "tooltip": "",
                "url": "",
            }
        ],
        "annotations": {"list": list(annotations)},
        "templating": {"list": variables},
        "panels": page.panels,
    }


def annotation(name: str, color: str, source: Json, query: Json) -> Json:
    """Marks on every panel over time."""
    return {"name": name, "datasource": source, "enable": True, "hide": False, "iconColor": color, "expr": "", **query}


STATES = {
    "type": "value",
    "options": {state: {"color": COLORS[state], "index": index} for index, state in enumerate(COLORS)},
}
LOGS_OF_RUN = explore(
    "${loki}",
    {
        "refId": "A",
        "datasource": {"type": "loki", "uid": "${loki}"},
        # Of any service: a list of chosen ones within JSON within an address would need three ways of escaping at once.
        "expr": '{service_name=~".+"} | tracelet_run_id="${__value.raw}"',
    },
)
TRACE = explore(
    "${tempo}",
    {
        "refId": "A",
        "datasource": {"type": "tempo", "uid": "${tempo}"},
        "queryType": "traceql",
        "query": "${__value.raw}",
    },
)
# With the range of the run itself, so that its curves have all the points that fit.
ONE_RUN = (
    '/d/tracelet-run?var-run=${__data.fields["Run id"]}'
    '&from=${__data.fields["Started"].numeric}&to=${__data.fields["Last seen"].numeric}'
    "&${datasource:queryparam}&${loki:queryparam}"
)


# The gateway knows which run of MLflow it made; the label behind the column MLflow is only there for runs that write to
# MLflow themselves.
BY_GATEWAY = "${gateway}/runs/${__value.raw}"


def addresses() -> list[Json]:
    """Of what is no data source; as docker-compose.yml has them."""
    return [fixed("mlflow", "MLflow", "http://localhost:5000"), fixed("gateway", "Gateway", "http://localhost:4319")]


def runs_table(more: list[Json], first: list[str]) -> Json:
    """The table of runs; `more` queries are columns of their own, shown after those in `first`."""
    info = (
        "max by (tracelet_run_id, tracelet_run_name, tracelet_project, tracelet_experiment_name, host_name, "
        f"tracelet_run_trace_id, tracelet_mlflow_run_id) ({latest(f'tracelet_run_info{{{RUN}}}')})"
    )
    state = f"max by (tracelet_run_id, tracelet_run_state) ({latest(f'tracelet_run_status{{{RUN}}}')} == 1)"
    targets = [
        at_end(column("drop", info)),
        at_end(column("drop", state)),
        at_end(column("Started", f"floor(1000 * {start()})")),
        at_end(column("Last seen", f"ceil(1000 * {last_sign()})")),
        at_end(column("Duration", f"{last_sign()} - {start()}")),
        at_end(column("Iteration", f"max {BY_RUN} ({latest(f'tracelet_iteration{{{RUN}}}')})")),
        *more,
        events(params(), "instant"),
    ]
    names = {
        "tracelet_run_name": "Run",
        "tracelet_run_state": "Status",
        "Started": "Started",
        "Last seen": "Last seen",
        "Duration": "Duration",
        "Iteration": "Iteration",
        **{name: name for name in first},
        "tracelet_project": "Project",
        "tracelet_experiment_name": "Experiment",
        "host_name": "Host",
        "tracelet_run_trace_id": "Trace",
        "tracelet_mlflow_run_id": "MLflow",
        "tracelet_run_id": "Run id",
    }
    made = table(
        "Runs",
        "Each run of the range: status, host and last values of its newest attempt's lowest rank, params (from Loki).",
        targets,
        names,
    )
    made["fieldConfig"]["overrides"] = [
        override("Run", links=[link("This run", ONE_RUN)]),
        override("Status", mappings=[STATES], custom__cellOptions={"type": "color-text"}),
        override("Started", unit="dateTimeAsIso"),
        override("Last seen", unit="dateTimeAsIso"),
        override("Duration", unit="s"),
        override("Trace", links=[link("Its trace in Tempo", TRACE)], custom__width=120),
        override("MLflow", links=[link("The run in MLflow", "${mlflow}/#/runs/${__value.raw}")], custom__width=120),
        override("Run id", links=[link("Its logs in Loki", LOGS_OF_RUN), link("The run in MLflow", BY_GATEWAY)]),
    ]
    return made


def runs_dashboard() -> Json:
    """What ran, and what came of it."""
    page = Page()
    last = columns_by_key(latest(value_of(), each="tracelet_run_id, tracelet_metric_key"))
    page.add(runs_table([at_end(last)], []), 24, 11)
    page.add(
        logs("Ends", "How runs ended.", f'{EVENTS} | tracelet_event="tracelet.run.ended" | {RUN}'),
        24,
        7,
    )
    variables = [*sources("prometheus", "loki", "tempo"), *runs(), key(), *addresses()]
    return dashboard("runs", "All runs of the range, with params, last values and links.", page, variables=variables)


def run_dashboard() -> Json:
    """One run, or a few, in full."""
    page = Page()
    page.add(
        by_iteration(
            "$shown by iteration",
            f"Over the iteration it was logged with; of the metrics chosen the {MOST_PANELS} with the most points.",
            SHOWN,
            repeat="shown",
            repeatDirection="h",
            maxPerRow=3,
        ),
        24,
        9,
    )
    page.add(
        curves(
            "Metrics by time",
            "The metrics above, when they were logged.",
            [
                over_time(
                    lines(lately(value_of(SHOWN)), value_of(SHOWN), "tracelet_metric_key"),
                    "{{tracelet_metric_key}} " + LEGEND,
                )
            ],
            interval="1s",
        ),
        24,
        8,
    )
    for title, description, expression, legend in hosts():
        page.add(curves(title, description, [over_time(expression, legend)], "percentunit"), 12, 7)
    iterations, lives = f"tracelet_iteration{{{RUN}}}", f"tracelet_run_heartbeat_seconds{{{RUN}}}"
    # A metric logged less than twice a minute has no slope but a long one, which must not outlive the run.
    slowly = f"deriv({iterations}[1h]) and on ({ATTEMPT}) {lives}"
    speed = f"deriv({iterations}[$__rate_interval]) or ({slowly})"
    page.add(
        curves(
            "Iterations a second",
            "How fast the run gets on, by the metric that counts fastest.",
            [over_time(lines(speed, iterations), LEGEND)],
            interval="5s",
        ),
        12,
        7,
    )
    page.add(logs("Logs", "All that the run said, newest first.", f"{EVENTS} | {RUN}"), 12, 7)
    every = f'{{{LOGGED},tracelet_metric_key=~"(.+[/._])?epoch",{RUN}}}'
    by_attempt = f"max by ({ATTEMPT}, tracelet_run_name)"  # a resumed run may count again from an earlier epoch
    now = f"floor({by_attempt} ({lately(every)}))"
    before = f"floor({by_attempt} (last_over_time({every}[1d] offset $__interval)))"
    # Grafana marks only values above zero, and there is an epoch 0: a group's value is 1.
    began = f"group by (tracelet_run_id, tracelet_run_name) ({now} unless {now} == {before})"
    marks = [
        annotation(
            "Epochs",
            "blue",
            PROMETHEUS,
            {
                "expr": began,
                "step": "1s",
                "titleFormat": "epoch",
                "textFormat": "{{tracelet_run_name}}",
            },
        ),
        annotation(
            "Starts and ends",
            "orange",
            LOKI,
            {"expr": f'{EVENTS} | tracelet_event=~"tracelet.run.(started|ended)" | {RUN}', "titleFormat": "run"},
        ),
    ]
    # It begins with the newest run: all runs by all their metrics would be thousands of panels.
    variables = [*sources("prometheus", "loki"), *runs(everything=False), key(), shown()]
    described = "One run: metrics, its hosts, epochs, logs."
    return dashboard("run", described, page, variables=variables, annotations=marks)


def of_gpus(convention: str, dcgm: str) -> str:
    """A GPU's value by the semantic conventions, and for hosts without it by the names of NVIDIA's DCGM exporter."""
    host = f'label_replace({dcgm}, "host_name", "$1", "Hostname", "(.+)")'
    gpu = f'label_replace({host}, "hw_id", "GPU $1", "gpu", "(.+)")'
    return f"avg by (host_name, hw_id) ({convention}) or on (host_name) avg by (host_name, hw_id) ({gpu})"


def hosts() -> list[tuple[str, str, str, str]]:
    """CPU and GPU of the hosts of a run while it runs, by the names of the semantic conventions."""
    here = f"and on (host_name) tracelet_run_info{{{RUN}}}"
    frame_buffer = "DCGM_FI_DEV_FB_USED / (DCGM_FI_DEV_FB_USED + DCGM_FI_DEV_FB_FREE)"
    # `state` is what the collector's host_metrics receiver still says for cpu.mode and system.memory.state.
    idle = 'system_cpu_utilization_ratio{cpu_mode="idle"} or system_cpu_utilization_ratio{state="idle"}'
    used = (
        'system_memory_utilization_ratio{system_memory_state="used"} or system_memory_utilization_ratio{state="used"}'
    )
    return [
        (
            "GPU",
            "Time the GPUs were busy (hw.gpu.utilization, or NVIDIA's DCGM exporter).",
            f"({of_gpus('hw_gpu_utilization_ratio', 'DCGM_FI_DEV_GPU_UTIL / 100')}) {here}",
            "{{host_name}} {{hw_id}}",
        ),
        (
            "GPU memory",
            "Memory of the GPUs in use (hw.gpu.memory.utilization, or NVIDIA's DCGM exporter).",
            f"({of_gpus('hw_gpu_memory_utilization_ratio', frame_buffer)}) {here}",
            "{{host_name}} {{hw_id}}",
        ),
        (
            "CPU",
            "Time the cores were not idle (system.cpu.utilization).",
            f"(1 - avg by (host_name) ({idle})) {here}",
            "{{host_name}}",
        ),
        (
            "Memory",
            "Memory of the host in use (system.memory.utilization).",
            f"(sum by (host_name) ({used})) {here}",
            "{{host_name}}",
        ),
    ]


def compare_dashboard() -> Json:
    """Many runs over one metric."""
    page = Page()
    one = value_of(ONE_CHOSEN)
    page.add(by_iteration("$key by iteration", "One line a run, rank and attempt.", ONE_CHOSEN), 12, 11)
    page.add(
        curves(
            "$key by time",
            "One line a run, rank and attempt.",
            [over_time(lines(lately(one), one), LEGEND)],
            interval="1s",
        ),
        12,
        11,
    )
    best = f"${{best}} {BY_RUN} (${{best}}_over_time({one}[$__range]))"  # of all attempts and ranks
    last = f"max {BY_RUN} ({latest(one)})"
    page.add(runs_table([at_end(column("Best", best)), at_end(column("Last", last))], ["Best", "Last"]), 24, 9)
    variables = [
        *sources("prometheus", "loki", "tempo"),
        *runs(),
        key(multi=False),
        one_of("best", "Best is", ["min", "max"]),
        *addresses(),
    ]
    return dashboard("compare", "Many runs over one metric, with params beside it.", page, variables=variables)


def fleet_dashboard() -> Json:
    """Whether everything runs, and everything arrives."""
    page = Page()
    every = 'tracelet_run_id!=""'
    running = in_state("RUNNING|LOST", every)  # LOST is no end: a word of whoever ships another host's run
    heard = age(f"tracelet_run_heartbeat_seconds{{{every}}}")
    moved = age(f"tracelet_run_last_iteration_time_seconds{{{every}}}")
    alive = f"({running}) and on ({ATTEMPT}) ({heard} < 300)"
    for title, description, expression in (
        ("Running", "A heartbeat in the last 5 minutes.", alive),
        ("Stalled", "Alive, and no metric for 10 minutes.", f"{alive} and on ({ATTEMPT}) ({moved} > 600)"),
        (
            "Silent",
            "Running when last heard of, 5 minutes ago or more.",
            f"({running}) and on ({ATTEMPT}) ({heard} >= 300)",
        ),
        ("Failed", "Ended by an error.", in_state("FAILED", every)),
        ("Killed", "Ended by a signal or without a word.", in_state("KILLED", every)),
        ("Finished", "Ended well.", in_state("FINISHED", every)),
    ):
        color = {"Stalled": "yellow", "Silent": COLORS["LOST"]}.get(title) or COLORS[title.upper()]
        page.add(number(title, description, f"count({of_project(expression)}) or vector(0)", color), 4, 4)
    # Each point once, however long a step is: all between a step and the one before it.
    stored = f'count_over_time({{{LOGGED},tracelet_metric_key!=""}}[$__interval])'
    rate = of_run(f"sum by (tracelet_run_id, tracelet_run_name) ({stored}) / ($__interval_ms / 1000)")
    of_projects = 'last_over_time(tracelet_run_info{tracelet_project=~"$project"}[$__range] @ end())'
    named = f'label_join({rate}, "line", "", "tracelet_run_name", "id")'
    page.add(
        curves(
            "Points a second",
            "Points of each run as Prometheus has them, by their own time.",
            [over_time(f"{named} and on (tracelet_run_id) {of_projects}", LEGEND)],
            "cps",
            interval="30s",
        ),
        12,
        8,
    )
    for title, description, unit, targets in pipeline():
        page.add(curves(title, description, targets, unit), 12, 8)
    in_projects = 'tracelet_project=~"$project"'
    ended = f'{EVENTS} | tracelet_event="tracelet.run.ended" | {in_projects}'
    page.add(logs("Ends", "How runs ended.", ended), 12, 8)
    variables = [*sources("prometheus", "loki"), project(), service(in_projects)]
    return dashboard("fleet", "All runs, and the way their data takes.", page, variables=variables)


def pipeline() -> list[tuple[str, str, str, list[Json]]]:
    """What the collector and the gateway say of themselves."""
    rate = "[$__rate_interval]"
    kinds = (("metric_points", "points"), ("log_records", "events"), ("spans", "spans"))
    queue = "max by (exporter, data_type) (otelcol_exporter_queue_size)"
    room = "max by (exporter, data_type) (otelcol_exporter_queue_capacity)"
    # The last dot is one in the collector's name; whether Prometheus keeps it depends on how it was asked to scrape.
    filtered = [
        over_time(
            f'sum by (filter) (rate({{__name__=~"otelcol_processor_filter_{kind}.filtered"}}{rate}))',
            f"{{{{filter}}}} {word}",
        )
        for kind, word in (("datapoints", "points"), ("logs", "events"))
    ]
    failed = [
        over_time(f"sum(rate(otelcol_{what}_{kind}{rate})) or vector(0)", f"{said} {word}")
        for what, said in (
            ("receiver_refused", "refused (sent again)"),
            ("exporter_enqueue_failed", "queue full"),
            ("exporter_send_failed", "dropped"),
        )
        for kind, word in kinds
    ]
    return [
        (
            "Arriving at the collector",
            "What it took from runs.",
            "cps",
            [over_time(f"sum(rate(otelcol_receiver_accepted_{kind}{rate}))", word) for kind, word in kinds],
        ),
        (
            "Leaving the collector",
            "What each backend took.",
            "cps",
            [
                over_time(f"sum by (exporter) (rate(otelcol_exporter_sent_{kind}{rate}))", f"{{{{exporter}}}} {word}")
                for kind, word in kinds
            ],
        ),
        (
            "Queues",
            "How full each queue on disk is. A full one makes runs keep their data until it has room.",
            "percentunit",
            [over_time(f"{queue} / {room}", "{{exporter}} {{data_type}}")],
        ),
        (
            "Filtered on the way",
            "What didn't go to Prometheus or Loki, by reason. MLflow gets all of it.",
            "cps",
            filtered,
        ),
        (
            "Gateway",
            "What it has taken and MLflow has not.",
            "short",
            [
                over_time("sum(tracelet_gateway_undelivered_records)", "records that wait"),
                over_time("sum(tracelet_gateway_mlflow_trouble_runs)", "runs that don't get on"),
                over_time("sum by (state) (tracelet_gateway_runs)", "runs {{state}}"),
            ],
        ),
        (
            "Refused or dropped",
            "Dropped is lost for that backend; what was refused the run sends again.",
            "cps",
            failed,
        ),
    ]


def all_dashboards() -> dict[str, Json]:
    """Each dashboard by the name of its file."""
    return {
        "runs.json": runs_dashboard(),
        "run.json": run_dashboard(),
        "compare.json": compare_dashboard(),
        "fleet.json": fleet_dashboard(),
    }


def text(made: Json) -> str:
    """The file's content; the same for the same dashboard."""
    return json.dumps(made, indent=2, ensure_ascii=False) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files, or compare them; 1 if one differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a file is not as it would be written")
    check = parser.parse_args(arguments).check
    old = 0
    for name, made in all_dashboards().items():
        path = FOLDER / name
        if check:
            if not path.exists() or path.read_text() != text(made):
                print(f"{path} is not what scripts/dashboards.py makes", file=sys.stderr)
                old = 1
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(made))
    return old


if __name__ == "__main__":
    raise SystemExit(main())
