"""Training of an RQ-VAE, data-parallel: each process computes what its rows of a minibatch add to the gradient, one takes the step.

Losses are means over the minibatch, so that parts are divided by all of its rows and their sum is the gradient of the whole; codewords
learn from two sums a codeword, how many rows took it and what it leaves of them. One process alone is one part.

Losses and the straight-through estimator are those of TIGER (Rajput et al. 2023, after van den Oord et al. 2017, whose appendix has
the moving averages), Sinkhorn assignment of the last level is LC-Rec's (Zheng et al. 2024). Shapes: D feature width, L latent width,
M levels, K codewords a level, B rows of a minibatch, n rows of a process's part of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from components.semantic_ids.shards import ROWS, Ints, Matrix, Shards, add_up
from infra.errors import TrainingError
from infra.sections import RqVaeConfig

OPEN = 8  # shards that a minibatch's rows are drawn from, and so the processes that can share its work
_SINKHORN_PASSES = 50
_SINKHORN_SHARPNESS = 300.0  # exp(-300) is still a double


class Autoencoder(nn.Module):
    """An MLP with ReLUs between its layers, and its mirror image."""

    def __init__(self, widths: Sequence[int], seed: int) -> None:
        """Weights of a seed; the random state outside stays as it was."""
        super().__init__()
        self.latent_dim = widths[-1]
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would set the GPUs' generators too, which are not put back.
            torch.default_generator.manual_seed(seed)
            self.encoder, self.decoder = _mlp(widths), _mlp(widths[::-1])


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise(widths):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Model:
    """What each process computes with: weights as they are before a step.

    Attributes:
        network: encoder and decoder.
        scale: features are divided by it.
        codewords_MKL: None while the autoencoder learns alone.
    """

    network: Autoencoder
    scale: float
    codewords_MKL: Tensor | None = None

    @torch.no_grad()
    def project(self, rows_nD: Matrix) -> Matrix:
        """latents_nL."""
        latents_nL = np.empty((len(rows_nD), self.network.latent_dim), np.float32)
        for at in range(0, len(rows_nD), ROWS):
            latents_nL[at : at + ROWS] = self.network.encoder(self._scaled(rows_nD[at : at + ROWS])).numpy()
        return latents_nL

    @torch.no_grad()
    def before_last_level(self, rows_nD: Matrix) -> Matrix:
        """residual_nL that the last level quantizes."""
        assert self.codewords_MKL is not None
        latents_nL: Tensor = self.network.encoder(self._scaled(rows_nD))
        return np.asarray((latents_nL - quantize(latents_nL, self.codewords_MKL[:-1]).sums_nL).numpy())

    def part(self, rows_nD: Matrix, *, batch: int, commitment: float, prices_K: Tensor | None = None) -> tuple[npt.NDArray[Any], ...]:
        """What n rows of a minibatch add to its sums.

        Args:
            rows_nD: the features.
            batch: B, rows of the whole minibatch.
            commitment: weight of the pull of the encoder towards the codewords.
            prices_K: of the last level's codewords (`even_prices`).

        Returns:
            losses, of reconstruction and of quantization (without its weight); counts_MK and offsets_MKL as in `Quantized`, empty
            without codebooks; the gradient of each parameter of the network.
        """
        rows = self._scaled(rows_nD)
        latents_nL: Tensor = self.network.encoder(rows)
        found = Quantized.nothing(latents_nL)
        if self.codewords_MKL is not None:
            found = quantize(latents_nL, self.codewords_MKL, prices_K)
            # Straight through: the value of the codewords, the gradient of the latents.
            decoded: Tensor = self.network.decoder(latents_nL + (found.sums_nL - latents_nL).detach())
        else:
            decoded = self.network.decoder(latents_nL)
        reconstruction = (decoded - rows).square().sum() / (batch * rows.shape[1])
        quantization = found.squares / (batch * latents_nL.shape[1])
        gradients = torch.autograd.grad(reconstruction + commitment * quantization, list(self.network.parameters()))
        losses = np.array([reconstruction.item(), quantization.item()])
        return losses, *(tensor.numpy() for tensor in (found.counts_MK, found.offsets_MKL, *gradients))

    def _scaled(self, rows_nD: Matrix) -> Tensor:
        return torch.from_numpy(rows_nD.astype(np.float32) / np.float32(self.scale))


@dataclass(frozen=True)
class Quantized:
    """Latents by their codewords.

    Attributes:
        sums_nL: of each row's codewords; no gradient.
        squares: summed over rows and levels, the squared residual that a level leaves; its gradient reaches the latents alone.
        counts_MK: how many rows took a codeword.
        offsets_MKL: the sum of what it leaves of them.
    """

    sums_nL: Tensor
    squares: Tensor
    counts_MK: Tensor
    offsets_MKL: Tensor

    @staticmethod
    def nothing(latents_nL: Tensor) -> Quantized:
        """Without codebooks."""
        return Quantized(torch.zeros_like(latents_nL), latents_nL.new_zeros(()), torch.zeros(0), torch.zeros(0))


def quantize(latents_nL: Tensor, codewords_MKL: Tensor, prices_K: Tensor | None = None) -> Quantized:
    """The nearest codeword of each residual (RankGR Eq. 1); the last level's by squared distance plus price, where it has prices."""
    residual_nL, squares = latents_nL, latents_nL.new_zeros(())
    counts_MK, offsets_MKL = torch.zeros(codewords_MKL.shape[:2]), torch.zeros(codewords_MKL.shape)
    for level, codewords_KL in enumerate(codewords_MKL):
        costs_nK = _distances(residual_nL.detach(), codewords_KL)
        if prices_K is not None and level == len(codewords_MKL) - 1:
            costs_nK = costs_nK + prices_K
        codes_n = costs_nK.argmin(1)
        residual_nL = residual_nL - codewords_KL[codes_n]
        squares = squares + residual_nL.square().sum()
        counts_MK[level] = torch.bincount(codes_n, minlength=len(codewords_KL))
        offsets_MKL[level].index_add_(0, codes_n, residual_nL.detach())
    return Quantized((latents_nL - residual_nL).detach(), squares, counts_MK, offsets_MKL)


