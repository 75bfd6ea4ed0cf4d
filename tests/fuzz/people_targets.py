"""What people and other programs write: settings, variables, tokens, headers, dead letters, a gateway's own files."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.fuzz.target import Target, folder
from tests.otlp_batches import START, opened
from tracelet import choice, settings
from tracelet.cli.find import UsageError, chosen
from tracelet.core import launchers
from tracelet.core.values import check_name, check_tags, flatten_params
from tracelet.errors import ConfigError, InvalidValue
from tracelet.exporters.base import Refusal
from tracelet.exporters.headers_file import headers_in
from tracelet.gateway import options
from tracelet.gateway.auth import Auth, read_tokens
from tracelet.gateway.limits import Refused
from tracelet.gateway.pieces import FILE as PIECES
from tracelet.gateway.pieces import Pieces
from tracelet.gateway.repeats import FILE as REPEATS
from tracelet.gateway.repeats import Repeats
from tracelet.otlp.arrival import Piece
from tracelet.otlp.plan import Ledger, plan
from tracelet.records import Again, RunInfo
from tracelet.shipper.deadletter import DeadLetters
from tracelet.shipper.reship import Reship, why_not

__all__ = ["PEOPLE_TARGETS"]

RUN = RunInfo("r", "p", "e", "n")


def _lines(data: bytes) -> list[str]:
    return data.decode("utf-8", "surrogateescape").split("\n")


def _variables(data: bytes) -> dict[str, str]:
    pairs = (line.partition("=") for line in _lines(data))
    return {name: value for name, equals, value in pairs if name and equals and "\0" not in name + value}


# ---- settings ----------------------------------------------------------------------------------------------------


def _environment(data: bytes) -> None:
    environ = _variables(data)
    with suppress(ConfigError):
        found = settings.resolve({}, {}, environ=environ, cwd=Path("/nowhere"), argv=["train.py"])
        chosen_ = choice.choose(
            found.backend, tracking_uri=found.tracking_uri, environ=environ, cwd=found.cwd, settings=found
        )
        json.dumps([dict(one) for one in chosen_.destinations])  # as the manifest keeps them
    launch = launchers.read(environ, lambda _: None)
    assert launch is None or 0 <= launch.rank < launch.world


def _pyproject(data: bytes) -> None:
    with folder() as made, suppress(ConfigError):
        (made / ".git").mkdir()
        (made / "pyproject.toml").write_bytes(data)
        settings.resolve({}, {}, environ={}, cwd=made, argv=["train.py"])


def _quantities(data: bytes) -> None:
    for text in _lines(data):
        for parse in (settings.parse_duration, settings.parse_size):
            with suppress(ValueError, ConfigError):
                assert 0 <= parse(text) < float("inf")
        for setting in settings.SETTINGS:
            with suppress(ValueError, ConfigError):
                setting.parse(text)


def _gateway_environment(data: bytes) -> None:
    with suppress(ConfigError):
        environ = _variables(data)
        found = options.resolve({}, environ)
        options.destination(found, environ)


def _names(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    for call in (check_name, lambda x: check_tags({x: x}), lambda x: flatten_params({x: {x: [x]}})):
        with suppress(InvalidValue):
            json.dumps(call(text), ensure_ascii=False).encode()


def _wanted(data: bytes) -> None:
    with folder() as made:
        for text in _lines(data):
            with suppress(UsageError):
                list(chosen(made, [text]))


# ---- secrets -----------------------------------------------------------------------------------------------------


def _tokens(data: bytes) -> None:
    with folder() as made:
        path = made / "tokens"
        path.write_bytes(data)
        with suppress(ConfigError):
            read_tokens(path)
            auth = Auth(path)
            for text in ("Bearer t", data.decode("latin-1")):
                with suppress(Refused):
                    auth.caller({"authorization": text})


def _headers(data: bytes) -> None:
    with folder() as made:
        path = made / "headers"
        path.write_bytes(data)
        with suppress(ValueError):
            found = headers_in(str(path))
            assert all(name == name.lower() and "\n" not in value for name, value in found.items())


# ---- dead letters ------------------------------------------------------------------------------------------------


def _dead_letters(data: bytes) -> None:
    with folder() as made:
        kept = DeadLetters(made, "d")
        kept.path.write_bytes(data)
        openings = kept.openings()
        for letter in kept.waiting():
            why_not(letter, openings)
            assert letter.count >= 0
        again = Reship(kept, wanted=True)
        assembled = again.next(RUN, str(made), 1, 1000)
        if assembled is not None:
            # A text in an artifact's place is MLflow's, in whose file no OTLP message stands.
            told = [r for part in assembled.batch.parts for r in part.records if isinstance(r, Again)]
            if all("message" in record.facts for record in told):
                for load in plan(assembled.batch, Ledger(), None).loads:
                    load.encode()
            resumed = Reship(kept, wanted=True).resume(RUN, str(made), 1, assembled.extra or {})
            assert repr(resumed.batch) == repr(assembled.batch)
            again.settle(assembled.extra or {}, ())
            kept.write(2, [Refusal("point", "no", {"name": "a"}, "w")], time_unix_nano=1, openings={"w": opened()})


def _letters_seed() -> bytes:
    with folder() as made:
        kept = DeadLetters(made, "d")
        facts: list[tuple[str, dict[str, Any]]] = [
            ("point", {"name": "a", "value": "NaN", "iteration": 1, "time_unix_nano": START, "dense": True}),
            ("param", {"key": "a", "value": 0.5}),
            ("tag", {"key": "a", "value": "b"}),
            ("event", {"status": "FAILED", "start_unix_nano": 1, "end_unix_nano": 2}),
            ("artifact", {"path": "a", "text": "b"}),
            ("point", {"items": [{"name": "a", "value": 1, "iteration": 1, "time_unix_nano": 1}]}),
        ]
        items = [Refusal(what, "no", one, "w") for what, one in facts]
        kept.write(1, items, time_unix_nano=START, openings={"w": opened()})
        return kept.path.read_bytes()


# ---- a gateway's files -------------------------------------------------------------------------------------------


def _pieces(data: bytes) -> None:
    with folder() as made:
        (made / PIECES).write_bytes(data)
        held = Pieces(made, Piece)
        try:
            before = held.unfinished
            taken = held.take("i", _piece(1))
            assert taken is None or held.unfinished <= before + 1
        finally:
            held.close()
        again = Pieces(made, Piece)
        again.close()


def _piece(index: int) -> Piece:
    return Piece("tracelet.params", "k", index, 2, "ab" * 32, "half", START, "")


def _pieces_seed() -> bytes:
    with folder() as made:
        held = Pieces(made, Piece)
        held.take("i", _piece(1))
        held.close()
        return (made / PIECES).read_bytes()


def _repeats(data: bytes) -> None:
    with folder() as made:
        (made / REPEATS).write_bytes(data)
        known = Repeats(made, remembered=4)
        known.add(b"x" * 16)
        known.write(known.take_unwritten())
        assert b"x" * 16 in Repeats(made, remembered=4)


VARIABLES = b"""TRACELET_BACKEND=otlp,mlflow
TRACELET_KEEP=1d,2GB
TRACELET_GRACE=25s
TRACELET_MAX_BYTES=1GB
OTEL_EXPORTER_OTLP_ENDPOINT=http://user:p@[::1]:4318/x?y=1
OTEL_EXPORTER_OTLP_HEADERS=a=b,c=%20d
MLFLOW_TRACKING_URI=sqlite:///x.db
WORLD_SIZE=4
RANK=3
SLURM_RESTART_COUNT=1"""
GATEWAY = b"""TRACELET_GATEWAY_MAX_BODY=1MB
TRACELET_GATEWAY_HOST=127.0.0.1
TRACELET_GATEWAY_HTTP_PORT=off
TRACELET_GATEWAY_MLFLOW=http://mlflow:5000"""
TOML = b"""[tool.tracelet]
backend = "file"
keep = "1d"
"""
TOKENS = b"""[[token]]
name = "a"
token = "t"
projects = ["*"]
expires = 2027-01-01T00:00:00Z
"""

PEOPLE_TARGETS: dict[str, Target] = {
    "variables": Target(_environment, (VARIABLES,)),
    "pyproject": Target(_pyproject, (TOML,)),
    "durations and sizes": Target(_quantities, (b"1d,500MB\n25s\n1e3\n-1\nnan\n1GiB",)),
    "gateway variables": Target(_gateway_environment, (GATEWAY,)),
    "names": Target(_names, ("损失/a b".encode(), b"\xed\xa0\x80")),
    "runs on the command line": Target(_wanted, (b"latest\n1f0c\n../x",)),
    "tokens": Target(_tokens, (TOKENS,)),
    "headers file": Target(_headers, (b"token", b"# a\nauthorization: Bearer x\nx-a: b")),
    "dead letters": Target(_dead_letters, (_letters_seed(),)),
    "pieces": Target(_pieces, (_pieces_seed(),)),
    "repeats": Target(_repeats, (bytes(range(64)),)),
}
