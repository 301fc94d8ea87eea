"""One row per user: the history once, then every target under its own mask (RankGR Eq. 6-7, generalised).

A target sees the history that lies before its own request, and itself. All requests of a user therefore fit into one
row, and the history is computed once for all of them.

Shapes: B rows, H history items, S = 1 + w H history positions ([BOS] first; w = 1 merged, w = M tokens), P targets,
M levels, N = S + P (M - 1) positions in all: the last codeword of a target is predicted, never read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Row:
    """A history and its targets.

    Attributes:
        items: [H] catalogue indices of the history, in time order.
        levels: [H] their feedback levels.
        target_items: [P].
        target_levels: [P].
        target_prefix: [P] how many history items lie before the target's request.
        target_request: [P] which targets were shown together.
    """

    items: Ints
    levels: Ints
    target_items: Ints
    target_levels: Ints
    target_prefix: Ints
    target_request: Ints


@dataclass(frozen=True)
class Batch:
    """Rows as padded tensors; see `Row` for the fields."""

    items_BH: Tensor
    levels_BH: Tensor
    history_B: Tensor
    """Items of history that each row holds."""
    target_items_BP: Tensor
    target_levels_BP: Tensor
    target_prefix_BP: Tensor
    target_request_BP: Tensor
    target_valid_BP: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return Batch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def collate(rows: Sequence[Row]) -> Batch:
    """Pad rows to a batch; padded targets have prefix 0 and are not valid."""

    def pad(arrays: Sequence[Ints]) -> Tensor:
        out = np.zeros((len(arrays), max((len(a) for a in arrays), default=0)), dtype=np.int64)
        for i, array in enumerate(arrays):
            out[i, : len(array)] = array
        return torch.from_numpy(out)

    return Batch(
        items_BH=pad([r.items for r in rows]),
        levels_BH=pad([r.levels for r in rows]),
        history_B=torch.tensor([len(r.items) for r in rows], dtype=torch.int64),
        target_items_BP=pad([r.target_items for r in rows]),
        target_levels_BP=pad([r.target_levels for r in rows]),
        target_prefix_BP=pad([r.target_prefix for r in rows]),
        target_request_BP=pad([r.target_request for r in rows]),
        target_valid_BP=pad([np.ones(len(r.target_items), dtype=np.int64) for r in rows]).bool(),
    )


def rows_of_timeline(
    items: Ints,
    levels: Ints,
    requests: Ints,
    *,
    history_min_level: int,
    target_min_level: int,
    max_history: int,
    first_target: int = 0,
) -> Iterator[Row]:
    """Cut a user's timeline into rows.

    Each event of at least `target_min_level` from `first_target` on is a target exactly once. A row holds at most
    `max_history` history items; a longer timeline goes on in further rows that start half a row later, so that every target
    but a user's first ones sees at least half a row of history.

    Args:
        items: [T] catalogue indices in time order.
        levels: [T].
        requests: [T] ordinals, never decreasing.
        history_min_level: events below it are never history.
        target_min_level: events below it are never targets.
        max_history: H at most.
        first_target: place of the first event that may be a target; earlier ones are history alone.
    """
    is_history = levels >= history_min_level
    request_start = np.searchsorted(requests, requests, side="left")
    before = np.concatenate([[0], np.cumsum(is_history)])[request_start]  # history items before the event's request
    history_items, history_levels = items[is_history], levels[is_history]
    is_target = (levels >= target_min_level) & (np.arange(len(levels)) >= first_target)
    stride = max(max_history // 2, 1)
    first = 0
    while True:
        low = 0 if first == 0 else first + max_history - stride
        here = is_target & (before > low) if first else is_target & (before >= 0)
        is_last = first + max_history >= len(history_items)
        if not is_last:
            here = here & (before <= first + max_history)
        if here.any():
            window = slice(first, first + max_history)
            prefix = np.minimum(before[here] - first, max_history)
            yield Row(history_items[window], history_levels[window], items[here], levels[here], prefix, requests[here])
        if is_last:
            return
        first += stride


def drop_history(row: Row, share: float, rng: np.random.Generator) -> Row:
    """The row without some of its history; its targets stay, each behind what is left of the history before it.

    Args:
        row: not changed.
        share: each row hides a part of its own, drawn evenly from 0 to `share`.
        rng: draws it.
    """
    kept = rng.random(len(row.items)) >= share * rng.random()
    before = np.concatenate([[0], np.cumsum(kept)])
    return replace(row, items=row.items[kept], levels=row.levels[kept], target_prefix=before[row.target_prefix])


def history_positions(count: Tensor, width: int) -> Tensor:
    """Position of the last history token once `count` items are seen; 0 is [BOS]."""
    return count * width


def target_mask(batch: Batch, *, n_levels: int, width: int) -> Tensor:
    """Which positions a target's own may attend to (RankGR Eq. 7 with a history prefix of its own for every target).

    History positions need no mask: they attend to what lies before them.

    Returns:
        allowed_BQN, bool, [query among the Q = P (M - 1) target positions, key among all N]. Padded targets see [BOS].
    """
    n_items, n_targets, tail = batch.items_BH.shape[1], batch.target_items_BP.shape[1], n_levels - 1
    device = batch.items_BH.device
    key_S = torch.arange(1 + width * n_items, device=device)
    last_BP = history_positions(batch.target_prefix_BP, width)
    sees_BQS = (key_S <= last_BP[..., None]).repeat_interleave(tail, dim=1)
    token_Q = torch.arange(n_targets * tail, device=device)
    target_Q = token_Q // max(tail, 1)
    own_QQ = (target_Q[:, None] == target_Q) & (token_Q <= token_Q[:, None])
    return torch.cat([sees_BQS, own_QQ.expand(len(last_BP), -1, -1)], dim=2)


def position_ids(batch: Batch, *, n_levels: int, width: int) -> Tensor:
    """positions_BN: each target starts right behind the history that it sees."""
    n_rows, n_items = batch.items_BH.shape
    history = torch.arange(1 + width * n_items, device=batch.items_BH.device).expand(n_rows, -1)
    step = torch.arange(1, n_levels, device=batch.items_BH.device)
    targets = history_positions(batch.target_prefix_BP, width)[..., None] + step
    return torch.cat([history, targets.flatten(1)], dim=1)
