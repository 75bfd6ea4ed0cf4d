"""Draw the dashboards from their own queries on a running stack, in Grafana's look: the pictures of docs/images.

They are no screenshots, and say so: what is drawn is what each panel's query returns, after its transformations.

.venv/bin/python scripts/stack.py up --dir DIR --with loki        # and examples/to_the_stack.py into it
.venv/bin/python scripts/draw_panels.py --stack DIR --out docs/images
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import panel_queries
from matplotlib.axes import Axes
from panel_queries import Json, Range, Servers, Values

FOLDER = Path(__file__).resolve().parent.parent / "collector-config" / "grafana" / "dashboards"
PAGE, PANEL, EDGE, TEXT, FAINT, LINK = "#111217", "#181b1f", "#2c2f36", "#ccccdc", "#8e8e9a", "#6e9fff"
LINES = ("#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#b877d9", "#37872d", "#fade2a", "#5794f2")
NAMED = {"green": "#73bf69", "red": "#f2495c", "blue": "#5794f2", "orange": "#ff9830", "purple": "#b877d9"}
NAMED["yellow"] = "#fade2a"
WIDTH, ROW = 16.0, 0.34  # inches: of the picture, and of one unit of Grafana's grid
SAID = "drawn from the panels' queries on a real Prometheus and Loki; not a screenshot of Grafana"


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw each dashboard that was named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stack", type=Path, required=True, help="the folder of `scripts/stack.py up`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="runs,run,compare,fleet")
    parser.add_argument("--minutes", type=float, default=15.0, help="how far back")
    parser.add_argument("--end", type=float, help="where the range ends, in seconds since the epoch; default: now")
    parser.add_argument("--run", action="append", default=[], help="ids for the dashboard Run; default: all")
    parser.add_argument("--key", default="train/loss", help="what to compare")
    chosen = parser.parse_args(arguments)
    state = json.loads((chosen.stack / "stack.json").read_text())
    servers = Servers(state["prometheus"], state["loki"])
    end = chosen.end or panel_queries.last_hour().end
    over = Range(end - 60 * chosen.minutes, end)
    for name in chosen.only.split(","):
        dashboard = panel_queries.load(FOLDER / f"{name}.json")
        given: dict[str, str | list[str]] = {"key": chosen.key} if name == "compare" else {}
        if name == "run" and chosen.run:
            given["run"] = chosen.run
        values = panel_queries.chosen(dashboard, servers, over, given)
        path = chosen.out / f"grafana-{name}.png"
        draw(dashboard, values, servers, over, path)
        print(path)
    return 0


def draw(dashboard: Json, values: Values, servers: Servers, over: Range, path: Path) -> None:
    """One picture of a whole dashboard."""
    panels = expanded(dashboard["panels"], values)
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel, _ in panels) + 2
    height = rows * ROW
    figure = plt.figure(figsize=(WIDTH, height), facecolor=PAGE)
    figure.text(0.008, 1 - 0.85 / rows, f"tracelet / {dashboard['title']}", color=TEXT, fontsize=13, weight="bold")
    figure.text(0.992, 1 - 0.85 / rows, SAID, color=FAINT, fontsize=9, ha="right", style="italic")
    marks = marks_of(dashboard, values, servers, over)
    for panel, own in panels:
        place = panel["gridPos"]
        left, width = place["x"] / 24 + 0.004, place["w"] / 24 - 0.008
        bottom = 1 - (place["y"] + place["h"] + 1.3) / rows
        tall = (place["h"] - 0.25) / rows
        box = figure.add_axes((left, bottom, width, tall), facecolor=PANEL)
        box.set_xticks([])
        box.set_yticks([])
        for side in box.spines.values():
            side.set_color(EDGE)
        title = panel["title"]
        for name in ("key", "shown"):
            value = own.chosen.get(name, "")
            title = title.replace(f"${name}", value if isinstance(value, str) else " + ".join(value))
        inch_high, inch_wide = tall * height, width * WIDTH
        box.text(
            0.1 / inch_wide, 1 - 0.1 / inch_high, title, color=TEXT, fontsize=10, va="top", transform=box.transAxes
        )
        found = panel_queries.frames(panel, own, servers, over)
        PAINTERS[panel["type"]](box, panel, found, marks if panel["type"] == "timeseries" else [])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, facecolor=PAGE, metadata={"Software": None})
    plt.close(figure)


def expanded(panels: list[Json], values: Values) -> list[tuple[Json, Values]]:
    """Panels with those that repeat once for each value, and what is below moved down."""
    made: list[tuple[Json, Values]] = []
    lower = 0
    for panel in panels:
        place = panel["gridPos"]
        name = panel.get("repeat")
        each = values.chosen[name] if name else ""
        if not name or isinstance(each, str):
            made.append((panel | {"gridPos": place | {"y": place["y"] + lower}}, values))
            continue
        across = min(len(each), panel["maxPerRow"])
        wide = 24 // across
        for index, value in enumerate(each):
            at = {"x": index % across * wide, "y": place["y"] + index // across * place["h"], "w": wide}
            made.append((panel | {"gridPos": place | at}, Values(values.chosen | {name: [value]})))
        lower += (-(-len(each) // across) - 1) * place["h"]
    return made


def marks_of(dashboard: Json, values: Values, servers: Servers, over: Range) -> list[tuple[float, str]]:
    """When, and in which colour, each annotation marks the panels."""
    marks = []
    for annotation in dashboard["annotations"]["list"]:
        step = panel_queries.seconds(annotation.get("step", "1s"))
        query = panel_queries.substituted(annotation["expr"], values, over, step)
        for series in servers.ask(annotation, query, over, step):
            scale = 1e9 if "stream" in series else 1.0
            # Of Prometheus' values Grafana marks those above zero.
            shown = [at for at, value in series["values"] if "stream" in series or float(value) > 0]
            marks += [(float(at) / scale, NAMED[annotation["iconColor"]]) for at in shown]
    return marks


# ---- kinds of panels ------------------------------------------------------------------------------------------------

Found = list[tuple[Json, list[Json]]]
Marks = list[tuple[float, str]]


def inches(box: Axes) -> tuple[float, float]:
    """Width and height of a panel."""
    wide, high = box.figure.get_figure(root=True).get_size_inches()
    return wide * box.get_position().width, high * box.get_position().height


def inner(box: Axes, legend_rows: int) -> Axes:
    """The axes of a chart within its panel, with room for the title above and the legend below."""
    figure = box.figure
    place = box.get_position()
    wide, high = WIDTH, inches(box)[1] / place.height
    left, right, top, bottom = 0.6 / wide, 0.15 / wide, 0.42 / high, (0.35 + 0.19 * legend_rows) / high
    axes = figure.add_axes(
        (place.x0 + left, place.y0 + bottom, place.width - left - right, place.height - top - bottom)
    )
    axes.set_facecolor(PANEL)
    axes.grid(color=EDGE, linewidth=0.6)
    axes.tick_params(colors=FAINT, labelsize=8, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    return axes


def legend(box: Axes, names: list[str]) -> None:
    """The names of the lines below them, two a row; what has no room is counted."""
    wide, high = inches(box)
    per_row, room = max(1, int(wide / 3.3)), int(wide * 11)
    for index, name in enumerate(names[: per_row * 3]):
        x, y = (
            index % per_row / per_row + 0.12 / wide,
            (0.14 + 0.19 * (rows_of(names, wide) - 1 - index // per_row)) / high,
        )
        box.text(x, y, "\u2501", color=LINES[index % len(LINES)], fontsize=9, transform=box.transAxes, va="center")
        shown = name if len(name) <= room // per_row - 4 else name[: room // per_row - 5] + "\u2026"
        box.text(x + 0.2 / wide, y, shown, color=TEXT, fontsize=8, transform=box.transAxes, va="center")


def rows_of(names: list[str], wide: float) -> int:
    """Lines of a legend."""
    return min(3, -(-len(names) // max(1, int(wide / 3.3))))


def labelled(target: Json, series: Json) -> str:
    """The legend's text of a series."""
    import re

    text = re.sub(r"\{\{(\w+)\}\}", lambda match: str(series["metric"].get(match[1], "")), target["legendFormat"])
    return " ".join(word[:8] if len(word) == 32 else word for word in text.split())


