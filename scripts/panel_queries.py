"""What a panel of the dashboards asks and gets: Grafana's substitutions and transformations, done without Grafana.

Only as much of them as the dashboards use. The tests run every query by it, and draw_panels.py draws what it returns.
"""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = dict[str, Any]
Row = dict[str, Any]
ALL = "$__all"

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass
class Range:
    """The dashboard's range of time, in seconds since the epoch, and the number of points a panel is wide."""

    start: float
    end: float
    points: int = 1000

    def step(self, least: str = "15s") -> int:
        """Seconds between two points of a range query: what fits the panel, but not less than its minimum."""
        wished = (self.end - self.start) / self.points
        smallest = seconds(least)
        return max(smallest, next((s for s in (1, 2, 5, 10, 15, 30, 60, 300, 900, 3600) if s >= wished), 7200))


@dataclass
class Values:
    """The variables of a dashboard with what is chosen: one text, or several."""

    chosen: dict[str, str | list[str]] = field(default_factory=dict)


def seconds(text: str) -> int:
    """Of a duration such as 15s or 1m."""
    match = re.fullmatch(r"(\d+)([smhd])", text)
    if match is None:
        raise ValueError(f"{text!r} is no duration")
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def substituted(text: str, values: Values, over: Range, step: int, scrape: int = 15) -> str:
    """The query with variables as Grafana puts them in: several values as alternatives, their special signs escaped."""
    whole = max(1, round(over.end - over.start))
    built_in = {
        "__range": f"{whole}s",
        "__range_s": str(whole),
        "__interval": f"{step}s",
        "__interval_ms": str(step * 1000),
        "__rate_interval": f"{max(step + scrape, 4 * scrape)}s",
    }

    def put(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name in built_in:
            return built_in[name]
        if name.isdigit():  # a group of label_replace
            return match[0]
        if name not in values.chosen:
            raise KeyError(f"${name} is no variable of this dashboard, in {text}")
        value = values.chosen[name]
        if isinstance(value, str):
            return value
        words = [re.sub(r"[\\^$*+?.()|[\]{}/]", lambda sign: "\\\\" + sign[0], word) for word in value]
        return words[0] if len(words) == 1 else f"({'|'.join(words)})"

    return re.sub(r"\$(?:\{(\w+)(?::\w+)?\}|(\w+))", put, text)


@dataclass
class Servers:
    """Where the queries go."""

    prometheus: str
    loki: str

    def ask(self, target: Mapping[str, Any], query: str, over: Range, step: int) -> list[Json]:
        """The result of one query, as the server gives it: series with labels and values, or Loki's streams."""
        if target["datasource"]["type"] == "loki":
            return self._loki(query, over, target.get("queryType", "range"), step)
        return self.range(query, over, step) if target.get("range", True) else self.instant(query, over.end)

    def instant(self, query: str, at: float) -> list[Json]:
        """Prometheus, at one time."""
        return self._get(f"{self.prometheus}/api/v1/query", query=query, time=f"{at:.3f}")

    def range(self, query: str, over: Range, step: int) -> list[Json]:
        """Prometheus, over the range; the grid is aligned as Grafana aligns it."""
        start, end = over.start // step * step, over.end // step * step
        return self._get(f"{self.prometheus}/api/v1/query_range", query=query, start=start, end=end, step=step)

    def label_values(self, selector: str, label: str, over: Range) -> list[str]:
        """What Grafana's label_values(selector, label) lists."""
        found = self._get(
            f"{self.prometheus}/api/v1/label/{label}/values", **{"match[]": selector}, start=over.start, end=over.end
        )
        return sorted(str(value) for value in found)

    def _loki(self, query: str, over: Range, kind: str, step: int) -> list[Json]:
        if kind == "instant":
            return self._get(f"{self.loki}/loki/api/v1/query", query=query, time=round(over.end * 1e9))
        whole = {"start": round(over.start * 1e9), "end": round(over.end * 1e9)}
        return self._get(f"{self.loki}/loki/api/v1/query_range", query=query, limit=1000, step=step, **whole)

    def _get(self, address: str, **asked: Any) -> list[Any]:
        data = urllib.parse.urlencode(asked).encode()
        if "/label/" in address or "/loki/" in address:
            request = urllib.request.Request(f"{address}?{data.decode()}")
        else:
            request = urllib.request.Request(address, data)
        try:
            with _opener.open(request, timeout=60) as reply:
                answer = json.load(reply)
        except urllib.error.HTTPError as error:
            raise ValueError(f"{asked.get('query')}: {error.code} {error.read().decode()[:1000]}") from None
        found = answer["data"]
        return list(found["result"] if isinstance(found, dict) else found)


def chosen(dashboard: Json, servers: Servers, over: Range, given: Mapping[str, str | list[str]]) -> Values:
    """Each variable with what Grafana would show first, or with what is given; in the order in which they build up."""
    values = Values()
    for variable in dashboard["templating"]["list"]:
        name = variable["name"]
        if name in given:
            values.chosen[name] = given[name]
        elif variable["type"] == "query":
            found = [value for _, value in options(variable, values, servers, over)]
            everything = variable["includeAll"]
            if everything and variable.get("allValue"):
                values.chosen[name] = str(variable["allValue"])
            else:
                first = found[:1] if variable["multi"] else (found[0] if found else "")
                values.chosen[name] = found if everything else first
        elif variable["type"] == "datasource":
            values.chosen[name] = str(variable["query"])
        else:
            values.chosen[name] = str(variable["current"]["value"])
    return values


def options(variable: Json, values: Values, servers: Servers, over: Range) -> list[tuple[str, str]]:
    """Text and value of each choice of a query variable."""
    query = substituted(variable["query"]["query"], values, over, 15)
    listed = re.fullmatch(r"label_values\((.*), ?(\w+)\)", query, re.DOTALL)
    if listed is not None:
        return [(value, value) for value in servers.label_values(listed[1], listed[2], over)]
    result = re.fullmatch(r"query_result\((.*)\)", query, re.DOTALL)
    if result is None:
        raise ValueError(f"a variable's query of no known kind: {query}")
    shown = []
    for series in servers.instant(result[1], over.end):
        labels = ",".join(f'{name}="{value}"' for name, value in series["metric"].items() if name != "__name__")
        shown.append(f"{{{labels}}} {series['value'][1]} {series['value'][0] * 1000:.0f}")
    found = [_captured(text, variable["regex"]) for text in shown]
    return sorted(found) if variable["sort"] else found


def _captured(text: str, regex: str) -> tuple[str, str]:
    pattern = re.compile(regex.removeprefix("/").rpartition("/")[0].replace("(?<", "(?P<"))
    found: dict[str, str] = {}
    for match in pattern.finditer(text):
        for name, value in match.groupdict().items():
            if value is not None:
                found.setdefault(name, value)
    return found.get("text", found["value"]), found["value"]


# ---- results as a panel gets them ---------------------------------------------------------------------------------


def frames(panel: Json, values: Values, servers: Servers, over: Range) -> list[tuple[Json, list[Json]]]:
    """Each target of a panel with its result."""
    step = Range(over.start, over.end, panel.get("maxDataPoints", over.points)).step(panel.get("interval", "15s"))
    return [
        (target, servers.ask(target, substituted(target["expr"], values, over, step), over, step))
        for target in panel["targets"]
    ]


def rows(panel: Json, found: Iterable[tuple[Json, list[Json]]]) -> list[Row]:
    """The rows of a table panel: labels to fields, fields filtered, merged, renamed and put in order."""
    (include,) = (t["options"]["include"]["pattern"] for t in panel["transformations"] if t["id"].startswith("filter"))
    (organize,) = (t["options"] for t in panel["transformations"] if t["id"] == "organize")
    (rename,) = (t["options"] for t in panel["transformations"] if t["id"] == "renameByRegex")
    (by_label,) = (t["options"]["valueLabel"] for t in panel["transformations"] if t["id"] == "labelsToFields")
    tables: list[list[Row]] = []
    for _, result in found:
        for series in result:
            labels = dict(series["metric"])
            row = {"Time": series["value"][0], labels.pop(by_label, "Value"): float(series["value"][1]), **labels}
            tables.append([{name: value for name, value in row.items() if re.search(include, name)}])
    merged = merge(tables)
    pattern = re.compile(rename["regex"])
    place = rename["renamePattern"].replace("$1", r"\1")
    renamed = [{pattern.sub(place, n) if pattern.fullmatch(n) else n: v for n, v in row.items()} for row in merged]
    last = len(organize["indexByName"])
    every = sorted({name for row in renamed for name in row})
    order = sorted(every, key=lambda name: organize["indexByName"].get(name, last))
    return [{organize["renameByName"].get(name, name): row.get(name) for name in order} for row in renamed]


def merge(tables: Sequence[list[Row]]) -> list[Row]:
    """Grafana's merge: rows with the same values in the fields that all tables have become one, if nothing differs."""
    shared = set.intersection(*({name for row in table for name in row} for table in tables)) if tables else set()
    merged: list[Row] = []
    places: dict[tuple[Any, ...], list[Row]] = {}
    for row in (row for table in tables for row in table):
        key = tuple(row.get(name) for name in sorted(shared))
        for there in places.setdefault(key, []):
            if all(there[name] == value for name, value in row.items() if name in there):
                there.update(row)
                break
        else:
            merged.append(dict(row))
            places[key].append(merged[-1])
    return merged


def lines_by_iteration(
    panel: Json, found: Sequence[tuple[Json, list[Json]]]
) -> dict[tuple[str, ...], list[tuple[float, float]]]:
    """The lines of an XY panel: the two queries as tables, merged, a line for each run, each a list of (x, y)."""
    (organize,) = (t["options"] for t in panel["transformations"] if t["id"] == "organize")
    (partition,) = (t["options"]["fields"] for t in panel["transformations"] if t["id"] == "partitionByValues")
    tables = []
    for target, result in found:
        name = organize["renameByName"][f"Value #{target['refId']}"]
        tables.append([{"Time": at, name: float(value), **s["metric"]} for s in result for at, value in s["values"]])
    lines: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for row in sorted(merge(tables), key=lambda row: float(row["Time"])):
        if "iteration" in row and "value" in row:
            name = tuple(str(row[each]) for each in partition)
            lines.setdefault(name, []).append((row["iteration"], row["value"]))
    return lines


def load(path: Path) -> Json:
    """A dashboard's file."""
    return dict(json.loads(path.read_text()))


def last_hour() -> Range:
    """What most people look at."""
    now = time.time()
    return Range(now - 3600, now)
