"""Which value of a param or tag is the last one, when requests come in any order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from tracelet.records import ParamsLogged, Record, TagsSet

__all__ = ["Latest"]


class Latest:
    """The time of the newest word on each param and tag of a run.

    A run's root span tells all of them once more at its end, and may be here before the events that set them: what is
    older than what stands is left out, or it would be taken for a change.
    """

    def __init__(self) -> None:
        self._times: dict[tuple[type, str], int] = {}

    def learn(self, records: Iterable[Record]) -> None:
        """Take in what was stored before."""
        for record in records:
            self.newer(record)

    def newer(self, record: Record) -> Record | None:
        """The record without what is older than what stands; None where nothing is left of it."""
        if isinstance(record, ParamsLogged):
            params = {key: value for key, value in record.params.items() if self._is_newer(record, key)}
            return record if len(params) == len(record.params) else replace(record, params=params) if params else None
        if isinstance(record, TagsSet):
            tags = {key: value for key, value in record.tags.items() if self._is_newer(record, key)}
            return record if len(tags) == len(record.tags) else replace(record, tags=tags) if tags else None
        return record

    def _is_newer(self, record: ParamsLogged | TagsSet, key: str) -> bool:
        place = (type(record), key)
        if record.time_unix_nano < self._times.get(place, 0):
            return False
        self._times[place] = record.time_unix_nano
        return True
