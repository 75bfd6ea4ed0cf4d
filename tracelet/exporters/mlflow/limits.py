"""What MLflow takes at most: each limit by name, with where MLflow has it from.

Sources are files of the mlflow package (3.17), read and tried against a real server: at the limit and one beyond.
"""

from __future__ import annotations

__all__ = [
    "ARTIFACT_PATH_BYTES",
    "EXPERIMENT_NAME_CHARS",
    "KEY_CHARS",
    "MARKED_NAME_CHARS",
    "METRICS_PER_REQUEST",
    "PARAMS_PER_REQUEST",
    "PARAM_VALUE_CHARS",
    "POINTS_PER_BATCH",
    "REQUEST_BYTES",
    "RUN_NAME_CHARS",
    "SQL_INFINITY",
    "TAGS_PER_REQUEST",
    "TAG_VALUE_CHARS",
]

METRICS_PER_REQUEST = 1000  # utils/validation.py MAX_METRICS_PER_BATCH, also MAX_ENTITIES_PER_BATCH
POINTS_PER_BATCH = METRICS_PER_REQUEST - 1  # one place is kept for the marker that proves a batch's arrival
PARAMS_PER_REQUEST = 100  # utils/validation.py MAX_PARAMS_TAGS_PER_BATCH
TAGS_PER_REQUEST = 100  # the same constant; a limit of its own for params and for tags
REQUEST_BYTES = 900_000  # utils/validation.py MAX_BATCH_LOG_REQUEST_SIZE is 1 MB; nginx's default body limit is 1 MiB

KEY_CHARS = 250  # utils/validation.py MAX_ENTITY_KEY_LENGTH: metric, param and tag keys; longer is an error
MARKED_NAME_CHARS = 200  # ours: a changed name is kept short enough for the tag that holds the original
PARAM_VALUE_CHARS = 6000  # utils/validation.py MAX_PARAM_VAL_LENGTH; longer is cut silently by the server
TAG_VALUE_CHARS = 8000  # utils/validation.py MAX_TAG_VAL_LENGTH; longer is cut silently by the server
RUN_NAME_CHARS = 250  # store/tracking/dbmodels/models.py SqlRun.name
EXPERIMENT_NAME_CHARS = 256  # store/tracking/dbmodels/models.py SqlExperiment.name (validation.py would take 500)

ARTIFACT_PATH_BYTES = 255  # each part of the path: NAME_MAX of the usual file systems

# store/tracking/sqlalchemy_store.py sanitize_metric_value: SQL has no infinity, MLflow writes the largest double.
SQL_INFINITY = 1.7976931348623157e308
