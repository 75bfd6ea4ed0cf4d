"""The files of a batch on their way out beside OTLP: addresses decided before anything is sent, bytes before events.

The addresses stand in the batch's note, so that a repeat after a restart names the same ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from tracelet.exporters.artifact_place import NeverTaken, Place, Waiting
from tracelet.exporters.artifact_store import GATEWAY, STORE
from tracelet.exporters.base import Refusal
from tracelet.exporters.original import Changed, Original, place_of
from tracelet.exporters.otlp_wire import Reply
from tracelet.otlp import semconv
from tracelet.otlp.encode import EventsLoad, Load
from tracelet.otlp.encode_points import wire_text
from tracelet.records import ArtifactLogged, Batch

if TYPE_CHECKING:
    from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord

__all__ = ["Uploads", "with_addresses"]


@dataclass(frozen=True, slots=True)
class _Upload:
    artifact: ArtifactLogged  # with its digest
    at: str
    writer: str


class Uploads:
    """The files of one batch that are not at their place yet."""

    def __init__(self, place: Place | None, run_id: str) -> None:
        self._place = place
        self._run_id = run_id
        self._waiting: deque[_Upload] = deque()
        self.refusals: list[Refusal] = []

    def add(self, artifact: ArtifactLogged, at: str, writer: str) -> None:
        """One more, of this writer's."""
        self._waiting.append(_Upload(artifact, at, writer))

    def refuse(self, artifact: ArtifactLogged, reason: str, writer: str) -> None:
        """Its bytes don't go out, for good."""
        self.refusals.append(replace(refusal(artifact, reason), writer=writer))

    def put(self) -> Reply | None:
        """Send them; None once all are there or refused, else why not yet."""
        while self._waiting:
            upload = self._waiting[0]
            artifact = upload.artifact
            try:
                if self._place is None:
                    raise NeverTaken(f"its event names {artifact.uri}, but {STORE} and {GATEWAY} are no longer set")
                with open(upload.at, "rb") as file:
                    original = Original(file, artifact, upload.at)
                    original.check()
                    self._place.put(self._run_id, artifact.sha256 or "", artifact.path, original)
            except Waiting as error:
                return Reply("later", error.reason, after_s=error.after_s, loud=error.loud, elsewhere=True)
            except (Changed, NeverTaken) as error:
                self.refuse(artifact, str(error), upload.writer)
            except OSError as error:
                self.refuse(artifact, f"{upload.at} can't be read any more: {error}", upload.writer)
            self._waiting.popleft()
        return None

    def ready(self, load: Load) -> int:
        """How many of a load's items, from its first on, may leave: no file of theirs is still to be put."""
        if not self._waiting:
            return len(load)
        waiting = {(one.artifact.time_unix_nano, wire_text(one.artifact.path)) for one in self._waiting}
        items = load.items if isinstance(load, EventsLoad) else ()
        return next((at for at, item in enumerate(items) if _artifact_of(item) in waiting), len(load))


def _artifact_of(event: LogRecord) -> tuple[int, str] | None:
    if event.event_name != semconv.EVENT_ARTIFACT:
        return None
    paths = (pair.value.string_value for pair in event.attributes if pair.key == semconv.ARTIFACT_NAME)
    return event.time_unix_nano, next(paths, "")


def refusal(artifact: ArtifactLogged, reason: str) -> Refusal:
    """What is told of a file whose bytes don't go out; its event does, and says where the file was."""
    # The address is left out: it would say that the bytes are there.
    return Refusal("artifact", reason, asdict(replace(artifact, uri=None)))


def with_addresses(
    batch: Batch, place: Place | None, note: Mapping[str, Any] | None
) -> tuple[Batch, Uploads, dict[str, Any]]:
    """The batch with an address for each file that goes to `place`, the uploads, and what the note has to keep.

    Cost: a file that was taken as a reference is read once here, for its digest.
    """
    uploads = Uploads(place, batch.run.run_id)
    told: Mapping[str, Any] = (note or {}).get("artifacts", {})
    if place is None and not told:
        return batch, uploads, {}
    kept: dict[str, Any] = {}
    parts = []
    for at_part, part in enumerate(batch.parts):
        records = list(part.records)
        for at, record in enumerate(part.records):
            if not isinstance(record, ArtifactLogged) or record.uri is not None:
                continue
            key = f"{at_part}.{at}"
            decided = told.get(key) if note is not None else _decide(batch, part.writer_id, record, place, uploads)
            if decided is not None:
                kept[key] = decided
                named = replace(record, uri=decided[0], sha256=decided[1])
                uploads.add(named, place_of(record, batch.folder), part.writer_id)
                records[at] = named
        parts.append(replace(part, records=tuple(records)))
    return replace(batch, parts=tuple(parts)), uploads, {"artifacts": kept} if kept else {}


def _decide(
    batch: Batch, writer: str, record: ArtifactLogged, place: Place | None, uploads: Uploads
) -> list[str] | None:
    """Address and digest; None for a file that is not as it was: its event is a reference to where it stood."""
    if place is None:
        return None
    at = place_of(record, batch.folder)
    try:
        with open(at, "rb") as file:
            original = Original(file, record, at)
            original.check()
            sha256 = record.sha256 or original.sha256()
            original.check()
    except Changed as error:
        uploads.refuse(record, str(error), writer)
        return None
    except OSError as error:
        uploads.refuse(record, f"{at} can't be read any more: {error}", writer)
        return None
    return [place.uri(batch.run.run_id, sha256, record.path), sha256]
