"""The reward model: what a user would make of a session of items (OneRec 3.3.1, Eq. 5-7).

Shapes: B sessions, N items of a session, T events before it, O objectives, D width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.reward.data import AGES, Batch, session_labels
from infra.records import Level
from infra.sections import RewardConfig


@dataclass(frozen=True)
class Shape:
    """Sizes of the weights, beside the settings."""

    items: int
    categories: int
    objectives: int


class Attention(nn.Module):
    """Multi-head attention with a learned key beside those given, so that there is always something to look at.

    Where all keys have the same weight it makes a smoothed mean: the learned one is what is thought of a user without events.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key_value, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.nothing = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, query_BND: Tensor, memory_BTD: Tensor, is_memory_BT: Tensor) -> Tensor:
        """What each query finds in the memory, [B, N, D]."""
        memory_BTD = torch.cat([memory_BTD, self.nothing.expand(len(memory_BTD), 1, -1)], dim=1)
        is_memory_BT = F.pad(is_memory_BT, (0, 1), value=True)
        key_BTD, value_BTD = self.key_value(memory_BTD).chunk(2, dim=-1)
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.query(query_BND), key_BTD, value_BTD))
        found_BHND = F.scaled_dot_product_attention(query, key, value, attn_mask=is_memory_BT[:, None, None, :])
        found_BND: Tensor = self.out(found_BHND.transpose(1, 2).flatten(2))
        return found_BND


class RewardModel(nn.Module):
    """R(u, S): a logit for each objective.

    Each item looks at the user's behaviour (target attention), the items of the session look at each other (Eq. 5), and
    a tower for each objective reads their sum (Eq. 6). The same towers read each item alone too: what it earns in this session.

    Args:
        shape: sizes of the weights.
        config: width, heads and dropout.
    """

    def __init__(self, shape: Shape, config: RewardConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.shape = shape
        self.item, self.category = nn.Embedding(shape.items, width), nn.Embedding(shape.categories, width)
        self.level, self.age = nn.Embedding(len(Level) + 1, width), nn.Embedding(AGES, width)
        self.rate, self.habit = nn.Linear(shape.objectives, width), nn.Linear(shape.objectives, width)
        self.earned = nn.Linear(2 * shape.objectives, width)
        self.register_buffer("category_of_I", torch.zeros(shape.items, dtype=torch.long))
        self.target_attention = Attention(width, config.heads)
        self.join = nn.Sequential(nn.Linear(3 * width, width), nn.GELU(), nn.LayerNorm(width))
        self.self_attention = Attention(width, config.heads)
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, config.tower_size), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(config.tower_size, 1))
            for _ in range(shape.objectives)
        )
        self.dropout = nn.Dropout(config.dropout)
        for table in (self.item, self.category, self.level, self.age):
            nn.init.normal_(table.weight, std=0.05)

    category_of_I: Tensor

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits of the items [B, N, O] and of the sessions [B, O]; those of padding mean nothing."""
        is_item_BN = batch["is_item_BN"]
        item_BND = self.dropout(self._items(batch["items_BN"], batch["rates_BNO"]))
        past_BTD = self.dropout(self._behaviour(batch))
        found_BND = self.target_attention(item_BND, past_BTD, batch["is_past_BT"]) + self.habit(batch["habits_BO"])[:, None]
        aware_BND = self.join(torch.cat([item_BND, found_BND, item_BND * found_BND], dim=-1))
        fused_BND = aware_BND + self.self_attention(aware_BND, aware_BND, is_item_BN)
        fused_BND = fused_BND * is_item_BN[:, :, None]
        return self._towers(fused_BND), self._towers(fused_BND.sum(dim=1))

    def _items(self, items: Tensor, rates: Tensor) -> Tensor:
        known: Tensor = self.item(items) + self.category(self.category_of_I[items]) + self.rate(rates)
        return known

    def _behaviour(self, batch: dict[str, Tensor]) -> Tensor:
        labels_BTO = batch["past_labels_BTO"]
        earned = torch.cat([labels_BTO == 1, labels_BTO == 0], dim=-1).float()
        said: Tensor = self.level(batch["past_levels_BT"]) + self.age(batch["past_ages_BT"]) + self.earned(earned)
        return self._items(batch["past_items_BT"], batch["past_rates_BTO"]) + said

    def _towers(self, fused: Tensor) -> Tensor:
        return torch.cat([tower(fused) for tower in self.towers], dim=-1)


def tensors_of(batch: Batch) -> dict[str, Tensor]:
    """A batch as the model takes it, with the labels of the sessions beside those of their items."""
    arrays = {**vars(batch), "labels_BO": session_labels(batch.labels_BNO)}
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def reward_loss(logits: tuple[Tensor, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """Binary cross-entropy summed over the objectives (Eq. 7), of sessions and of items; labels that are not known are left out."""
    of_items, of_sessions = logits
    return _bce(of_sessions, batch["labels_BO"]) + _bce(of_items.flatten(0, 1), batch["labels_BNO"].flatten(0, 1))


def _bce(logits_XO: Tensor, labels_XO: Tensor) -> Tensor:
    known_XO = ~labels_XO.isnan()
    losses_XO = F.binary_cross_entropy_with_logits(logits_XO, labels_XO.nan_to_num(), reduction="none")
    return ((losses_XO * known_XO).sum(dim=0) / known_XO.sum(dim=0).clamp(min=1)).sum()
