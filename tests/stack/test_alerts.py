"""The alerts before promtool: each rule does what its cases say, and each has a case for both answers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from tests.stack.collectors import CONFIG
from tests.stack.harness import REPOSITORY
from tests.stack.prometheus_server import promtool

FOLDER = CONFIG / "prometheus"
RULES = yaml.safe_load((FOLDER / "rules" / "tracelet.yaml").read_text())
ALERTS = {
    rule["alert"]: " ".join(rule["expr"].split())
    for group in RULES["groups"]
    for rule in group["rules"]
    if "alert" in rule
}
CASES = [
    case for file in sorted((FOLDER / "tests").glob("*.yaml")) for case in yaml.safe_load(file.read_text())["tests"]
]


def asked(case: dict[str, Any], alert: str) -> list[dict[str, Any]]:
    """What a case says about an alert, by time."""
    return [each for each in case.get("alert_rule_test", ()) if each["alertname"] == alert]


def selectors(expr: str) -> set[str]:
    """The selectors of an expression: names of series, with their matchers where they have some.

    What else looks like a name is left out: functions and operators, the labels they are told, words in quotes.
    """
    words = {"and", "or", "unless", "offset", "by", "on"}
    found = re.finditer(
        r"""\b(?:by|on)\s*\([^)]*\)  |  "[^"]*"  |  \b[a-z_]+(?=\s*\(|\s+by\b)
            |  (?<![\w.]) (?P<selector> [a-zA-Z_:][\w:]*(?:\{[^}]*\})? | \{[^}]*\})""",
        expr,
        re.VERBOSE,
    )
    return {each["selector"] for each in found if each["selector"] and each["selector"] not in words}


def test_the_files_are_right_and_every_rule_does_what_its_test_says() -> None:
    assert "SUCCESS" in promtool("check", "config", FOLDER / "prometheus.yaml")
    assert "SUCCESS" in promtool("check", "rules", *sorted((FOLDER / "rules").glob("*.yaml")))
    assert "SUCCESS" in promtool("test", "rules", *sorted((FOLDER / "tests").glob("*.yaml")))


def test_selectors_are_found_among_all_that_looks_like_names() -> None:
    expr = 'sum by (job) ((a_total{x=~"(y|z)"} unless a_total offset 10m) and on (job) up or rate({k="v"}[5m])) > 1e3'
    assert selectors(expr) == {'a_total{x=~"(y|z)"}', "a_total", "up", '{k="v"}'}
    assert selectors('label_replace(last_over_time(b:c[1d]), "host", "$1", "d", "(.+)") == 0') == {"b:c"}


def test_every_alert_has_a_case_in_which_it_fires() -> None:
    fires = {alert for alert in ALERTS for case in CASES for each in asked(case, alert) if each["exp_alerts"]}
    assert fires == ALERTS.keys()


def test_every_alert_is_silent_in_a_case_that_has_series_for_all_of_its_expression(tmp_path: Path) -> None:
    """Silent because nothing is wrong, and not because there is nothing to look at: promtool itself says which."""
    for alert, expr in ALERTS.items():
        there = " and ".join(f"count(last_over_time({each}[1h]))" for each in sorted(selectors(expr)))
        answers = []
        for case in CASES:
            for each in asked(case, alert):
                if not each["exp_alerts"]:
                    answers.append(_holds(tmp_path, case, f"({there}) > bool 0", each["eval_time"]))
        assert any(answers), f"{alert}: {there}"


def _holds(folder: Path, case: dict[str, Any], expr: str, at: str) -> bool:
    """Whether `expr` is 1 at this time of a case."""
    wanted = {"expr": expr, "eval_time": at, "exp_samples": [{"labels": "{}", "value": 1}]}
    series = {key: value for key, value in case.items() if key in ("name", "interval", "input_series")}
    file = {
        "rule_files": [str(FOLDER / "rules" / "tracelet.yaml")],
        "evaluation_interval": "30s",
        "tests": [{**series, "promql_expr_test": [wanted]}],
    }
    path = folder / "one.yaml"
    path.write_text(yaml.safe_dump(file, allow_unicode=True))
    try:
        promtool("test", "rules", path)
    except AssertionError:
        return False
    return True


def test_every_alert_stands_on_its_page_and_is_provoked_in_a_real_prometheus() -> None:
    page = (REPOSITORY / "docs" / "guide" / "alerts.md").read_text()
    provoked = (Path(__file__).parent / "test_alerts_firing.py").read_text()
    assert {name for name in ALERTS if f"| `{name}` |" not in page} == set()
    assert {name for name in ALERTS if f'"{name}"' not in provoked} == set()
