"""The dashboards as TypeScript with Grafana's own types: the compiler says which field or word is none of Grafana's."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.stack.harness import lacking, program

HEAD = """
import type { Dashboard, Panel, FieldConfigSource, VariableModel } from '%(index)s';
import type { AnnotationQuery } from '%(index)s';
import type { DataTransformerConfig } from '%(index)s';
%(panels)s

// JSON has words where the types have enums; their words are what is compared.
type Plain<T> = T extends string ? `${T}`
  : T extends number | boolean | null | undefined ? T
  : T extends (infer U)[] ? Plain<U>[]
  : T extends object ? { [K in keyof T]: Plain<T[K]> }
  : T;
// Grafana's type has what all data sources share; these are what Prometheus and Loki add to an annotation.
type Annotation = Plain<AnnotationQuery> & { expr: string, step?: string, titleFormat?: string, textFormat?: string };
"""
OF_THE_SOURCE = ("expr", "step", "titleFormat", "textFormat")
KINDS = ("timeseries", "table", "stat", "logs", "xychart")


def check(dashboards: Mapping[str, dict[str, Any]], folder: Path) -> str:
    """What the compiler says of these dashboards; nothing, if all is well. Skips where compiler or types lack."""
    modules = program("grafana-schema")
    node = shutil.which("node")
    if node is None:
        lacking("there is no node on PATH to run the TypeScript compiler")
    assert node is not None
    (folder / "node_modules").symlink_to(modules)
    types = "@grafana/schema/dist/types/raw"
    panels = "".join(
        f"import type * as {kind} from './node_modules/{types}/composable/{kind}/panelcfg/x/types.gen';\n"
        for kind in KINDS
    )
    source = [HEAD % {"index": f"./node_modules/{types}/dashboard/x/types.gen", "panels": panels}]
    for number, dashboard in enumerate(dashboards.values()):
        shared = [
            {key: value for key, value in annotation.items() if key not in OF_THE_SOURCE}
            for annotation in dashboard["annotations"]["list"]
        ]
        whole = dashboard | {"annotations": {"list": shared}}
        source.append(f"export const d{number}: Plain<Dashboard> = {json.dumps(whole)};")
        source.append(_declared(f"d{number}", dashboard))
    (folder / "dashboards.ts").write_text("\n".join(source))
    options = ["--strict", "--noEmit", "--skipLibCheck", "--module", "esnext", "--moduleResolution", "bundler"]
    compiler = modules / "typescript" / "bin" / "tsc"
    done = subprocess.run(
        [node, str(compiler), *options, "--preserveSymlinks", "dashboards.ts"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0 or done.stdout, done.stderr
    return done.stdout


def _declared(name: str, dashboard: dict[str, Any]) -> str:
    """Each part that the dashboard's type leaves open (`panels` may be many things) as a constant of its own type."""
    lines = []
    for panel in dashboard["panels"]:
        one, kind = f"{name}p{panel['id']}", panel["type"]
        config = panel["fieldConfig"]
        lines += [
            f"export const {one}: Plain<Panel> = {json.dumps(panel)};",
            f"export const {one}o: Plain<{kind}.Options> = {json.dumps(panel['options'])};",
            f"export const {one}f: Plain<FieldConfigSource> = {json.dumps(config)};",
        ]
        if kind in ("timeseries", "xychart", "table"):
            custom = config["defaults"]["custom"]
            lines.append(f"export const {one}c: Partial<Plain<{kind}.FieldConfig>> = {json.dumps(custom)};")
        lines += [
            f"export const {one}t{i}: Plain<DataTransformerConfig> = {json.dumps(transformation)};"
            for i, transformation in enumerate(panel.get("transformations", []))
        ]
    lines += [
        f"export const {name}v{i}: Plain<VariableModel> = {json.dumps(variable)};"
        for i, variable in enumerate(dashboard["templating"]["list"])
    ]
    lines += [
        f"export const {name}a{i}: Annotation = {json.dumps(annotation)};"
        for i, annotation in enumerate(dashboard["annotations"]["list"])
    ]
    return "\n".join(lines)
