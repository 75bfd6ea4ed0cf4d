"""Names of attributes and the labels that Prometheus makes of them: the exporter and the real server have to agree."""

from __future__ import annotations

__all__ = ["LABEL_NAMES"]

LABEL_NAMES = {
    "host.name": "host_name",
    "a..b": "a__b",
    "two__": "two__",
    "Team-Lead": "Team_Lead",
    "x:y": "x_y",
    "1st": "key_1st",
    "_team": "key_team",
    ".dot": "key_dot",
    "__team": "__team",
    "._x": "__x",
    "é": "key_",
    "élan": "key_lan",
    "模型.size": "___size",
    "²nd": "key_nd",
    "trailing/": "trailing_",
}
