"""Timelines to shuffled batches of packed rows, the same for every run with the same seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from components.retriever.packing import Batch, Row, collate, drop_history, rows_of_timeline
from infra import records as r
from infra.config import Config
from infra.errors import ConfigError

_DAY_MS = 86_400_000
_BUCKET = 32
_FINE_BUCKET = 8  # where rows are short, a batch holds many of them and padding would be most of it


def target_min_level(config: Config) -> int:
    """The lowest level that counts in any loss: events below it are no targets.

    Raises:
        ConfigError: every loss has weight 0.
    """
    loss = config.training.loss
    in_rank_head = [level for level in r.Level if loss.rsp_weight > 0 and level >= config.split.positive_level]
    used = [level for level in r.Level if loss.ntp_level_weights.get(level, 0) > 0 or loss.alpha > 0 or level in in_rank_head]
    if not used:
        raise ConfigError("every loss has weight 0", where="training.loss", mend="set ntp_level_weights, alpha or rsp_weight above 0")
    return min(used)


def training_rows(timelines: pa.Table, config: Config) -> list[Row]:
    """Rows of the training phase; events that are too old or whose level has weight 0 in every loss are no targets.

    Raises:
        ConfigError: every loss has weight 0.
    """
    lowest = target_min_level(config)
    start_ms = first_target_ms(timelines, config.training.target_days)
    rows: list[Row] = []
    for timeline in timelines.select(["items", "levels", "requests", "phases", "timestamps"]).to_pylist():
        count = int(np.searchsorted(timeline["phases"], r.Phase.VALID))
        items, levels, requests = (np.asarray(timeline[name][:count], dtype=np.int64) for name in ("items", "levels", "requests"))
        if count:
            rows += rows_of_timeline(
                items,
                levels,
                requests,
                history_min_level=config.retriever.history_min_level,
                target_min_level=lowest,
                max_history=config.retriever.max_history,
                first_target=int(np.searchsorted(timeline["timestamps"][:count], start_ms)),
            )
    return rows


def first_target_ms(timelines: pa.Table, days: float | None) -> int:
    """When the last `days` days of the training phase begin; the beginning of time where there is no such limit."""
    beginning = int(np.iinfo(np.int64).min)
    if days is None:
        return beginning
    times, phases = (pc.list_flatten(timelines[name]) for name in ("timestamps", "phases"))
    last = pc.max(times.filter(pc.equal(phases, int(r.Phase.TRAIN)))).as_py()
    return beginning if last is None else int(last - days * _DAY_MS)


@dataclass(frozen=True)
class BatchPlan:
    """How rows are put together to batches: equally many in every epoch and on every worker.

    Rows of like length go into one batch, so that there is little padding. Which rows of a length these are is drawn
    anew in each epoch, and so is the order of the batches.

    Attributes:
        rows: of all workers.
        bucket_R: rows of like length have the same number.
        ends: with the rows in the order of their buckets, where the batches of a step of all workers end.
        world_size: workers.
        accumulate: batches of a worker that make one optimizer step.
        history_dropout: part of a row's history that may be hidden.
    """

    rows: Sequence[Row]
    bucket_R: npt.NDArray[np.int64]
    ends: list[int]
    world_size: int
    accumulate: int
    history_dropout: float

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-len(self.ends) // self.accumulate)


def plan_batches(rows: Sequence[Row], config: Config, *, world_size: int = 1) -> BatchPlan:
    """Batches of `rows_per_batch` rows a worker, or of at most `tokens_per_batch` positions where that is set."""
    training = config.training
    items_R, targets_R = (np.asarray(sizes, dtype=np.int64) for sizes in zip(*_sizes(rows), strict=True))
    if training.tokens_per_batch is None:
        together = training.rows_per_batch * world_size
        ends = [*range(together, len(rows), together), len(rows)]
        return BatchPlan(rows, (items_R + targets_R) // _BUCKET, ends, world_size, training.accumulation_steps, training.history_dropout)
    history_R = 1 + (1 if config.retriever.history == "merged" else config.semantic_ids.levels) * items_R
    own_R = (config.semantic_ids.levels - 1) * targets_R
    bucket_R = (history_R + own_R) // _FINE_BUCKET
    longest = np.zeros((2, int(bucket_R.max()) + 1), dtype=np.int64)
    np.maximum.at(longest[0], bucket_R, history_R)
    np.maximum.at(longest[1], bucket_R, own_R)
    history_R, own_R = longest[:, np.sort(bucket_R)]
    ends = _ends_within(history_R, own_R, training.tokens_per_batch, world_size)
    return BatchPlan(rows, bucket_R, ends, world_size, training.accumulation_steps, training.history_dropout)


def _sizes(rows: Sequence[Row]) -> list[tuple[int, int]]:
    return [(len(row.items), len(row.target_items)) for row in rows]


def _ends_within(history_R: npt.NDArray[np.int64], targets_R: npt.NDArray[np.int64], budget: int, world_size: int) -> list[int]:
    """Cut rows, given by the most positions they may have, such that no worker's padded batch exceeds the budget.

    The lengths are those of the buckets, not of the rows that an epoch happens to draw: the cuts are the same in all epochs.
    """
    ends, start, widest, most = [], 0, 0, 0
    for index, (history, targets) in enumerate(zip(history_R.tolist(), targets_R.tolist(), strict=True)):
        widest, most = max(widest, history), max(most, targets)
        each = -(-(index + 1 - start) // world_size)
        if index > start and each * (widest + most) > budget and each > 1:
            ends.append(index)
            start, widest, most = index, history, targets
    return [*ends, len(history_R)]


def epoch_batches(plan: BatchPlan, *, epoch: int, seed: int, rank: int = 0, skip: int = 0) -> Iterator[list[Batch]]:
    """This worker's batches of an epoch, those of one optimizer step together.

    All workers draw the same order and take turns, so that one step of all workers handles rows of like length too. Each
    row comes once an epoch; only where a batch has fewer rows than workers, some come again for those that would have none.

    Args:
        plan: of `plan_batches`.
        epoch: draws the order, together with the seed.
        seed: of the run.
        rank: of this worker.
        skip: optimizer steps left out, those that were done before an interruption.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(plan.rows))
    order = order[np.argsort(plan.bucket_R[order], kind="stable")]
    together = np.split(order, plan.ends[:-1])
    turn = rng.permutation(len(together))
    for start in range(skip * plan.accumulate, len(turn), plan.accumulate):
        step = [together[index] for index in turn[start : start + plan.accumulate]]
        # Of its own for each step, so that a resumed epoch hides what an undisturbed one would have hidden.
        noise = np.random.default_rng((seed, epoch, start, rank))
        mine = [[plan.rows[i] for i in drawn[rank % len(drawn) :: plan.world_size]] for drawn in step]
        if plan.history_dropout:
            mine = [[drop_history(row, plan.history_dropout, noise) for row in rows] for rows in mine]
        yield [collate(rows) for rows in mine]