def even_prices(residual_BL: Tensor, codewords_KL: Tensor) -> Tensor:
    """prices_K at which a minibatch spreads evenly over a level's codewords.

    They are the optimal transport that gives each codeword the same mass (Sinkhorn and Knopp 1967; LC-Rec, Zheng et al. 2024): what a
    row takes most of is what is cheapest by distance plus price, so that those who have rows need not know of each other.
    """
    distances_BK = _distances(residual_BL, codewords_KL)
    costs_BK = (distances_BK - distances_BK.amin(1, keepdim=True)).double()
    unit = costs_BK.max().clamp_min(1e-12) / _SINKHORN_SHARPNESS
    kernel_BK = torch.exp(-costs_BK / unit)
    rows_B = torch.ones(len(kernel_BK), dtype=torch.double)
    for _ in range(_SINKHORN_PASSES):
        codewords_K = 1 / (rows_B @ kernel_BK)
        rows_B = 1 / (kernel_BK @ codewords_K)
    return -codewords_K.log() * unit


def _distances(rows_nL: Tensor, codewords_KL: Tensor) -> Tensor:
    """Squared distances_nK less |row|^2, which no choice depends on."""
    return torch.addmm(codewords_KL.square().sum(1), rows_nL, codewords_KL.T, alpha=-2)


class TrainedCodebooks:
    """Codebooks while they learn; counts who is taken."""

    def __init__(self, codewords_MKL: Matrix, sizes_MK: Matrix, settings: RqVaeConfig) -> None:
        """Begin with codewords, and with how many rows of a minibatch each of them encodes on average."""
        self._settings = settings
        self.codewords_MKL = nn.Parameter(torch.from_numpy(codewords_MKL).clone(), requires_grad=settings.codebook == "gradient")
        self._sizes_MK = torch.from_numpy(sizes_MK)
        self._taken_MK = torch.zeros(sizes_MK.shape, dtype=torch.bool)

    @torch.no_grad()
    def learn(self, counts_MK: Tensor, offsets_MKL: Tensor, batch: int) -> None:
        """Move codewords towards the mean of what a minibatch encoded by them (van den Oord et al. 2017, appendix A.1, as an
        increment), or set the gradient of the codebook loss, the mean of what they leave squared, for the optimizer.
        """
        self._taken_MK |= counts_MK > 0
        if self._settings.codebook == "gradient":
            self.codewords_MKL.grad = -2 / (batch * offsets_MKL.shape[2]) * offsets_MKL
            return
        decay = self._settings.ema_decay
        self._sizes_MK.mul_(decay).add_(counts_MK, alpha=1 - decay)
        # The average of a codeword that nobody takes fades away; its place stays.
        pace_MK = (1 - decay) / self._sizes_MK.clamp_min(1e-12)
        self.codewords_MKL.add_(offsets_MKL * pace_MK[:, :, None])

    @torch.no_grad()
    def revive(self, draw: Callable[[], Matrix], rng: np.random.Generator) -> None:
        """Put codewords that nobody took onto what random rows have left over at their level; count anew who is taken.

        Args:
            draw: reads the latents_nL of n >= K random rows; called only where there are such codewords.
            rng: picks among them.
        """
        if not self._taken_MK.all():
            residual_nL = torch.from_numpy(draw())
            for level, codewords_KL in enumerate(self.codewords_MKL):
                before_KL = codewords_KL.clone()
                dead = torch.nonzero(~self._taken_MK[level])[:, 0]
                codewords_KL[dead] = residual_nL[torch.from_numpy(rng.permutation(len(residual_nL))[: len(dead)])]
                self._sizes_MK[level, dead] = self._sizes_MK[level].mean()
                # By the old codewords: rows that became a codeword would leave zeros over, all alike, for the next level.
                residual_nL = residual_nL - before_KL[_distances(residual_nL, before_KL).argmin(1)]
        self._taken_MK.zero_()


