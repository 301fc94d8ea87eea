"""SASRec with a full softmax: self-attention over item embeddings, the strong embedding baseline.

Kang and McAuley, 2018, with the cross-entropy over the whole catalogue that Klenitskiy and Vasilev, 2023, found to decide
its rank. Shapes: B rows, H items of history, S = 1 + H positions ([BOS] first), D width, N items.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from components.retriever.contract import History, Ranked
from infra.logs import ProgressMeter

Items = npt.NDArray[np.int64]
_NO_TARGET = -100


@dataclass(frozen=True)
class SASRecSettings:
    """Sizes and training, chosen on the validation phase.

    Attributes:
        max_history: H at most; a longer sequence is cut into further rows.
        min_level: events below it are neither history nor target.
        ema_decay: of the weights that are evaluated, as in the retriever's training.
    """

    hidden_size: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.5
    max_history: int = 50
    min_level: int = 3
    epochs: int = 30
    rows_per_batch: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    ema_decay: float = 0.995


class SASRec(nn.Module):
    """Hidden states of all prefixes of a sequence; items are scored by inner products with their input embeddings."""

    def __init__(self, n_items: int, settings: SASRecSettings) -> None:
        super().__init__()
        width = settings.hidden_size
        self.bos = n_items
        self.items = nn.Embedding(n_items + 1, width)
        self.places = nn.Embedding(settings.max_history + 1, width)
        layer = nn.TransformerEncoderLayer(
            width, settings.heads, 4 * width, settings.dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, settings.layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.dropout = nn.Dropout(settings.dropout)
        for table in (self.items, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, items_BS: Tensor) -> Tensor:
        """hidden_BSD; padding stands at the end, where nothing before it can see it."""
        length = items_BS.shape[1]
        place_S = torch.arange(length, device=items_BS.device)
        mask_SS = nn.Transformer.generate_square_subsequent_mask(length, device=items_BS.device)
        embedded_BSD = self.dropout(self.items(items_BS) + self.places(place_S))
        return torch.as_tensor(self.blocks(embedded_BSD, mask=mask_SS, is_causal=True))

    def scores(self, hidden: Tensor) -> Tensor:
        """Logits over the catalogue."""
        return hidden @ self.items.weight[: self.bos].T


class SASRecRecommender:
    """The trained model as a recommender; see `components.retriever.contract.Recommender`."""

    name = "sasrec"

    def __init__(self, model: SASRec, settings: SASRecSettings) -> None:
        self.model, self.settings = model.eval(), settings

    @torch.inference_mode()
    def recommend(self, histories: Sequence[History], k: int, *, exclude_seen: bool) -> list[Ranked]:
        """The k items of highest inner product with the state behind the history; an empty history is [BOS] alone."""
        kept = [h.items[h.levels >= self.settings.min_level][-self.settings.max_history :].astype(np.int64) for h in histories]
        device = self.model.items.weight.device
        inputs_BS = _pad([np.concatenate([[self.model.bos], items]) for items in kept], 0).to(device)
        last_B = torch.tensor([len(items) for items in kept], device=device)
        scores_BN = self.model.scores(self.model(inputs_BS)[torch.arange(len(kept), device=device), last_B]).cpu()
        if exclude_seen:
            for row, history in enumerate(histories):
                scores_BN[row, torch.as_tensor(np.unique(history.items).astype(np.int64))] = -torch.inf
        best = scores_BN.topk(min(k, scores_BN.shape[1]))
        real_BK = best.values > -torch.inf
        return [
            Ranked(items[real].numpy().astype(np.int32), values[real].numpy())
            for items, values, real in zip(best.indices, best.values, real_BK, strict=True)
        ]


def fit_sasrec(
    sequences: Sequence[Items],
    n_items: int,
    settings: SASRecSettings,
    *,
    seed: int,
    first_targets: Sequence[int] | None = None,
    device: str = "cpu",
) -> SASRecRecommender:
    """Train on the item sequences of the training phase, every prefix predicting its next item.

    Args:
        sequences: one a user, in time order.
        n_items: size of the catalogue.
        settings: sizes and training.
        seed: of weights, dropout and the order of batches.
        first_targets: for each sequence the place from which on items are predicted, those before are history; None: 0.
        device: where the model is trained and stays.
    """
    firsts = [0] * len(sequences) if first_targets is None else first_targets
    torch.manual_seed(seed)
    model = SASRec(n_items, settings).to(device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
    rows = [row for sequence, first in zip(sequences, firsts, strict=True) for row in _rows(sequence, first, settings.max_history)]
    steps = -(-len(rows) // settings.rows_per_batch)
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.epochs * steps, pct_start=0.1, cycle_momentum=False
    )
    meter = ProgressMeter(settings.epochs * steps, step="sasrec", unit="steps")
    for epoch in range(settings.epochs):
        for batch in _batches(rows, model.bos, settings.rows_per_batch, np.random.default_rng((seed, epoch))):
            inputs_BS, targets_BS = (x.to(device) for x in batch)
            wanted_BS = targets_BS != _NO_TARGET
            loss = F.cross_entropy(model.scores(model(inputs_BS)[wanted_BS]), targets_BS[wanted_BS])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
            meter.advance(epoch=epoch + 1)
    meter.close()
    return SASRecRecommender(average.module, settings)


def _rows(sequence: Items, first_target: int, at_most: int) -> Iterator[tuple[Items, Items]]:
    """(items, targets): pieces of at most `at_most`, cut from the end, so that the latest ones have the longest history."""
    targets = np.where(np.arange(len(sequence)) < first_target, _NO_TARGET, sequence)
    for end in range(len(sequence), first_target, -at_most):
        piece = slice(max(end - at_most, 0), end)
        yield sequence[piece], targets[piece]


def _batches(rows: Sequence[tuple[Items, Items]], bos: int, size: int, rng: np.random.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs_BS, targets_BS) of rows of like length, in random order."""
    order = rng.permutation(len(rows))
    order = order[np.argsort(np.asarray([len(rows[i][0]) for i in order]), kind="stable")]
    starts = np.arange(0, len(order), size)
    for start in rng.permutation(starts):
        chosen = [rows[i] for i in order[start : start + size]]
        inputs = [np.concatenate([[bos], items[:-1]]) for items, _ in chosen]
        yield _pad(inputs, 0), _pad([targets for _, targets in chosen], _NO_TARGET)


def _pad(rows: Sequence[Items], value: int) -> Tensor:
    out = np.full((len(rows), max(map(len, rows), default=0)), value, dtype=np.int64)
    for place, row in zip(out, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(out)
