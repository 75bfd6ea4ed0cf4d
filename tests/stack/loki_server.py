"""A real Loki with the shipped file, on free ports, and what it has stored."""

from __future__ import annotations

import json
import os
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from tests.stack.collectors import CONFIG, Process, free_ports
from tests.stack.harness import program


class Loki(Process):
    """Loki with the file of collector-config/loki/."""

    def __init__(self, folder: Path) -> None:
        http, grpc = free_ports(2)
        self.at = f"http://127.0.0.1:{http}"
        environ = {
            "TRACELET_LOKI_HOST": "127.0.0.1",
            "TRACELET_LOKI_PORT": str(http),
            "TRACELET_LOKI_GRPC_PORT": str(grpc),
            "TRACELET_LOKI_DIR": str(folder / "data"),
            "PATH": os.environ.get("PATH", ""),
        }
        argv = [str(program("loki")), f"-config.file={CONFIG / 'loki/loki.yaml'}", "-config.expand-env=true"]
        super().__init__(folder, "loki", argv, environ, f"{self.at}/ready")

    def count(self, query: str, back: str = "1h") -> int:
        """How many events of a query are stored, of the last `back`."""
        result = self.ask("query", query=f"sum(count_over_time({query}[{back}]))", time=f"{time.time():.0f}")
        return int(float(result[0]["value"][1])) if result else 0

    def ask(self, call: str, **query: str) -> list[dict[str, Any]]:
        """The result of a query; a refusal raises."""
        with urllib.request.urlopen(
            f"{self.at}/loki/api/v1/{call}?{urllib.parse.urlencode(query)}", timeout=30
        ) as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return result