@dataclass
class Trainer:
    """Takes the steps; has no rows.

    Attributes:
        network: what learns.
        scale: of the features.
        settings: of losses and minibatches.
        codebooks: None while the autoencoder learns alone.
    """

    network: Autoencoder
    scale: float
    settings: RqVaeConfig
    codebooks: TrainedCodebooks | None = None

    def __post_init__(self) -> None:
        self._weights = list(self.network.parameters())
        self._optimizer = torch.optim.Adam(self._weights, lr=self.settings.learning_rate)

    def begin(self, codebooks: TrainedCodebooks) -> None:
        """From now on with codebooks."""
        self.codebooks = codebooks
        if self.settings.codebook == "gradient":
            self._optimizer.add_param_group({"params": [codebooks.codewords_MKL]})

    def step(self, features: Shards, rows: Mapping[int, Ints], epoch: int) -> None:
        """One step down the loss of a minibatch: reconstruction, and the codebooks' part once there are some.

        Args:
            features: where the rows are.
            rows: their numbers, by shard.
            epoch: for the error.

        Raises:
            TrainingError: the loss or its gradients are not finite.
        """
        batch = sum(map(len, rows.values()))
        model = Model(self.network, self.scale, None if self.codebooks is None else self.codebooks.codewords_MKL.detach())
        options: dict[str, Any] = {"batch": batch, "commitment": self.settings.commitment}
        if model.codewords_MKL is not None and self.settings.sinkhorn:
            residual_BL = torch.from_numpy(np.concatenate(features.together(model.before_last_level, rows)))
            options["prices_K"] = even_prices(residual_BL, model.codewords_MKL[-1])
        losses, *sums = add_up(features.together(partial(model.part, **options), rows))
        counts_MK, offsets_MKL, *gradients = (torch.tensor(each) for each in sums)
        self._check(losses, gradients, epoch)
        for weight, gradient in zip(self._weights, gradients, strict=True):
            weight.grad = gradient
        if self.codebooks is not None:
            self.codebooks.learn(counts_MK, offsets_MKL, batch)
        self._optimizer.step()

    def _check(self, losses: npt.NDArray[np.float64], gradients: Sequence[Tensor], epoch: int) -> None:
        by_gradient = self.codebooks is not None and self.settings.codebook == "gradient"
        loss = float(losses @ [1, self.settings.commitment + by_gradient])
        norm = float(nn.utils.get_total_norm(gradients))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"the RQ-VAE's loss is {loss:g} with gradients of norm {norm:g} in epoch {epoch + 1}",
                where="semantic_ids.rq_vae",
                mend="lower semantic_ids.rq_vae.learning_rate, or take the quantizer rq_kmeans",
            )


def minibatches(features: Shards, batch: int, rng: np.random.Generator) -> Iterator[dict[int, Ints]]:
    """Every row once, as row numbers by shard; depends on how the rows are cut into shards, and not on who has them.

    A minibatch has rows of a few shards, `OPEN` at most, which are in memory until all their rows had their turn. They lie far apart,
    so that each of the processes, which have consecutive shards, has its share of every minibatch.
    """
    for shards in _rounds(len(features.sizes), rng):
        features.each("hold", [(shard in shards,) for shard in range(len(features.sizes))])
        ends = np.cumsum(features.sizes[shards])
        order = rng.permutation(int(ends[-1]))
        for at in range(0, len(order), batch):
            chosen = order[at : at + batch]
            of = np.searchsorted(ends, chosen, side="right")
            yield {int(shards[i]): chosen[of == i] - ends[i] + features.sizes[shards[i]] for i in np.unique(of)}
        features.every("hold", False)


def _rounds(n_shards: int, rng: np.random.Generator) -> Iterator[Ints]:
    """Shards that are open together: at random one of each stretch of shards, until all were."""
    stretches = [rng.permutation(part) for part in np.array_split(np.arange(n_shards), min(OPEN, n_shards))]
    for at in range(len(stretches[0])):
        yield np.array([stretch[at] for stretch in stretches if at < len(stretch)])
