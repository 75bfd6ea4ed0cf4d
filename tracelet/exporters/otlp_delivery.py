"""One batch on its way to an OTLP receiver: what went, what waits, and what the receiver will never take.

A request that is refused is halved until the items at fault stand alone, so that they alone are given up. What was
acknowledged is not sent again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tracelet.exporters.base import Answer, Delivered, Refusal, Rejected, RetryLater
from tracelet.exporters.otlp_artifacts import Uploads
from tracelet.exporters.otlp_wire import Reply
from tracelet.guard import guard
from tracelet.otlp import semconv
from tracelet.otlp.encode import Load, swells

__all__ = ["OtlpDelivery"]

_FAULTS_BEFORE_DOUBT = 5  # so many 500s for one request, and it is looked into


@dataclass(slots=True)
class _Job:
    load: Load
    faults: int = 0  # 500s in a row


class OtlpDelivery:
    """Sends the loads of a batch in order, through `send`.

    `uploads` are the files that have to be at their place before an event leaves; points and spans don't wait for them.
    `control(signal)` repeats a request that passed before, and tells whether it is answered now.
    """

    def __init__(
        self,
        loads: Sequence[Load],
        note: Mapping[str, Any],
        send: Callable[[str, bytes], Reply],
        control: Callable[[str], bool],
        done: Callable[[], None],
        *,
        uploads: Uploads | None = None,
    ) -> None:
        self._jobs = deque(_Job(load) for load in loads)
        self._note = note
        self._send = send
        self._control = control
        self._done = done
        self._uploads = uploads
        self._held_up: Reply | None = None  # in this attempt, why not all files are at their place
        self._refusals: list[Refusal] = []

    @property
    def note(self) -> Mapping[str, Any]:
        """What a repeat after a restart needs to make the same bytes."""
        return self._note

    def attempt(self) -> Answer:
        """Send what is still to be sent."""
        aside: list[_Job] = []
        later: RetryLater | None = None
        blocked: set[str] = set()
        self._held_up = None
        while self._jobs:
            job = self._jobs[0]
            if job.load.signal in blocked:
                aside.append(self._jobs.popleft())
                continue
            if swells(job.load):
                self._halve()
                continue
            encoded, ready = job.load.encode(), self._ready(job.load)
            if len(job.load) > 1 and (len(encoded) > semconv.REQUEST_MAX_BYTES or 0 < ready < len(job.load)):
                self._halve()
                continue
            held_up = self._held_up if ready == 0 else None
            reply = held_up or self._send(job.load.signal, encoded)
            if reply.kind == "later":
                later = self._worst(later, reply)
                if not reply.elsewhere:
                    break  # the receiver itself is not there, or not for us
                blocked.add(job.load.signal)  # the other signals have addresses of their own
            elif reply.kind == "fault":
                self._jobs.popleft()
                if not self._doubt(job, reply):
                    aside.append(job)
                    later = self._worst(later, reply)
            else:
                self._settle(job, reply)
        self._jobs.extendleft(reversed(aside))
        if self._jobs:
            return later or RetryLater("requests are left to be sent")
        self._done()
        if self._uploads is not None:
            self._refusals.extend(self._uploads.refusals)
        return Rejected(tuple(self._refusals)) if self._refusals else Delivered()

    def _ready(self, load: Load) -> int:
        """How many of a load's items may leave now: where a gateway has no more room, what it has makes some only once
        the events of that are delivered."""
        if self._uploads is None or load.signal != "logs":
            return len(load)
        if self._held_up is None:
            self._held_up = self._uploads.put()
        return len(load) if self._held_up is None else self._uploads.ready(load)

    @staticmethod
    def _worst(so_far: RetryLater | None, reply: Reply) -> RetryLater:
        """What the shipper hears of several replies: the loud one, and the longest wait asked for."""
        new = RetryLater(reply.reason, reply.after_s, reply.loud)
        if so_far is None:
            return new
        waits = [wait for wait in (so_far.after_s, new.after_s) if wait is not None]
        loud = new if new.loud and not so_far.loud else so_far
        return RetryLater(loud.reason, max(waits) if waits else None, loud.loud)

    def _settle(self, job: _Job, reply: Reply) -> None:
        """An answer that is final for the first job: taken, taken in part, or refused as it stands."""
        if reply.kind == "accepted":
            self._jobs.popleft()
            if reply.rejected > 0:
                self._refuse(job.load, self._located(job.load, reply.rejected, reply.reason))
            elif reply.reason:
                guard.limited("otlp warning", "the OTLP receiver warns: %s", reply.reason)
        elif len(job.load) == 1:
            self._jobs.popleft()
            self._refuse(job.load, _refused(job.load, reply.reason))
        else:
            self._halve()

    def _halve(self) -> None:
        job = self._jobs.popleft()
        self._jobs.extendleft(_Job(half) for half in reversed(job.load.halves()))

    def _doubt(self, job: _Job, reply: Reply) -> bool:
        """After a 500: whether the request itself was looked into, so that it need not wait as it is.

        A 500 may be the server's trouble or this request's (Prometheus answers so to a name without a Latin letter).
        It is held to be the request's only where others are answered at the same moment.
        """
        job.faults += 1
        if job.faults < _FAULTS_BEFORE_DOUBT:
            return False
        if len(job.load) == 1:
            if not self._control(job.load.signal):
                return False
            self._refuse(job.load, _refused(job.load, reply.reason))
            return True
        sure = self._control(job.load.signal)
        halves = [(half, self._send(half.signal, half.encode())) for half in job.load.halves()]
        if not sure and not any(answer.kind == "accepted" for _, answer in halves):
            job.faults = 0  # the server's trouble, and the request stays whole
            return False
        for half, answer in reversed(halves):
            if answer.kind != "accepted":
                self._jobs.appendleft(_Job(half, _FAULTS_BEFORE_DOUBT - 1))
            elif answer.rejected > 0:
                self._refuse(half, self._located(half, answer.rejected, answer.reason))
        return True

    def _refuse(self, load: Load, refusals: Sequence[Refusal]) -> None:
        self._refusals.extend(replace(refusal, writer=load.writer) for refusal in refusals)

    def _located(self, load: Load, count: int, reason: str) -> list[Refusal]:
        """Name the items that a partial success rejected, by sending the halves again, where that tells.

        A repeat has no effect at a receiver that takes repeats. Where the counts of the halves don't add up (one that
        calls every repeat a duplicate), nothing more is sent, and all items that it may be are kept.
        """
        if count >= len(load):
            return _refused(load, reason)
        halves = load.halves()
        replies = [self._send(half.signal, half.encode()) for half in halves]
        if any(r.kind != "accepted" for r in replies) or sum(r.rejected for r in replies) != count:
            return [_not_told(load, count, reason)]
        return [
            refusal
            for half, answer in zip(halves, replies, strict=True)
            if answer.rejected
            for refusal in self._located(half, answer.rejected, answer.reason or reason)
        ]


def _refused(load: Load, reason: str) -> list[Refusal]:
    described = (load.describe(i) for i in range(len(load)))
    return [Refusal(what, reason or "rejected without a reason", facts) for what, facts in described]


def _not_told(load: Load, count: int, reason: str) -> Refusal:
    """`count` of the load's items are rejected, and not said which: all of them are kept, since some are nowhere else.

    One refusal, so that the counts stay right; the segment they stood in may be deleted once it is delivered.
    """
    described = [load.describe(i) for i in range(len(load))]
    facts = {"count": count, "of": len(load), "items": [item for _, item in described]}
    return Refusal(described[0][0], f"{reason or 'rejected without a reason'} (not said which)", facts)
