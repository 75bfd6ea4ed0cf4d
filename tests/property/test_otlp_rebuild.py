"""A run can be rebuilt from its OTLP alone: whatever was logged, in whatever batches, is read back equal."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.otlp_batches import MS, RUN, START, opened
from tests.otlp_decode import Artifact, Attempt, Sample, decode
from tests.sinks import REQUESTS
from tracelet import ids
from tracelet.otlp.encode import fitting
from tracelet.otlp.plan import Ledger, plan
from tracelet.records import (
    FINISHED,
    ArtifactLogged,
    AttemptEnded,
    Batch,
    ErrorInfo,
    ParamsLogged,
    Part,
    PointBatch,
    Record,
    RunStarted,
    Scalar,
    SpanEnded,
    SpanStarted,
    TagsSet,
)

CALLER = "00-" + "c" * 32 + "-" + "d" * 16 + "-01"
END = START + 10**12
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=12)
LONG = st.one_of(TEXT, st.builds(lambda text, times: text * times, TEXT, st.integers(1, 9_000)))
SCALAR = st.one_of(LONG, st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.booleans())
POINT = st.tuples(TEXT, st.floats(allow_nan=False), st.integers(-(2**63), 2**63 - 1), st.booleans())
ERROR = st.builds(ErrorInfo, TEXT, LONG, LONG)
RECORD = st.one_of(
    st.builds(ParamsLogged, st.just(START), st.dictionaries(TEXT, SCALAR, min_size=1, max_size=60)),
    st.builds(TagsSet, st.just(START), st.dictionaries(TEXT, LONG, min_size=1, max_size=5)),
    st.builds(
        ArtifactLogged,
        st.just(START),
        TEXT,
        TEXT.map(lambda name: "/data/" + name.replace("/", "_")),
        st.just("artifacts/1"),
        st.integers(0, 2**62),
        st.one_of(st.none(), st.just("ab" * 32)),
        st.just("text/plain"),
    ),
)


@dataclass
class Story:
    """What a program did: pieces of one writer or the other, in order, and how it ended."""

    pieces: list[tuple[int, list[tuple[str, float, int, bool]], list[Record]]]
    environment: dict[str, Scalar]
    mlflow_tags: dict[str, str]
    phases: list[tuple[str, dict[str, Scalar], ErrorInfo | None, bool]]  # name, attributes, error, whether it ended
    status: str
    error: ErrorInfo | None


STORIES = st.builds(
    Story,
    st.lists(
        st.tuples(st.integers(0, 1), st.lists(POINT, max_size=12), st.lists(RECORD, max_size=3)), min_size=1, max_size=4
    ),
    st.dictionaries(st.sampled_from(["process.pid", "tracelet.packages", "vcs.ref.head.name"]), SCALAR),
    st.dictionaries(st.sampled_from(["mlflow.user", "mlflow.source.name"]), LONG),
    st.lists(st.tuples(TEXT, st.dictionaries(TEXT, SCALAR, max_size=3), st.none() | ERROR, st.booleans()), max_size=3),
    st.sampled_from(["FINISHED", "FAILED", "KILLED"]),
    st.none() | ERROR,
)


def batches(story: Story) -> list[Batch]:
    """The story as the shipper would hand it over: two writers of one process, points a millisecond apart."""
    opening = opened()
    writers = ("w" * 16, "x" * 16)
    clock, series = START, {writer: {} for writer in writers}  # type: dict[str, dict[str, int]]
    params: dict[str, Scalar] = {}
    tags: dict[str, str] = {}
    root = ids.root_span_id(RUN.run_id, opening.attempt_key)
    spans: list[Record] = []
    still_open = []
    for number, (name, attributes, error, is_over) in enumerate(story.phases, 1):
        start = SpanStarted(f"{number:016x}", root, name, START + number, attributes)
        spans.append(start)
        if is_over:
            spans.append(SpanEnded(start.span_id, START + number + MS, error))
        else:
            still_open.append(start)
    made = []
    for number, (which, rows, records) in enumerate(story.pieces, 1):
        own = list(records)
        if number == 1:
            own = [RunStarted(START, RUN.run_name, story.environment, story.mlflow_tags, CALLER), *own, *spans]
        names = {name: i for i, name in enumerate(dict.fromkeys(row[0] for row in rows))}
        times = array("Q", [clock + i * MS for i in range(len(rows))])
        clock += len(rows) * MS
        points = PointBatch(
            {i: name for name, i in names.items()},
            times,
            array("d", [row[1] for row in rows]),
            array("q", [row[2] for row in rows]),
            array("I", [names[row[0]] for row in rows]),
            frozenset(i for i, row in enumerate(rows) if row[3]),
        )
        for row, time in zip(rows, times, strict=True):
            series[writers[which]][row[0]] = time
        for record in records:
            if isinstance(record, ParamsLogged):
                params |= record.params
            elif isinstance(record, TagsSet):
                tags |= record.tags
        made.append(Batch(number, RUN, "/nowhere", (Part(writers[which], opening, tuple(own), points),)))
    ended = AttemptEnded(
        story.status,
        START,
        END,
        True,
        None if story.status == FINISHED else story.error,
        params,
        tags,
        tuple(still_open),
        {writer: tuple(found.items()) for writer, found in series.items()},
    )
    none = PointBatch({}, array("Q"), array("d"), array("q"), array("I"))
    return [*made, Batch(len(made) + 1, RUN, "/nowhere", (Part(writers[0], opening, (ended,), none),))]


def on_the_wire(made: list[Batch]) -> list[tuple[str, Any]]:
    """Every request of these batches, each prepared with what the one before left behind."""
    ledger, requests = Ledger(), []
    for batch in made:
        planned = plan(batch, ledger)
        ledger = Ledger.from_json(planned.after.to_json())
        for load in planned.loads:
            for _, encoded in fitting(load):
                assert len(encoded) <= 900_000
                requests.append((load.signal, REQUESTS[load.signal].FromString(encoded)))
    return requests


@given(story=STORIES)
@settings(max_examples=60, deadline=None)
def test_a_run_is_rebuilt_from_its_otlp_alone(story: Story) -> None:
    made = batches(story)
    ended = made[-1].parts[0].records[0]
    assert isinstance(ended, AttemptEnded)
    opening = opened()
    found = decode(on_the_wire(made))
    assert set(found) == {ids.trace_id(RUN.run_id, opening.attempt_key)}
    (run,) = found.values()

    (resource,) = run.resources.values()
    assert resource == dict(opening.resource)  # run, project, experiment, attempt, rank
    samples: dict[str, list[Sample]] = {}
    clock = START
    for _, rows, _ in story.pieces:
        for name, value, iteration, dense in rows:
            samples.setdefault(name, []).append((clock, value, iteration, dense))
            clock += MS
    assert run.samples.get("instance-0", {}) == samples
    assert run.markers.get("instance-0", {}) == {name: rows[-1][0] + MS for name, rows in samples.items()}
    infinite = {name: sum(value - value != 0 for _, value, _, _ in rows) for name, rows in samples.items()}
    assert run.nonfinite == {name: count for name, count in infinite.items() if count}

    own_tags = {f"tracelet.mlflow.tag.{key}": value for key, value in story.mlflow_tags.items()}
    assert run.started == {**story.environment, **own_tags}
    assert (run.params, run.tags) == (ended.params, ended.tags)
    artifacts = [record for _, _, records in story.pieces for record in records if isinstance(record, ArtifactLogged)]
    assert run.artifacts == [Artifact(a.path, a.source, a.sha256, a.size, a.media_type) for a in artifacts]
    check_end(run, ended, story)
    check_spans(run, ended, story)


def check_end(run: Attempt, ended: AttemptEnded, story: Story) -> None:
    assert (run.status, run.ended["tracelet.run.state"], run.end) == (story.status, story.status, END)
    error = ended.error
    if error is not None:
        said = tuple(run.ended[f"exception.{field}"] for field in ("type", "message", "stacktrace"))
        assert said == (error.type, error.message, error.stacktrace)
    else:
        assert "exception.type" not in run.ended


def check_spans(run: Attempt, ended: AttemptEnded, story: Story) -> None:
    root_id = ids.root_span_id(RUN.run_id, "a" * 16)
    root = run.phases.pop(root_id)
    assert (root.parent, root.name, root.start, root.end) == ("", f"run {RUN.run_name}", START, END)
    if story.status == FINISHED:
        assert root.error_type is None
    else:
        assert root.error_type == (story.status if ended.error is None else ended.error.type)
    assert run.links == [("c" * 32, "d" * 16)]
    short = {key: value for key, value in ended.params.items() if not isinstance(value, str) or len(value) < 250}
    assert short.items() <= run.root_params.items()
    assert set(run.root_params) == set(ended.params)
    assert set(run.root_tags) == set(ended.tags)
    assert len(run.phases) == len(story.phases)
    for number, (name, attributes, error, is_over) in enumerate(story.phases, 1):
        phase = run.phases[f"{number:016x}"]
        assert (phase.parent, phase.name, phase.start) == (root_id, name, START + number)
        assert phase.end == (START + number + MS if is_over else END)
        assert dict(phase.attributes) == attributes
        if is_over:
            assert phase.error_type == (None if error is None else error.type)
            assert phase.exception == (None if error is None else (error.type, error.message, error.stacktrace))
        else:
            assert phase.error_type is not None