def paint_time(box: Axes, panel: Json, found: Found, marks: Marks) -> None:
    lines = [(labelled(target, series), series["values"]) for target, result in found for series in result]
    lines.sort(key=lambda line: line[0])
    axes = inner(box, rows_of([name for name, _ in lines], inches(box)[0]))
    for index, (_, points) in enumerate(lines):
        xs, ys = [float(at) for at, _ in points], [float(value) for _, value in points]
        axes.plot(
            xs, ys, color=LINES[index % len(LINES)], linewidth=1.1, marker="o" if len(xs) < 3 else None, markersize=3
        )
    if lines:
        low, high = axes.get_xlim()
        for at, color in marks:
            if low <= at <= high:
                axes.axvline(at, color=color, linewidth=0.8, linestyle=(0, (3, 3)), alpha=0.8)
    if not lines:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "No data", color=FAINT, fontsize=11, ha="center", transform=axes.transAxes)
        return
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(6))
    axes.xaxis.set_major_formatter(lambda x, _: f"{datetime.fromtimestamp(x, UTC):%H:%M:%S}")
    if panel["fieldConfig"]["defaults"]["unit"] == "percentunit":
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y * 100:.0f}%")
    legend(box, [name for name, _ in lines])


def paint_xy(box: Axes, panel: Json, found: Found, marks: Marks) -> None:
    lines = sorted(panel_queries.lines_by_iteration(panel, found).items())
    names = [" ".join(name) for name, _ in lines]
    axes = inner(box, rows_of(names, inches(box)[0]))
    for index, (_, points) in enumerate(lines):
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=LINES[index % len(LINES)], linewidth=1.1, marker="o", markersize=2.5)
    legend(box, names)


