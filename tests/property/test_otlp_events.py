"""Whatever is logged can be read back from the events, and no event is larger than a log backend takes."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from google.protobuf.json_format import ParseDict
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from tests.otlp_batches import RUN, START, points
from tests.sinks import attributes
from tracelet.otlp import semconv
from tracelet.otlp.encode import PointsLoad, resource_bytes
from tracelet.otlp.encode_json import json_line
from tracelet.otlp.encode_points import wire_text
from tracelet.otlp.events import Position, events_of
from tracelet.records import ParamsLogged

WHERE = Position("1" * 32, "2" * 16)
TEXTS = st.one_of(
    st.text(max_size=50),
    st.builds(lambda text, times: text * times, st.text(min_size=1, max_size=20), st.integers(1, 6_000)),
)
VALUES = st.one_of(TEXTS, st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.booleans())
PARAMS = st.dictionaries(st.text(min_size=1, max_size=30), VALUES, max_size=120)


def read_back(records: list[Any]) -> dict[str, Any]:
    """The params of a run, from its events alone."""
    short: dict[str, Any] = {}
    digests: dict[str, str] = {}
    chunks: dict[str, dict[int, str]] = {}
    for record in records:
        values = attributes(record)
        key = values.get(semconv.CHUNK_KEY)
        if key is not None:
            chunks.setdefault(key, {})[values[semconv.CHUNK_INDEX]] = record.body.string_value
            digests[key] = values[semconv.CHUNK_DIGEST]
            continue
        short |= {k: v for k, v in values.items() if k.startswith(semconv.PARAM_PREFIX)}
    for key, pieces in chunks.items():
        whole = "".join(pieces[index] for index in sorted(pieces))
        assert digests[key] == "sha256:" + hashlib.sha256(whole.encode()).hexdigest()
        assert whole.startswith(short[key])
        short[key] = whole
    return {key.removeprefix(semconv.PARAM_PREFIX): value for key, value in short.items()}


@given(params=PARAMS)
@settings(max_examples=150, deadline=None)
def test_params_are_read_back_whole_from_events_within_the_limits(params: dict[str, Any]) -> None:
    records = events_of(ParamsLogged(START, params), RUN, WHERE)
    assert read_back(records) == {wire_text(k): wire_text(v) if isinstance(v, str) else v for k, v in params.items()}
    for record in records:
        own = {k: v for k, v in attributes(record).items() if k.startswith(("tracelet.param.", "tracelet.digest."))}
        assert len(own) <= semconv.EVENT_MAX_ATTRIBUTES
        size = sum(len(k.encode()) + (len(v.encode()) if isinstance(v, str) else 8) for k, v in own.items())
        assert size <= semconv.EVENT_MAX_BYTES
        assert len(record.body.string_value.encode()) <= semconv.CHUNK_MAX_BYTES
        assert len(record.SerializeToString()) < 65_536


@given(
    rows=st.lists(
        st.tuples(
            st.text(max_size=10),
            st.one_of(st.floats(allow_nan=False), st.just(math.nan)),
            st.integers(-(2**63), 2**63 - 1),
        ),
        max_size=50,
    )
)
@settings(max_examples=100, deadline=None)
def test_a_line_of_json_is_the_same_message_as_the_protobuf(rows: list[tuple[str, float, int]]) -> None:
    load = PointsLoad.of(resource_bytes({"service.name": "vision", "n": 3}), points(rows))
    line = json_line(load)
    assert "\n" not in line
    parsed = ParseDict(json.loads(line), ExportMetricsServiceRequest())
    assert parsed.SerializeToString() == load.encode()
