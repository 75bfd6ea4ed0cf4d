"""Rows as OpenMetrics text that promtool makes blocks of, with the names and labels that OTLP gets in Prometheus."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tracelet.cli.export_rows import DENSE, Row, Series
from tracelet.otlp import semconv
from tracelet.otlp.encode_points import wire_text
from tracelet.records import Scalar

__all__ = ["Counts", "label_name", "lines", "metric_name", "seconds"]

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9:]+")
_NOT_IN_LABELS = re.compile(r"[^A-Za-z0-9_]")
_MS = 1_000_000


@dataclass
class Counts:
    """What became of the rows."""

    points: int = 0
    dense: int = 0  # no millisecond of their own
    twice: int = 0  # a point of the same series and millisecond came before


def metric_name(name: str) -> str:
    """`name` as Prometheus translates it (UnderscoreEscapingWithSuffixes, no unit).

    Examples:
        >>> from tracelet.cli.export_openmetrics import metric_name
        >>> metric_name("ml.train//loss (μ)")
        'ml_train_loss'
    """
    translated = "_".join(token for token in _NOT_IN_NAMES.split(name) if token)
    return f"_{translated}" if translated[:1].isdigit() else translated


def label_name(name: str) -> str:
    """An attribute's name as Prometheus translates it: each character by itself, unlike in a metric's name.

    Names that would begin with one underscore get `key` before it; with two they stay, since such labels are
    Prometheus' own and it takes them as meant.

    Examples:
        >>> from tracelet.cli.export_openmetrics import label_name
        >>> label_name("tracelet.run.id"), label_name("_team")
        ('tracelet_run_id', 'key_team')
    """
    translated = _NOT_IN_LABELS.sub("_", name)
    if translated[:1].isdigit():
        return f"key_{translated}"
    return f"key{translated}" if re.match("_(?!_)", translated) else translated


def labels_of(series: Series, promoted: Sequence[str]) -> dict[str, str]:
    """The labels of a series and its companion, without the name; `promoted` as in Prometheus' configuration."""
    resource = series.resource
    service, namespace = _text(resource.get("service.name", "")), _text(resource.get("service.namespace", ""))
    found = {name: _text(resource[name]) for name in (*promoted, *semconv.LABELS) if name in resource}
    labels = {label_name(name): value for name, value in found.items()}
    labels[label_name(semconv.METRIC_KEY)] = wire_text(series.name)
    labels["job"] = f"{namespace}/{service}" if namespace else service
    labels["instance"] = _text(resource.get(semconv.SERVICE_INSTANCE_ID, ""))
    return {name: value for name, value in sorted(labels.items()) if value}  # an empty label is none


def lines(
    rows: Iterable[Row], series: Sequence[Series], prefix: str, promoted: Sequence[str], counts: Counts
) -> Iterator[str]:
    """The file's lines: two for each point, itself and its companion; `# EOF` at the end, without which it is none.

    Within a series times rise, as promtool needs: of two points in one millisecond the first is kept, as Prometheus
    does, the other counted.
    """
    heads: list[tuple[str, str]] = []
    last: list[int] = []
    for time, number, value, iteration in rows:
        if number & DENSE:
            counts.dense += 1
            continue
        while len(heads) <= number:
            heads.append(_heads(series[len(heads)], prefix, promoted))
            last.append(-1)
        at = time // _MS
        if at <= last[number]:
            counts.twice += 1
            continue
        last[number] = at
        counts.points += 1
        stamp = seconds(at)
        mine, companion = heads[number]
        yield f"{mine}{_number(value)} {stamp}\n{companion}{float(iteration)!r} {stamp}\n"
    yield "# EOF\n"


def _heads(series: Series, prefix: str, promoted: Sequence[str]) -> tuple[str, str]:
    inside = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels_of(series, promoted).items())
    names = (metric_name(prefix + wire_text(series.name)), metric_name(semconv.ITERATION))
    return f"{names[0]}{{{inside}}} ", f"{names[1]}{{{inside}}} "


def seconds(at: int) -> str:
    """Millisecond `at` in seconds, as text that promtool reads as that very millisecond.

    It multiplies by 1000 and cuts off: 1790000000.009 would be the millisecond before.

    Examples:
        >>> from tracelet.cli.export_openmetrics import seconds
        >>> seconds(1_500), int(float(seconds(1_790_000_000_009)) * 1000)
        ('1.5', 1790000000009)
    """
    value = at / 1000
    while int(value * 1000) < at:
        value = math.nextafter(value, math.inf)
    return repr(value)


def _number(value: float) -> str:
    if value - value == 0:
        return repr(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _text(value: Scalar) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return wire_text(str(value))


def plain_row(row: Row, series: Sequence[Series]) -> Mapping[str, object]:
    """A row with words for its series, for formats that people read."""
    time, number, value, iteration = row
    one = series[number & ~DENSE]
    return {
        "run_id": one.resource.get(semconv.RUN_ID, ""),
        "attempt": one.resource.get(semconv.RUN_ATTEMPT, ""),
        "rank": one.resource.get(semconv.RANK, 0),
        "name": one.name,
        "iteration": iteration,
        "value": value,
        "time_unix_nano": time,
    }
