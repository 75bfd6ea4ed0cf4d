"""One batch on its way to MLflow, step by step: the run, params, tags, metrics, artifacts, the end.

Each step is remembered once done, so a later attempt goes on where this one stopped. Metric rows are the one thing
that must never be sent while they may be stored (one stored row makes MLflow compare the whole batch with the whole
run: 19 s at a million rows); after an unclear answer or a restart their witness is looked up first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tracelet.exporters.base import Answer, Delivered, Refusal, Rejected, RetryLater
from tracelet.exporters.mlflow.artifacts import ArtifactStore
from tracelet.exporters.mlflow.letters import as_logged
from tracelet.exporters.mlflow.limits import (
    EXPERIMENT_NAME_CHARS,
    PARAMS_PER_REQUEST,
    RUN_NAME_CHARS,
    TAG_VALUE_CHARS,
    TAGS_PER_REQUEST,
)
from tracelet.exporters.mlflow.mapping import (
    ATTEMPT_TAG,
    PROJECT_TAG,
    RUN_NAME_TAG,
    RUN_TAG,
    STATE_TAG,
    Plan,
    attempt_mark,
    attempt_order,
    changed_param_tag,
    chunk_of,
    comparable,
    is_newer,
    is_older,
    legal_tags,
    marker_row,
    metric_rows,
    plan_of,
    reference_tag,
    witness_of,
)
from tracelet.exporters.mlflow.names import capped, encodable
from tracelet.exporters.mlflow.state import RunState, first_sign, starts_in
from tracelet.exporters.mlflow.traces import NO_TRACES, SpanWork
from tracelet.exporters.mlflow.transport import (
    MetricRow,
    NotNow,
    Refused,
    RunView,
    Transport,
    Unclear,
    first_of,
)
from tracelet.guard import guard
from tracelet.records import FAILED, FINISHED, KILLED, LOST, RUNNING, Again, AttemptEnded, Batch, Part, RunStarted

__all__ = ["MLflowDelivery"]

_PATIENCE_S = 10.0  # before asking what became of a request without an answer: the server may still be at it


class MLflowDelivery:
    """See `exporters.base.Delivery`."""

    def __init__(
        self,
        transport: Transport,
        artifacts: ArtifactStore,
        state: RunState,
        batch: Batch,
        note: Mapping[str, Any] | None,
    ) -> None:
        self._transport = transport
        self._artifacts = artifacts
        self._state = state
        self._batch = batch
        self._refusals: list[Refusal] = []
        self._rows = metric_rows(batch)
        self._note = dict(note) if note is not None else self._make_note()
        if self._note.get("marker"):
            self._rows.append(marker_row(batch, self._rows))
        self._unclear = note is not None  # whether the first of the chunks may be stored already
        self._chunks = [self._rows] if self._rows else []
        self._plan: Plan | None = None
        self._spans = SpanWork(())
        self._to_do: list[Callable[[Plan], None]] = [
            self._send_params,
            self._send_tags,
            self._send_metrics,
            self._send_spans,
            self._send_artifacts,
            self._send_state,
            self._send_end,
        ]

    @property
    def note(self) -> Mapping[str, Any]:
        """{"witness": [key, step, ms], "marker": whether that is a row of our own}, or {} without points."""
        return self._note

    def attempt(self) -> Answer:
        """Go on with what is left; see `exporters.base.Delivery`."""
        try:
            if self._plan is None:
                self._plan = self._prepare()
            while self._to_do:
                self._to_do[0](self._plan)
                del self._to_do[0]
        except NotNow as error:
            return RetryLater(error.reason, error.after_s, error.loud)
        except Refused as no:
            # Each step settles what it may refuse; this is an answer to a question (does the run exist?).
            return RetryLater(f"MLflow refuses what it never should: {no}", loud=True)
        return Rejected(as_logged(self._refusals, self._batch)) if self._refusals else Delivered()

    def _make_note(self) -> dict[str, Any]:
        if not self._rows:
            return {}
        witness = witness_of(self._rows, self._state.latest)
        row = witness or marker_row(self._batch, self._rows)
        return {"witness": [row[0], row[3], row[2]], "marker": witness is None}

    # ---- the run -------------------------------------------------------------------------------------------------

    def _prepare(self) -> Plan:
        state = self._state
        attempts = starts_in(self._batch)  # several in one batch, where the run was shipped only after a resume
        if state.view is None:
            self._make_run(*(attempts[0] if attempts else (self._batch.parts[0], None)))
        elif attempts and "mlflow.user" not in state.tags:
            # Made at a sign before its start: what a person has set meanwhile stays.
            state.tags.update((self._transport.run(state.view.run_id) or state.view).tags)
        ends = (record for part in self._batch.parts for record in part.records if isinstance(record, AttemptEnded))
        if any(end.error is not None for end in ends):
            # Whether that is the run's error: another host may have begun a newer attempt since this one was seen.
            now = self._transport.run(self._run_id)
            if now is not None and ATTEMPT_TAG in now.tags:
                state.tags[ATTEMPT_TAG] = now.tags[ATTEMPT_TAG]
        # Not only by its start: over a wire an attempt may show itself by anything else first.
        for part in sorted(self._batch.parts, key=lambda part: attempt_order(part.opened)):
            self._resume(part)
        plan = plan_of(self._batch, self._rows, state.params, state.tags)
        self._refusals.extend(plan.refusals)
        for part in self._batch.parts:
            texts = (record.facts for record in part.records if isinstance(record, Again) and "text" in record.facts)
            plan.texts.update((str(facts["path"]), str(facts["text"])) for facts in texts)
        self._spans = SpanWork(plan.spans)
        self._refusals.extend(self._spans.refusals)
        self._spans.refusals.clear()
        return plan

    def _make_run(self, part: Part, started: RunStarted | None) -> None:
        state, transport = self._state, self._transport
        if state.create_is_unclear:
            found = self._earliest()
            state.create_is_unclear = False
            if found is not None:
                state.learn(found)
                return
        own = dict(started.mlflow_tags) if started is not None else {}
        own.pop("mlflow.runName", None)  # MLflow sets it from the run's name, and refuses two that differ
        tags = {**legal_tags(own), RUN_TAG: state.info.run_id, ATTEMPT_TAG: attempt_mark(part.opened)}
        # Without a name the run gets its id for one, by which a later start knows that nobody has named it.
        name = encodable((started.run_name if started is not None else "") or state.info.run_name or state.info.run_id)
        short = capped(name, RUN_NAME_CHARS)
        if short != name:
            tags[RUN_NAME_TAG] = name[:TAG_VALUE_CHARS]
        if len(state.info.project) > EXPERIMENT_NAME_CHARS:
            tags[PROJECT_TAG] = encodable(state.info.project)[:TAG_VALUE_CHARS]
        try:
            made = transport.create_run(
                state.experiment_id,
                own.get("mlflow.user", "unknown"),
                first_sign(self._batch) // 1_000_000,
                short,
                tags,
            )
        except Unclear as error:
            state.create_is_unclear = True
            error.after_s = _PATIENCE_S if error.after_s is None and error.may_be_running else error.after_s
            raise
        except Refused as no:
            raise NotNow(f"MLflow refuses to create a run in experiment {state.experiment_id}: {no}", loud=True) from no
        state.create_is_unclear = True  # until it is known to be the only one: nothing is sent before
        first = self._earliest() or made
        if first.run_id != made.run_id:
            self._give_up(made)
            self._unclear = True
        else:
            self._unclear = False  # a new run holds nothing of this batch
        state.learn(first)
        state.create_is_unclear = False

    def _earliest(self) -> RunView | None:
        """The run with our tag. Of several (made at the same moment, or by a create that came late) all take this."""
        state, transport = self._state, self._transport
        run = first_of(transport.runs_with_tag(state.experiment_id, RUN_TAG, state.info.run_id))
        return transport.run(run.run_id) if run is not None else None

    def _give_up(self, made: RunView) -> None:
        """Delete a run of ours that holds nothing yet, since another of the same tag was first."""
        try:
            self._transport.delete_run(made.run_id)
        except Refused as no:
            guard.limited("mlflow twin", "the empty twin %s of a run stays in MLflow: %s", made.run_id, no)

    def _resume(self, part: Part) -> None:
        """A new attempt of a known run: RUNNING again, as start_run(run_id=...) does; an old one changes nothing."""
        if not is_older(self._state.tags.get(ATTEMPT_TAG), part.opened):
            return
        mark = attempt_mark(part.opened)
        try:
            self._transport.update_run(self._run_id, RUNNING, None)
            self._transport.log_tags(self._run_id, [(ATTEMPT_TAG, mark)])
        except Refused as no:
            self._check_run(no)
            raise NotNow(f"MLflow refuses to resume run {self._run_id}: {no}", loud=True) from no
        self._state.tags[ATTEMPT_TAG] = mark
        self._found()

    def _found(self) -> None:
        """Whoever told that the run is LOST knew of none that begins, or ends, now."""
        if STATE_TAG in self._state.tags:
            self._transport.delete_tag(self._run_id, STATE_TAG)
            self._state.tags.pop(STATE_TAG, None)

    @property
    def _run_id(self) -> str:
        if self._state.view is None:
            raise RuntimeError("a step ran before the run was made")
        return self._state.view.run_id

    def _check_run(self, no: Refused) -> RunView:
        """The run as it is now; a deleted or vanished one is the reason for `no`, and nothing to bisect."""
        view = self._transport.run(self._run_id)
        if view is None or view.deleted:
            what = "is gone from" if view is None else "is deleted in"
            raise NotNow(
                f"run {self._run_id} {what} MLflow ({no}): restore it (`mlflow runs restore --run-id {self._run_id}`);"
                " the data waits in the spool",
                loud=True,
            ) from no
        return view

    # ---- params and tags -----------------------------------------------------------------------------------------

    def _send_params(self, plan: Plan) -> None:
        while plan.params:
            self._send_pairs(chunk_of(plan.params, PARAMS_PER_REQUEST), plan.params, self._send_params_once, plan)

    def _send_tags(self, plan: Plan) -> None:
        while plan.tags:
            self._send_pairs(chunk_of(plan.tags, TAGS_PER_REQUEST), plan.tags, self._send_tags_once, plan)

    def _send_params_once(self, pairs: Sequence[tuple[str, str]]) -> None:
        self._transport.log_params(self._run_id, pairs)
        self._state.params.update(pairs)

    def _send_tags_once(self, pairs: Sequence[tuple[str, str]]) -> None:
        self._transport.log_tags(self._run_id, pairs)
        self._state.tags.update(pairs)

    def _send_pairs(
        self,
        pairs: Sequence[tuple[str, str]],
        waiting: dict[str, str],
        send: Callable[[Sequence[tuple[str, str]]], None],
        plan: Plan,
    ) -> None:
        try:
            send(pairs)
        except Refused as no:
            if len(pairs) > 1:
                self._check_run(no)
                middle = len(pairs) // 2
                self._send_pairs(pairs[:middle], waiting, send, plan)
                self._send_pairs(pairs[middle:], waiting, send, plan)
                return
            self._settle_refused(pairs[0], waiting is plan.params, plan, no)
        for key, _ in pairs:
            waiting.pop(key, None)

    def _settle_refused(self, pair: tuple[str, str], is_param: bool, plan: Plan, no: Refused) -> None:
        key, value = pair
        stored = self._check_run(no).params.get(key) if is_param else None
        if stored is None:
            self._refusals.append(Refusal("param" if is_param else "tag", str(no), {"key": key, "value": value}))
            return
        # Somebody else (a user's mlflow.log_param, another host) was first; MLflow keeps that, ours becomes a tag.
        self._state.params[key] = stored
        if stored != value:
            plan.tags.setdefault(changed_param_tag(key), value)

    # ---- metrics -------------------------------------------------------------------------------------------------

    def _send_metrics(self, plan: Plan) -> None:
        while self._chunks:
            rows = self._chunks[0]
            if self._unclear and self._is_stored(rows):
                self._chunk_done()
                continue
            self._unclear = False
            try:
                self._transport.log_metrics(self._run_id, rows)
            except Unclear as error:
                self._unclear = True
                error.after_s = _PATIENCE_S if error.after_s is None and error.may_be_running else error.after_s
                raise
            except Refused as no:
                self._check_run(no)
                self._split(rows, no)
                continue
            self._chunk_done()

    def _chunk_done(self) -> None:
        self._state.stored(self._chunks.pop(0))
        self._unclear = False

    def _is_stored(self, rows: Sequence[MetricRow]) -> bool:
        """Whether `rows` arrived, by their witness: metrics and latest values commit together."""
        witness = self._witness_in(rows)
        view = self._transport.run(self._run_id)
        if view is None or witness is None:
            return False  # without a witness (parts of a split batch) a repeat only costs time
        self._state.latest = dict(view.latest)
        key, value, ms, step = witness
        held = view.latest.get(key)
        ours = (step, ms, comparable(value))
        if held is None or held < ours:
            return False
        # Higher than ours: somebody else wrote this key (MLflow's own client, another host). Look for the row itself.
        return held == ours or self._transport.has_metric_row(self._run_id, witness)

    def _witness_in(self, rows: Sequence[MetricRow]) -> MetricRow | None:
        key, step, ms = self._note.get("witness", (None, 0, 0))
        for row in rows:
            if (row[0], row[3], row[2]) == (key, step, ms):
                return row
        return None

    def _split(self, rows: list[MetricRow], no: Refused) -> None:
        """Halve refused rows until the bad ones stand alone; the witness goes last, so that it speaks for all."""
        if len(rows) == 1:
            key, value, ms, step = rows[0]
            facts = {"key": key, "value": value, "timestamp_ms": ms, "step": step}
            self._refusals.append(Refusal("point", str(no), facts))
            del self._chunks[0]
            return
        witness = self._witness_in(rows)
        ordered = [row for row in rows if row is not witness] + ([witness] if witness is not None else [])
        middle = len(ordered) // 2
        self._chunks[:1] = [ordered[:middle], ordered[middle:]]

    # ---- artifacts and the end -----------------------------------------------------------------------------------

    def _send_artifacts(self, plan: Plan) -> None:
        uri = self._state.view.artifact_uri if self._state.view is not None else ""
        while plan.texts:
            path, text = next(iter(plan.texts.items()))
            self._refuse(self._artifacts.put_text(uri, path, text))
            del plan.texts[path]
        while plan.artifacts:
            artifact, event = plan.artifacts[0]
            if artifact.uri is None:
                self._refuse(self._artifacts.put(uri, self._batch.folder, artifact))
            else:
                why, refusal = self._artifacts.put_received(uri, self._batch.run.run_id, artifact, event)
                self._refuse(refusal)
                if why is not None:
                    plan.tags[reference_tag(artifact.path)] = f"{artifact.uri} ({why})"[:TAG_VALUE_CHARS]
            del plan.artifacts[0]
        self._send_tags(plan)

    def _send_spans(self, plan: Plan) -> None:
        state, run_id = self._state, self._run_id
        if not plan.spans or state.takes_no_spans:
            return
        try:
            self._spans.send(self._transport, state.experiment_id, run_id, self._check_run)
        except Refused as no:
            if no.code != NO_TRACES:
                raise
            state.takes_no_spans = True
            self._refuse(self._spans.give_up(f"{no.message}; this run's spans are left out from here on"))
        self._refusals.extend(self._spans.refusals)
        self._spans.refusals.clear()

    def _send_state(self, plan: Plan) -> None:
        """LOST is a tag and no end: whatever was said later takes it away, be it in an earlier batch."""
        noted = plan.state
        if noted is None or noted.time_unix_nano < self._state.noted_unix_nano:
            return
        try:
            if noted.state == LOST:
                self._send_tags_once([(STATE_TAG, LOST)])
            else:
                self._transport.delete_tag(self._run_id, STATE_TAG)
                self._state.tags.pop(STATE_TAG, None)
        except Refused as no:
            self._check_run(no)
            self._refuse(Refusal("tag", str(no), {"key": STATE_TAG, "value": noted.state}))
        self._state.noted_unix_nano = noted.time_unix_nano

    def _refuse(self, refusal: Refusal | None) -> None:
        if refusal is not None:
            self._refusals.append(refusal)

    def _send_end(self, plan: Plan) -> None:
        ended = plan.ended
        if ended is None or not ended.newest or ended.status not in (FINISHED, FAILED, KILLED):
            return
        part = next(part for part in self._batch.parts if ended in part.records)
        view = self._transport.run(self._run_id)
        if view is not None and is_newer(view.tags.get(ATTEMPT_TAG), part.opened):
            return  # a newer attempt, shipped from elsewhere, has the run now
        try:
            if view is not None:
                self._state.tags.update({STATE_TAG: LOST} if STATE_TAG in view.tags else {})
            self._found()
            # A clock set back between two attempts must not end the run before its first one began.
            end = max(ended.end_unix_nano // 1_000_000, 0 if view is None else view.start_time)
            self._transport.update_run(self._run_id, ended.status, end)
        except Refused as no:
            self._check_run(no)
            self._refusals.append(Refusal("event", str(no), {"status": ended.status, "end": ended.end_unix_nano}))
