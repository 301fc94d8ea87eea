"""A network that places items by content and co-occurrence so that neighbours in timelines lie close (FORGE, OneRec 3.1).

Trained by a symmetric InfoNCE over the pairs of a batch. Shapes: N items, D content width, S signal width, I = D + S, H hidden
width, O output width, B pairs of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits

from components.semantic_ids.collaborative import Timelines, neighbour_counts
from components.semantic_ids.shards import Ints, Matrix
from infra.sections import AdapterConfig

_PAIRS_AN_ITEM = 4  # that an epoch draws
_NAMES = ("skip_IO", "hidden_IH", "hidden_H", "out_HO")
_ROWS = 65_536
_MASKED = -1e9


@dataclass(frozen=True)
class Adapter:
    """unit(x skip + gelu(x hidden + b) out) of x = [content, signal], frozen.

    Attributes:
        skip_IO: linear way around.
        hidden_IH: weights of the hidden layer.
        hidden_H: its biases.
        out_HO: weights of the last layer.
    """

    skip_IO: Matrix
    hidden_IH: Matrix
    hidden_H: Matrix
    out_HO: Matrix

    def apply(self, content_ND: Matrix, signal_NS: Matrix) -> Matrix:
        """Vectors of items.

        Args:
            content_ND: as it was while fitting.
            signal_NS: as it was while fitting; zeros for items of which nothing is known.

        Returns:
            vectors_NO of unit norm, float32; zero where content and signal are.
        """
        weights = [torch.from_numpy(weight) for weight in self.tensors().values()]
        found_NO = np.empty((len(content_ND), self.skip_IO.shape[1]), np.float32)
        for start in range(0, len(found_NO), _ROWS):
            inputs_BI = _inputs(content_ND[start : start + _ROWS], signal_NS[start : start + _ROWS])
            with torch.no_grad():
                found_BO = _forward(inputs_BI, weights)
            found_BO[~inputs_BI.any(dim=1)] = 0  # the biases would give all of them one place
            found_NO[start : start + _ROWS] = found_BO.numpy()
        return found_NO

    def tensors(self) -> dict[str, Matrix]:
        """All that `restore` needs, float32."""
        return {name: getattr(self, name) for name in _NAMES}

    @classmethod
    def restore(cls, tensors: Mapping[str, Matrix]) -> Adapter:
        """The adapter of such tensors."""
        return cls(**{name: np.array(tensors[name], dtype=np.float32) for name in _NAMES})


def fit_adapter(
    content_ND: Matrix, signal_NS: Matrix, timelines: Timelines, settings: AdapterConfig, *, dim: int, window: int, seed: int
) -> Adapter:
    """Train an adapter on pairs of items that lie at most `window` events apart in a timeline.

    A pair is drawn in proportion to the sum of 1 / distance over its meetings. The other pairs of the batch are the negatives;
    popular items are negatives more often, for which log q of the item, its share of the pairs, is taken off its logit (Yi et
    al. 2019, the logQ correction). Some items of a batch lose their signal, and so learn to be placed by content. The skip starts
    as the projection to the principal directions of the inputs and the network as zero: at first cosines are those of the
    inputs, exactly where `dim` is no less than their rank. Equal seeds give equal adapters; torch's global state stays as it was.

    Args:
        content_ND: content features; D may be 0.
        signal_NS: co-occurrence features; zero rows for items without.
        timelines: item indices of each user in time order.
        settings: sizes and rates; an epoch draws `_PAIRS_AN_ITEM` pairs an item.
        dim: width of the output at most; that of the inputs if it is less.
        window: greatest distance.
        seed: of the weights, the pairs and the dropout.

    Returns:
        the adapter; as it starts where no two items meet.
    """
    rng = np.random.default_rng(seed)
    weights = [torch.from_numpy(weight) for weight in _first_weights(content_ND, signal_NS, settings.hidden_dim, dim, rng)]
    # Threads change the order of sums.
    with threadpool_limits(1):
        pairs = _Pairs.of(timelines, len(content_ND), window)
        if len(pairs.weights):
            _train(weights, content_ND, signal_NS, pairs, settings, rng)
    return Adapter(*(weight.detach().numpy() for weight in weights))


@dataclass(frozen=True)
class _Pairs:
    """Ordered pairs of different items that meet, and how much.

    Attributes:
        rows, cols: the items.
        weights: cumulated sums of 1 / distance.
        log_q_N: log of the share of pairs that hold an item.
    """

    rows: Ints
    cols: Ints
    weights: npt.NDArray[np.float64]
    log_q_N: torch.Tensor

    @classmethod
    def of(cls, timelines: Timelines, n_items: int, window: int) -> _Pairs:
        counts = neighbour_counts(timelines, n_items, window)
        counts.setdiag(0)
        counts.eliminate_zeros()
        share = np.asarray(counts.sum(axis=1)).ravel() / max(counts.sum(), 1e-12)
        found = counts.tocoo()
        log_q_N = torch.from_numpy(np.log(np.maximum(share, 1e-12)).astype(np.float32))
        return cls(found.row.astype(np.int64), found.col.astype(np.int64), np.cumsum(found.data, dtype=np.float64), log_q_N)

    def draw(self, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Pairs in proportion to their weights, with replacement."""
        picks = np.searchsorted(self.weights, rng.random(count) * self.weights[-1], side="right")
        picks = np.minimum(picks, len(self.weights) - 1)  # a product just below the sum may round up to it
        return torch.from_numpy(self.rows[picks]), torch.from_numpy(self.cols[picks])


