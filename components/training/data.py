"""Timelines to shuffled batches of packed rows, the same for every run with the same seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from components.retriever.packing import Batch, Row, collate, rows_of_timeline
from infra import records as r
from infra.config import Config
from infra.errors import ConfigError

_BUCKET = 32


def training_rows(timelines: pa.Table, config: Config) -> list[Row]:
    """Rows of the training phase; events whose level has weight 0 in every loss are no targets.

    Raises:
        ConfigError: every loss has weight 0.
    """
    loss = config.training.loss
    in_rank_head = [level for level in r.Level if loss.rsp_weight > 0 and level >= config.split.positive_level]
    used = [level for level in r.Level if loss.ntp_level_weights.get(level, 0) > 0 or loss.alpha > 0 or level in in_rank_head]
    if not used:
        raise ConfigError("every loss has weight 0", where="training.loss", mend="set ntp_level_weights, alpha or rsp_weight above 0")
    rows: list[Row] = []
    for timeline in timelines.select(["items", "levels", "requests", "phases"]).to_pylist():
        count = int(np.searchsorted(timeline["phases"], r.Phase.VALID))
        items, levels, requests = (np.asarray(timeline[name][:count], dtype=np.int64) for name in ("items", "levels", "requests"))
        if count:
            rows += rows_of_timeline(
                items,
                levels,
                requests,
                history_min_level=config.retriever.history_min_level,
                target_min_level=min(used),
                max_history=config.retriever.max_history,
            )
    return rows


def epoch_batches(rows: Sequence[Row], *, rows_per_batch: int, epoch: int, seed: int, rank: int, world_size: int) -> Iterator[Batch]:
    """This worker's batches of an epoch; every worker gets equally many.

    Rows of like length go into one batch (little padding), the order of batches is random. All workers draw the same
    order and take turns, so that one step of all workers handles rows of like length too. Each row comes once an epoch;
    only where a step has fewer rows than workers, some come again for those that would have none.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(rows))
    length = np.asarray([(len(row.items) + len(row.target_items)) // _BUCKET for row in rows])
    order = order[np.argsort(length[order], kind="stable")]
    together = rows_per_batch * world_size
    steps = [order[start : start + together] for start in range(0, len(order), together)]
    for index in rng.permutation(len(steps)):
        step = steps[index]
        mine = step[rank % len(step) :: world_size]
        yield collate([rows[i] for i in mine])


def steps_per_epoch(n_rows: int, *, rows_per_batch: int, world_size: int) -> int:
    """How many batches `epoch_batches` yields."""
    return -(-n_rows // (rows_per_batch * world_size))