def paint_number(box: Axes, panel: Json, found: Found, marks: Marks) -> None:
    color = NAMED[panel["fieldConfig"]["defaults"]["color"]["fixedColor"]]
    text = f"{float(found[0][1][0]['value'][1]):.0f}"
    box.text(
        0.5, 0.42, text, color=color, fontsize=26, weight="bold", ha="center", va="center", transform=box.transAxes
    )


def paint_table(box: Axes, panel: Json, found: Found, marks: Marks) -> None:
    rows = panel_queries.rows(panel, found)
    order = panel["options"]["sortBy"][0]
    rows.sort(key=lambda row: row[order["displayName"]], reverse=order["desc"])
    overrides = {each["matcher"]["options"]: {p["id"]: p["value"] for p in each["properties"]} for each in _of(panel)}
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)] if rows else []
    texts = {name: [shown(row[name], overrides.get(name, {})) for row in rows] for name in names}
    wide, high = inches(box)
    needed = {name: max(len(name), *(len(text) for text in texts[name])) + 2 for name in names}
    x = 0.1 / wide
    share = (1 - 0.1 / wide) / sum(needed.values()) if names else 0
    for name in names:
        box.text(x, 1 - 0.55 / high, name, color=LINK, fontsize=8, weight="bold", va="center", transform=box.transAxes)
        for index, text in enumerate(texts[name]):
            color = LINK if "links" in overrides.get(name, {}) else TEXT
            for mapping in overrides.get(name, {}).get("mappings", []):
                color = NAMED.get(mapping["options"].get(text, {}).get("color", ""), color)
            y = 1 - (0.85 + 0.28 * index) / high
            box.text(x, y, text, color=color, fontsize=8, va="center", transform=box.transAxes)
        x += needed[name] * share


def _of(panel: Json) -> list[Json]:
    return list(panel["fieldConfig"]["overrides"])


def shown(value: Any, override: Json) -> str:
    """A cell's text, in its column's unit."""
    if value is None:
        return ""
    if override.get("unit") == "dateTimeAsIso":
        return f"{datetime.fromtimestamp(value / 1000, UTC):%Y-%m-%d %H:%M:%S}"
    if override.get("unit") == "s":
        return f"{value:.1f} s" if value < 60 else f"{value / 60:.1f} min"
    if isinstance(value, str):
        return value[:10] + "\u2026" if len(value) == 32 else value
    return f"{value:.4g}"


def paint_logs(box: Axes, panel: Json, found: Found, marks: Marks) -> None:
    lines = [
        (int(at), text, stream["stream"].get("severity_text", "INFO"))
        for _, result in found
        for stream in result
        for at, text in stream["values"]
    ]
    wide, high = inches(box)
    for index, (at, text, severity) in enumerate(sorted(lines, reverse=True)[: int((high - 0.5) / 0.2)]):
        y = 1 - (0.55 + 0.2 * index) / high
        bar = {"ERROR": NAMED["red"]}.get(severity, NAMED["green"])
        box.text(0.1 / wide, y, "\u2503", color=bar, fontsize=8, va="center", transform=box.transAxes)
        line = f"{datetime.fromtimestamp(at / 1e9, UTC):%H:%M:%S.%f}"[:-3] + "  " + text.replace("$", r"\$")
        room = int(wide * 13.5)
        box.text(
            0.25 / wide,
            y,
            line if len(line) <= room else line[: room - 1] + "\u2026",
            color=TEXT,
            fontsize=8,
            family="monospace",
            va="center",
            transform=box.transAxes,
        )


PAINTERS = {
    "timeseries": paint_time,
    "xychart": paint_xy,
    "stat": paint_number,
    "table": paint_table,
    "logs": paint_logs,
}

if __name__ == "__main__":
    sys.exit(main())
