"""Every name tracelet puts on the wire: scopes, metrics, events, attributes, and the one schema URL.

docs/reference/wire.md lists them with their meaning. A name here is a promise: a backend, a dashboard or
the gateway may look for it, so it changes only with `WIRE_VERSION`.
"""

from __future__ import annotations

WIRE_VERSION = "1.0"
"""`tracelet.wire.version` of the Resource; a reader takes every minor of the majors it knows."""

SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"
"""The one semantic-conventions version our standard names (`service.*`, `exception.*`, ...) are taken from."""

# ---- scopes: without a version, since some backends make a label of it and a run must keep its series ------------
SCOPE = "tracelet"  # the user's metrics, the run's spans and log events
RUN_SCOPE = "tracelet.run"  # what tracelet itself says about a run: state, heartbeat, counters

# ---- Resource ---------------------------------------------------------------------------------------------------
SERVICE_NAME = "service.name"
SERVICE_INSTANCE_ID = "service.instance.id"
HOST_NAME = "host.name"
PROJECT = "tracelet.project"
EXPERIMENT_NAME = "tracelet.experiment.name"
RUN_ID = "tracelet.run.id"
RUN_NAME = "tracelet.run.name"
RUN_ATTEMPT = "tracelet.run.attempt"
ATTEMPT_ORDER = (
    "tracelet.run.attempt.order"  # int, ns: the newest attempt of a run has the greatest, whatever clocks say
)
RANK = "tracelet.rank"
RESOURCE_WIRE_VERSION = "tracelet.wire.version"

# ---- points -----------------------------------------------------------------------------------------------------
ITERATION = "tracelet.iteration"  # int: what MLflow calls a step
DENSE = "tracelet.dense"  # bool, only ever true: shares its millisecond with a neighbour, Prometheus can't take it
METRIC_KEY = "tracelet.metric.key"  # the user's name of a metric, where the metric's own name is another
# What Prometheus has of the Resource on every point: set by the collector's transform, or by the backend `prometheus`.
LABELS = (RUN_ID, RUN_NAME, RANK, RUN_ATTEMPT)

# ---- metrics of scope tracelet.run ------------------------------------------------------------------------------
RUN_INFO = "tracelet.run.info"
RUN_STATUS = "tracelet.run.status"
RUN_HEARTBEAT = "tracelet.run.heartbeat"
LAST_ITERATION_TIME = "tracelet.run.last_iteration.time"
RUN_START_TIME = "tracelet.run.start.time"
ATTEMPT_START_TIME = "tracelet.run.attempt.start.time"
NONFINITE = "tracelet.metric.nonfinite"

STATE = "tracelet.run.state"
STATES = ("RUNNING", "FINISHED", "FAILED", "KILLED", "LOST")
ATTEMPT_STARTED = "tracelet.run.attempt.start"  # int, ns since the epoch
TRACE_ID = "tracelet.run.trace_id"
MLFLOW_RUN_ID = "tracelet.mlflow.run_id"

# ---- log events: the EventName, and the same again as this attribute (Loki shows no EventName) ------------------
EVENT = "tracelet.event"
EVENT_STARTED = "tracelet.run.started"
EVENT_ENDED = "tracelet.run.ended"
EVENT_PARAMS = "tracelet.params"
EVENT_TAGS = "tracelet.tags"
EVENT_ARTIFACT = "tracelet.artifact"
EVENT_SPAN = "tracelet.span"  # only in pieces: what a phase's span has no room for

EVENT_PART = "tracelet.event.part"  # int from 1, where one record became several events
EVENT_PARTS = "tracelet.event.parts"

# ---- params, tags, and values that are too long for an attribute ------------------------------------------------
PARAM_PREFIX = "tracelet.param."
TAG_PREFIX = "tracelet.tag."
MLFLOW_TAG_PREFIX = "tracelet.mlflow.tag."  # + a tag that MLflow's own client would have set (user, source, commit)
DIGEST_PREFIX = "tracelet.digest."  # + the attribute's name without "tracelet.": sha256 of the whole value
CHUNK_KEY = "tracelet.chunk.key"  # the attribute whose value the body is a piece of
CHUNK_INDEX = "tracelet.chunk.index"  # int from 1
CHUNK_COUNT = "tracelet.chunk.count"
CHUNK_DIGEST = "tracelet.chunk.digest"  # of the whole value
PARAMS_OMITTED = "tracelet.params.omitted"  # int: params the root span has no room for; the events have them

# ---- artifacts --------------------------------------------------------------------------------------------------
ARTIFACT_NAME = "tracelet.artifact.name"
ARTIFACT_URI = "tracelet.artifact.uri"
ARTIFACT_DIGEST = "tracelet.artifact.digest"
ARTIFACT_SIZE = "tracelet.artifact.size"
ARTIFACT_MEDIA_TYPE = "tracelet.artifact.media_type"

# ---- errors, by OpenTelemetry's own names -----------------------------------------------------------------------
ERROR_TYPE = "error.type"
EXCEPTION_EVENT = "exception"
EXCEPTION_TYPE = "exception.type"
EXCEPTION_MESSAGE = "exception.message"
EXCEPTION_STACKTRACE = "exception.stacktrace"

# ---- limits -----------------------------------------------------------------------------------------------------
# Loki refuses a record with more than 128 entries or 64 kB, resource included, and collectors add 20 of their own.
EVENT_MAX_ATTRIBUTES = 50
EVENT_MAX_BYTES = 16_000
VALUE_MAX_BYTES = 2_000  # a longer value stands as its beginning and its digest, and whole in chunks
VALUE_KEPT_CHARACTERS = 256
CHUNK_MAX_BYTES = 32_000
# A request has to pass Kafka's record limit (1 MB) and gRPC's receive limit (4 MiB); uncompressed bytes.
REQUEST_MAX_BYTES = 900_000
# What a collector makes of a request for Prometheus: labels on every point, and a companion. Its queue may be as small
# as 16 MB, where a larger one is a 503 for ever; and Prometheus takes no OTLP body above 32 MiB, with a 400, which is
# final. 16,000 points come to 8 MB with short names, and reach this with 120 characters of key and run name.
LABELLED_MAX_BYTES = 12_000_000
SPAN_PARAMS_MAX_BYTES = 256_000  # beyond it a param stands on the root span as its beginning and its digest
SPAN_PARAMS_CUT_MAX_BYTES = 600_000  # beyond it not at all, and is counted
EXCEPTION_MAX_BYTES = 64_000  # of each text of an exception on a span; with all params it still fits a request
EXCEPTION_KEPT_CHARACTERS = 8_000