def _train(
    weights: list[torch.Tensor],
    content_ND: Matrix,
    signal_NS: Matrix,
    pairs: _Pairs,
    settings: AdapterConfig,
    rng: np.random.Generator,
) -> None:
    """Move the weights in place; the rate falls to zero along a half cosine."""
    drawn = max(_PAIRS_AN_ITEM * len(content_ND), settings.batch)

    def forward(side_B: torch.Tensor) -> torch.Tensor:
        inputs_BI = _inputs(content_ND[side_B.numpy()], signal_NS[side_B.numpy()])
        return _forward(_hide(inputs_BI, content_ND.shape[1], settings.signal_dropout, rng), weights)

    steps = settings.epochs * (drawn // settings.batch)
    for weight in weights:
        weight.requires_grad_()
    optimizer = torch.optim.Adam(weights, lr=settings.learning_rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = settings.learning_rate * 0.5 * (1 + np.cos(np.pi * step / steps))
        sides = pairs.draw(settings.batch, rng)
        left_BO, right_BO = (forward(side_B) for side_B in sides)
        loss = info_nce(left_BO, right_BO, *sides, pairs.log_q_N, settings.temperature)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def info_nce(
    left_BO: torch.Tensor, right_BO: torch.Tensor, left_B: torch.Tensor, right_B: torch.Tensor, log_q_N: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Mean of the cross entropies of finding the right item of each pair among the batch's, and the left one.

    Args:
        left_BO: vectors of unit norm of the first items.
        right_BO: of the second.
        left_B: the first items, to know a pair's own items among the negatives: those are left out.
        right_B: the second items.
        log_q_N: taken off the logits of items, for popular ones are in more batches.
        temperature: cosines are divided by it.

    Returns:
        a scalar.
    """
    cosines_BB = left_BO @ right_BO.T / temperature
    diagonal = torch.eye(len(left_B), dtype=torch.bool)
    logits_BB = cosines_BB - log_q_N[right_B]
    own_BB = (right_B == right_B[:, None]) | (right_B == left_B[:, None])
    forth = F.cross_entropy(logits_BB.masked_fill(own_BB & ~diagonal, _MASKED), torch.arange(len(left_B)))
    logits_BB = cosines_BB.T - log_q_N[left_B]
    own_BB = (left_B == left_B[:, None]) | (left_B == right_B[:, None])
    back = F.cross_entropy(logits_BB.masked_fill(own_BB & ~diagonal, _MASKED), torch.arange(len(left_B)))
    return (forth + back) / 2


def _forward(inputs_BI: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    skip_IO, hidden_IH, hidden_H, out_HO = weights
    return F.normalize(inputs_BI @ skip_IO + F.gelu(inputs_BI @ hidden_IH + hidden_H) @ out_HO, dim=1)


def _hide(inputs_BI: torch.Tensor, content_width: int, share: float, rng: np.random.Generator) -> torch.Tensor:
    """The inputs without the signal in a random share of the rows; never where content has nothing to say instead."""
    hidden_B = torch.from_numpy(rng.random(len(inputs_BI)) < share) & inputs_BI[:, :content_width].any(dim=1)
    kept_BI = torch.ones_like(inputs_BI)
    kept_BI[hidden_B, content_width:] = 0
    return inputs_BI * kept_BI


def _inputs(content_ND: Matrix, signal_NS: Matrix) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([content_ND, signal_NS], axis=1).astype(np.float32, copy=False))


def _first_weights(content_ND: Matrix, signal_NS: Matrix, hidden: int, dim: int, rng: np.random.Generator) -> Iterator[Matrix]:
    """In the order of `_NAMES`; the directions are eigenvectors of the inputs' second moments, the signs of which do not matter."""
    width = content_ND.shape[1] + signal_NS.shape[1]
    moments_II = np.zeros((width, width))
    for start in range(0, len(content_ND), _ROWS):
        inputs_BI = _inputs(content_ND[start : start + _ROWS], signal_NS[start : start + _ROWS]).numpy()
        moments_II += inputs_BI.T.astype(np.float64) @ inputs_BI
    _, directions_II = np.linalg.eigh(moments_II)
    yield np.ascontiguousarray(directions_II[:, ::-1][:, : min(dim, width)], dtype=np.float32)
    yield (rng.standard_normal((width, hidden)) / np.sqrt(max(width, 1))).astype(np.float32)
    yield np.zeros(hidden, np.float32)
    yield np.zeros((hidden, min(dim, width)), np.float32)
