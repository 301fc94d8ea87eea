"""Prompts computed once: for a batch of users, and again only from where a user's history has grown.

Shapes: B rows (users), H history items, S prompt positions, N new positions, D hidden width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from components.retriever.attention import GrowingPass, Prefix, PromptPass
from components.retriever.backbone import run_decoding, run_prompt
from components.retriever.contract import History
from components.retriever.model import Retriever, take


@dataclass(frozen=True)
class _Prompted:
    history: History
    prefix: Prefix


class PrefixCache:
    """The latest prompts by user, so that a history that only grew is not computed from its start.

    A prompt is reused as far as its events are the same from the first one on. Once a history is longer than
    `max_history`, each new event pushes the oldest one out and the prompt is computed anew.

    Args:
        capacity: users kept; the one that was asked for longest ago goes first.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._model: Retriever | None = None
        self._kept: OrderedDict[str, _Prompted] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def of(self, model: Retriever) -> PrefixCache:
        """The cache, emptied if another model filled it."""
        if self._model is not model:
            self._kept.clear()
            self._model = model
        return self

    def find(self, user: str, history: History) -> tuple[Prefix | None, int]:
        """A user's earlier prefix, and how many events of `history` it holds already."""
        kept = self._kept.get(user)
        if kept is None:
            return None, 0
        self._kept.move_to_end(user)
        return kept.prefix, _common_events(kept.history, history)

    def keep(self, user: str, history: History, prefix: Prefix) -> None:
        """Remember a user's prefix, a single row."""
        self._kept[user] = _Prompted(history, prefix)
        self._kept.move_to_end(user)
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)


def _common_events(old: History, new: History) -> int:
    n = min(len(old.items), len(new.items))
    same = (old.items[:n] == new.items[:n]) & (old.levels[:n] == new.levels[:n])
    return n if bool(same.all()) else int(np.argmin(same))


@torch.inference_mode()
def prefill(
    model: Retriever,
    histories: Sequence[History],
    cache: PrefixCache | None = None,
    users: Sequence[str] | None = None,
    *,
    for_rank_head: bool = True,
) -> Prefix:
    """Keys, values and hidden states of the prompts.

    Args:
        model: in evaluation mode.
        histories: already cut to the model's `max_history`.
        cache: of earlier prompts, looked up and brought up to date.
        users: key of each history in the cache.
        for_rank_head: keep the hidden states of all positions; without them and without a cache, less is computed.
    """
    if cache is None or users is None:
        return _prefill(model, histories, whole=for_rank_head)
    cache = cache.of(model)
    found = [cache.find(user, history) for user, history in zip(users, histories, strict=True)]
    if any(past is not None for past, _ in found):
        prefix = _grow(model, histories, [past for past, _ in found], [1 + model.width * events if past else 0 for past, events in found])
    else:
        prefix = _prefill(model, histories, whole=True)
    for row, (user, history) in enumerate(zip(users, histories, strict=True)):
        cache.keep(user, history, prefix.row(row))
    return prefix


def _embeddings(model: Retriever, histories: Sequence[History]) -> tuple[Tensor, Tensor]:
    """Prompts as embeddings_BSD, padded on the right, and their length_B."""
    items = np.zeros((len(histories), max(len(h.items) for h in histories)), dtype=np.int64)
    levels = np.zeros_like(items)
    for row, history in enumerate(histories):
        items[row, : len(history.items)], levels[row, : len(history.items)] = history.items, history.levels
    device = model.sid_codes.device
    length = torch.tensor([1 + model.width * len(h.items) for h in histories], device=device)
    return model.history_embeddings(torch.from_numpy(items).to(device), torch.from_numpy(levels).to(device)), length


def _prefill(model: Retriever, histories: Sequence[History], *, whole: bool) -> Prefix:
    embeddings, length_B = _embeddings(model, histories)
    if not whole:
        decoding, last_BD = run_prompt(model.backbone, embeddings, length_B)
        return Prefix(decoding.keys, decoding.values, last_BD, length_B, None)
    decoding = PromptPass()
    hidden_BSD = run_decoding(model.backbone, embeddings, torch.arange(embeddings.shape[1], device=length_B.device)[None], decoding)
    return Prefix(decoding.keys, decoding.values, _last(hidden_BSD, length_B), length_B, hidden_BSD)


def _last(hidden_BSD: Tensor, length_B: Tensor) -> Tensor:
    return take(hidden_BSD, length_B[:, None] - 1)[:, 0]


def _grow(model: Retriever, histories: Sequence[History], past: list[Prefix | None], old: list[int]) -> Prefix:
    embeddings, length = _embeddings(model, histories)
    s, old_B = embeddings.shape[1], torch.tensor(old, device=length.device)
    new = torch.arange(max(int((length - old_B).max()), 1), device=length.device)
    position_BN = (old_B[:, None] + new).masked_fill(old_B[:, None] + new >= length[:, None], s)
    inputs = embeddings.gather(1, position_BN.clamp_max(s - 1)[..., None].expand(-1, -1, embeddings.shape[-1]))
    decoding = GrowingPass(past, old_B, s, position_BN)
    hidden = run_decoding(model.backbone, inputs, position_BN, decoding)
    before = [None if p is None or p.hidden_BSD is None else p.hidden_BSD[:, None] for p in past]
    hidden_BSD = decoding.merge(before, hidden[:, None])[:, 0]
    return Prefix(decoding.keys, decoding.values, _last(hidden_BSD, length), length, hidden_BSD)
