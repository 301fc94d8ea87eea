"""Streaming training (RankGR 3.4): events to weights to a new champion, every hour, and nothing lost or trained on twice.

A step is made of the next entries of the stream. A checkpoint holds the weights, the optimizer, the replay buffer, the
timelines, the window of event ids and the position in the stream together; it is written between two steps and entries
are acknowledged after it is committed. A trainer that is killed goes on from there, over the same entries.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from components.retriever.bundle import Bundle
from components.retriever.packing import Row
from components.training.online import OnlineLearner, for_stream
from infra.config import Config
from infra.errors import ServiceError, TrainingError
from infra.event_stream import Event, EventStream
from infra.logs import get_logger
from infra.metrics import TRAINER, Meter
from serving.challenger import Challenger
from serving.checkpoints import Checkpoints
from serving.timelines import Past, Timelines

Release = Callable[[Mapping[str, Tensor], Mapping[str, Mapping[str, float]]], Bundle | None]
"""Weights and the figures they were judged by, to the bundle that is served now; None where it is another model's."""
_STREAM = "stream.json"
_BLOCK_MS = 500
_LINE_EVERY_S = 5.0
_LINEAGE = "lineage"


class StreamTrainer:
    """One trainer, the only one of its stream.

    Args:
        config: that the bundle was trained with, and `streaming`.
        bundle: the served model, which goes on learning.
        lineage: version of the bundle that this chain of updates began with; a checkpoint of another one gives its position
            in the stream only.
        stream: where events come from; put where the checkpoint says.
        checkpoints: where to go on from, and to.
        past: what users did before the stream.
        rows: that the model was trained on, for the replay buffer of a first start.
        release: makes weights the served ones.
        meter: counts.

    Attributes:
        learner: weights and counts.
        rollbacks: how often weights were taken back.

    Raises:
        ServiceError: by `run`, where Redis does not answer for `streaming.max_outage_s`.
        TrainingError: by `run`, after `streaming.max_rollbacks` in a row.
    """

    def __init__(
        self,
        config: Config,
        bundle: Bundle,
        *,
        lineage: str,
        stream: EventStream,
        checkpoints: Checkpoints,
        past: Past,
        rows: Callable[[], Iterable[Row]],
        release: Release,
        meter: Meter | None = None,
    ) -> None:
        self._config, self._settings, self._served, self._lineage = config, config.streaming, bundle, lineage
        self._stream, self._checkpoints, self._release = stream, checkpoints, release
        index = {item_id: number for number, item_id in enumerate(bundle.item_ids)}
        self._timelines = Timelines(index, past, for_stream(config))
        model = bundle.model().to("cuda" if config.training.use_gpu else "cpu")
        self.learner = OnlineLearner(model, config)
        self.rollbacks = self._in_a_row = 0
        self._is_own = False
        self._log, self._meter = get_logger("stream"), meter or Meter(TRAINER)
        self._waiting: list[Event] = []
        self._challenger: Challenger | None = None
        self._set_aside = 0
        self._synced_at = time.time()
        self._down_since: float | None = None
        if not checkpoints.load(self._restore) or not self._is_own:
            self.learner.replay.add(rows())
        self._set_aside = self.learner.steps
        self._saved_position, self._saved_at, self._calm_loss = stream.position, time.monotonic(), self.learner.loss
        self._stepped_at = self._saved_seen = self._counted = stream.seen
        self._refused = dict(stream.rejected)
        self._told, self._told_at = stream.seen, time.monotonic()
        self.checkpoint()  # what a rollback goes back to

    def _restore(self, folder: Path, metadata: Mapping[str, Any]) -> None:
        saved = json.loads((folder / _STREAM).read_text())
        self._stream.restore(saved["stream"])
        self._is_own = metadata[_LINEAGE] == self._lineage
        if not self._is_own:
            self._log.warning("another model became champion: training begins anew with it, at the same place of the stream")
            return
        self.rollbacks, self._synced_at = saved["rollbacks"], saved["synced_at"]
        self._timelines.load(folder)
        self.learner.load(folder)
        self._log.info("goes on from a checkpoint", position=self._stream.position, steps=self.learner.steps)

    def run(self, *, until_idle: float | None = None, max_events: int | None = None) -> bool:
        """Train on what comes.

        Args:
            until_idle: end when no entry came for this many seconds; None never does.
            max_events: end after so many entries.

        Returns:
            False where it ended since another model became champion.
        """
        first, moved_at, seen = self._stream.seen, time.monotonic(), self._stream.seen
        while True:
            left = self._settings.events_per_step - (self._stream.seen - self._stepped_at)
            if max_events is not None:
                left = min(left, first + max_events - self._stream.seen)
            self._waiting += self._read(max(left, 1))
            self._count()
            if self._stream.seen != seen or self._down_since is not None:
                moved_at, seen = time.monotonic(), self._stream.seen
            idle = time.monotonic() - moved_at
            ends = (until_idle is not None and idle >= until_idle) or (max_events is not None and seen - first >= max_events)
            new = seen - self._stepped_at
            if (new >= self._settings.events_per_step or (new and (ends or idle >= self._settings.step_wait_s))) and not self._step():
                return False
            if self._is_checkpoint_due(ends=ends):
                self.checkpoint()
            self._tell(ends=ends)
            if ends:
                return True

    def _read(self, count: int) -> list[Event]:
        try:
            found = self._stream.read(count, block_ms=_BLOCK_MS)
        except ServiceError as error:
            now = time.monotonic()
            self._meter.count("rankgr_stream_failures")
            if self._down_since is None:
                self._log.warning("waiting for Redis", what=error.what, where=error.where)
                self._down_since = now
            if now - self._down_since > self._settings.max_outage_s:
                raise
            time.sleep(1.0)
            return []
        self._down_since = None
        return [event for _, event in found]

    def _step(self) -> bool:
        """Judge, then train on, the entries that wait; False where another model became champion."""
        visits = self._timelines.extend(self._waiting)
        self._waiting, self._stepped_at = [], self._stream.seen
        if self._challenger is not None:
            self._challenger.watch(visits)
            if self._challenger.is_due and not self._decide(self._challenger):
                return False
        rows = [row for visit in visits for row in visit.rows]
        if rows:
            start = time.monotonic()
            losses = self.learner.learn(rows)
            self._meter.observe("rankgr_train_step_seconds", time.monotonic() - start)
            self._meter.count("rankgr_train_steps", outcome="skipped" if losses is None else "done")
            self._meter.count("rankgr_stream_trained", 0 if losses is None else sum(len(visit.items) for visit in visits))
            if reason := self._wrong():
                self._roll_back(reason)
        return True

    def _wrong(self) -> str:
        """What the guards object to; empty if nothing."""
        loss, drift = self.learner.loss, self.learner.drift()
        self._meter.set("rankgr_train_drift", drift)
        if loss is not None:
            self._meter.set("rankgr_train_loss", loss)
        if loss is not None and self._calm_loss is not None and not loss <= self._settings.max_loss_rise * self._calm_loss:
            return f"the loss rose from {self._calm_loss:.3f} to {loss:.3f}"
        if not drift <= self._settings.max_drift:
            return f"the weights are {drift:.2f} times their length away from the served ones"
        return ""

    def _roll_back(self, reason: str) -> None:
        self.rollbacks, self._in_a_row = self.rollbacks + 1, self._in_a_row + 1
        self._meter.count("rankgr_train_rollbacks")
        self._log.error("weights go back to the last checkpoint, the events since are left out", why=reason, rollbacks=self.rollbacks)
        if self._in_a_row > self._settings.max_rollbacks:
            raise TrainingError(
                f"{self._settings.max_rollbacks} rollbacks in a row: {reason}",
                where="streaming",
                mend="lower streaming.learning_rate, or look into the events",
            )
        self._checkpoints.load(lambda folder, _: self.learner.load(folder))
        self._challenger = None
        in_a_row = self._in_a_row
        self.checkpoint()
        self._in_a_row = in_a_row

    def _is_checkpoint_due(self, *, ends: bool) -> bool:
        is_between_steps = self._stream.seen == self._stepped_at
        is_late = time.monotonic() - self._saved_at >= self._settings.checkpoint_every_s
        return is_between_steps and self._stream.position != self._saved_position and (ends or is_late)

    def checkpoint(self) -> None:
        """Commit all there is, then acknowledge; now and then the averaged weights become the challenger."""
        position, start = self._stream.position, time.monotonic()
        self._checkpoints.save(self._fill, {_LINEAGE: self._lineage, "position": position, "steps": self.learner.steps})
        self._saved_position, self._saved_at, self._calm_loss, self._in_a_row = position, time.monotonic(), self.learner.loss, 0
        self._saved_seen = self._stream.seen
        self._meter.observe("rankgr_train_checkpoint_seconds", self._saved_at - start)
        try:
            self._stream.acknowledge(position)
        except ServiceError as error:  # the next checkpoint's covers this one
            self._log.warning("entries are not acknowledged yet", what=error.what)
        is_due = time.time() - self._synced_at >= self._settings.sync_every_s and self.learner.steps != self._set_aside
        if self._challenger is None and is_due:
            self._challenger, self._set_aside = Challenger(self.learner.averaged(), self._config), self.learner.steps
            self._log.info("weights are set aside for the gate", steps=self.learner.steps, users_to_judge=self._settings.gate_users)

    def _fill(self, folder: Path) -> None:
        self.learner.save(folder)
        self._timelines.save(folder)
        state = {"stream": self._stream.state(), "rollbacks": self.rollbacks, "synced_at": self._synced_at}
        (folder / _STREAM).write_text(json.dumps(state))

    def _decide(self, challenger: Challenger) -> bool:
        """Release the challenger if it passes; False where another model became champion."""
        self._challenger, self._synced_at = None, time.time()
        decision = challenger.judge(self._served)
        self._meter.count("rankgr_gate_decisions", decision="passed" if decision.promoted else "refused")
        self._log.info("the gate lets the weights pass" if decision.promoted else "the gate refuses the weights", reasons=decision.reasons)
        if not decision.promoted:
            return True
        start = time.monotonic()
        try:
            bundle = self._release(challenger.weights, challenger.figures)
        except ServiceError as error:
            self._log.error("the weights were not released; others will be, at the next sync", what=error.what, where=error.where)
            return True
        if bundle is None:
            return False
        self._meter.observe("rankgr_release_seconds", time.monotonic() - start)
        self._served = bundle
        self.learner.released(challenger.weights)
        return True

    def _count(self) -> None:
        """Count what was read since the last time."""
        self._meter.count("rankgr_stream_entries", self._stream.seen - self._counted)
        self._meter.set("rankgr_stream_pending", self._stream.seen - self._saved_seen)
        for reason, number in self._stream.rejected.items():
            self._meter.count("rankgr_stream_rejected", number - self._refused.get(reason, 0), reason=reason)
        self._counted, self._refused = self._stream.seen, dict(self._stream.rejected)

    def _tell(self, *, ends: bool) -> None:
        now = time.monotonic()
        if now - self._told_at < _LINE_EVERY_S and not ends:
            return
        rate = (self._stream.seen - self._told) / max(now - self._told_at, 1e-9)
        self._told, self._told_at = self._stream.seen, now
        try:
            lag = self._stream.lag()
        except ServiceError:
            return  # said by whoever reads
        self._meter.set("rankgr_stream_lag_entries", lag.entries)
        self._meter.set("rankgr_stream_lag_seconds", lag.seconds)
        self._count()  # what the stream dropped shows only here
        figures = {
            "rate": f"{rate:.1f}/s",
            "lag": lag.entries,
            "lag_s": round(lag.seconds, 1),
            "loss": None if self.learner.loss is None else round(self.learner.loss, 3),
            "steps": self.learner.steps,
            "skipped": self.learner.skipped,
            "rollbacks": self.rollbacks,
            "rejected": dict(self._stream.rejected),
        }
        self._log.info(f"{self._stream.seen} events", **figures)
