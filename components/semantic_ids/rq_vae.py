"""RQ-VAE: an autoencoder whose latent vectors are quantized residually (RankGR Eq. 1; TIGER, Rajput et al. 2023).

Losses and the straight-through estimator are those of TIGER (after van den Oord et al. 2017, whose appendix has the moving
averages), Sinkhorn assignment of the last level is LC-Rec's (Zheng et al. 2024). Shapes: N items, D feature width, L latent width,
M levels, K codewords a level, B rows of a batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from components.semantic_ids import quantize
from components.semantic_ids.quantize import Tell, check_enough, codebook_tensors, codebooks_of
from components.semantic_ids.shards import ROWS, Codebook, Codes, LocalShards, Matrix, Shards, sample_rows
from infra.errors import DataError, TrainingError
from infra.sections import RqVaeConfig

_ALONE = 10  # one epoch of so many trains the autoencoder without codebooks
_SAMPLE_A_CODE = 32  # rows that the first codewords are found on
_SMALLEST_SAMPLE = 4096
_SINKHORN_PASSES = 50
_SINKHORN_SHARPNESS = 300.0  # exp(-300) is still a double


@dataclass
class RQVAE:
    """Encoder, residual codebooks in its latent space, decoder; trained together.

    Attributes:
        levels: M.
        codes: K.
        settings: widths, epochs and losses.
        seed: of weights, batches and codewords; equal seeds give equal codebooks.
        iterations: passes of the k-means that the codebooks begin with.
        codebooks: one a level, of codewords_KL, without prices.
        network: encoder and decoder; None until fitted.
        scale: features are divided by it, so that a learning rate means the same whatever their length.
    """

    levels: int
    codes: int
    settings: RqVaeConfig
    seed: int = 0
    iterations: int = 25
    codebooks: tuple[Codebook, ...] = field(default=(), repr=False)
    network: _Autoencoder | None = field(default=None, repr=False)
    scale: float = 1.0

    def fit(self, features: Shards, *, before_NM: Codes | None = None, tell: Tell = lambda _level, _pass: None) -> Codes:
        """Train on minibatches, one shard in memory at a time; returns codes_NM as `encode` gives them.

        Args:
            features: rows_ND.
            before_NM: codes of an earlier fit, -1 where there are none: the k-means that the codebooks begin with starts from
                those clusters.
            tell: is told of each epoch, as passes of level 0.

        Raises:
            DataError: fewer rows than codewords, or rows that are not finite.
            TrainingError: the loss or its gradients are not finite.
        """
        check_enough(int(features.sizes.sum()), self.codes)
        width, self.scale = _width_and_scale(features)
        self.network = _Autoencoder([width, *self.settings.hidden_dims, self.settings.latent_dim], self.seed)
        with threadpool_limits(1):  # another number of threads sums in another order, and trains other weights
            self._train(features, before_NM, tell)
        return np.concatenate([self.encode(rows_nD) for rows_nD in _each_shard(features)])

    def encode(self, features_ND: Matrix) -> Codes:
        """codes_NM of any vectors, with frozen weights and codebooks: the nearest codeword of each residual (RankGR Eq. 1)."""
        return quantize.encode(self.project(features_ND), self.codebooks)

    def project(self, features_ND: Matrix) -> Matrix:
        """latents_NL: what is quantized."""
        network = self._fitted()
        latents_NL = np.empty((len(features_ND), network.latent_dim), np.float32)
        with torch.no_grad():
            for at in range(0, len(latents_NL), ROWS):
                latents_NL[at : at + ROWS] = network.encoder(_scaled(features_ND[at : at + ROWS], self.scale)).numpy()
        return latents_NL

    def reconstruct(self, codes_NM: Codes) -> Matrix:
        """rows_ND that the decoder makes of codes: their distance to the features is the reconstruction error."""
        network = self._fitted()
        with torch.no_grad():
            rows_ND: Tensor = network.decoder(torch.from_numpy(quantize.decode(codes_NM, self.codebooks)))
        return np.asarray(rows_ND.numpy() * np.float32(self.scale))

    def tensors(self) -> dict[str, Matrix]:
        """`codebooks` MKL, `prices` MK, `scale` and the weights, `encoder.N.weight` and so on, of layers and their ReLUs in order."""
        weights = {name: weight.numpy().copy() for name, weight in self._fitted().state_dict().items()}
        return {**codebook_tensors(self.codebooks), "scale": np.array([self.scale], np.float32), **weights}

    @classmethod
    def restore(cls, tensors: dict[str, Matrix]) -> Self:
        """The quantizer of such tensors, frozen; its settings say widths, and defaults for what only training needs."""
        codebooks = codebooks_of(tensors)
        layers = sorted(int(name.split(".")[1]) for name in tensors if name.startswith("encoder.") and name.endswith(".bias"))
        widths = [tensors["encoder.0.weight"].shape[1], *(len(tensors[f"encoder.{layer}.bias"]) for layer in layers)]
        network = _Autoencoder(widths, 0)
        network.load_state_dict({name: torch.tensor(tensors[name]) for name in network.state_dict()})
        settings = RqVaeConfig(latent_dim=widths[-1], hidden_dims=widths[1:-1])
        shape = len(codebooks), len(codebooks[0].codewords_KD)
        return cls(*shape, settings, codebooks=codebooks, network=network, scale=float(tensors["scale"][0]))

    def _fitted(self) -> _Autoencoder:
        assert self.network is not None, "fit or restore first"
        return self.network

    def _train(self, features: Shards, before_NM: Codes | None, tell: Tell) -> None:
        """Autoencoder alone, then with codebooks; leaves both in this object."""
        rng = np.random.default_rng(self.seed)
        network, trained = self._fitted(), None
        optimizer = torch.optim.Adam(network.parameters(), lr=self.settings.learning_rate)
        alone = min(math.ceil(self.settings.epochs / _ALONE), self.settings.epochs - 1)
        for epoch in range(self.settings.epochs):
            tell(0, epoch)
            if epoch == alone:
                trained = self._first_codebooks(features, before_NM, rng)
                if self.settings.codebook == "gradient":
                    optimizer.add_param_group({"params": [trained.codewords_MKL]})
            for rows_BD in _batches(features, self.settings.batch, rng):
                _step(network, trained, optimizer, _scaled(rows_BD, self.scale), epoch)
            if trained is not None:
                trained.revive(lambda: self.project(sample_rows(features, self.codes, rng)[1]), rng)
        assert trained is not None
        self.codebooks = tuple(Codebook.free(codewords_KL) for codewords_KL in trained.codewords_MKL.detach().numpy().copy())

    def _first_codebooks(self, features: Shards, before_NM: Codes | None, rng: np.random.Generator) -> _TrainedCodebooks:
        """Residual k-means on the latents of a sample."""
        rows, features_nD = sample_rows(features, max(_SMALLEST_SAMPLE, _SAMPLE_A_CODE * self.codes), rng)
        quantizer = quantize.ResidualKMeans(self.levels, self.codes, iterations=self.iterations, seed=self.seed)
        codes_nM = quantizer.fit(LocalShards(self.project(features_nD)), before_NM=None if before_NM is None else before_NM[rows])
        counts_MK = np.stack([np.bincount(column, minlength=self.codes) for column in codes_nM.T])
        sizes_MK = (counts_MK / len(rows) * min(self.settings.batch, int(features.sizes.sum()))).astype(np.float32)
        return _TrainedCodebooks(quantizer.tensors()["codebooks"], sizes_MK, self.settings)


class _Autoencoder(nn.Module):
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


class _TrainedCodebooks:
    """Codebooks while they learn: quantizes batches, counts who is taken."""

    def __init__(self, codewords_MKL: Matrix, sizes_MK: Matrix, settings: RqVaeConfig) -> None:
        """Begin with codewords, and with how many rows of a batch each of them encodes on average."""
        self._settings = settings
        self.codewords_MKL: Tensor = torch.from_numpy(codewords_MKL).clone()
        if settings.codebook == "gradient":
            self.codewords_MKL = nn.Parameter(self.codewords_MKL)
        self._sizes_MK = torch.from_numpy(sizes_MK)
        self._taken_MK = torch.zeros(sizes_MK.shape, dtype=torch.bool)

    def quantize(self, latents_BL: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of each row's codewords, quantized_BL, and the codebooks' part of the loss.

        Its gradient reaches the encoder through the commitment, and the codewords through the codebook loss where they learn so.
        """
        residual_BL, loss = latents_BL, latents_BL.new_zeros(())
        for level, codewords_KL in enumerate(self.codewords_MKL):
            codes_B = self._assign(level, residual_BL.detach())
            chosen_BL = codewords_KL[codes_B]
            loss = loss + self._settings.commitment * F.mse_loss(residual_BL, chosen_BL.detach())
            if self._settings.codebook == "gradient":
                loss = loss + F.mse_loss(chosen_BL, residual_BL.detach())
            else:
                self._average(level, residual_BL.detach(), codes_B)
            residual_BL = residual_BL - chosen_BL.detach()
        return (latents_BL - residual_BL).detach(), loss

    def _assign(self, level: int, residual_BL: Tensor) -> Tensor:
        distances_BK = _distances(residual_BL, self.codewords_MKL[level].detach())
        evenly = self._settings.sinkhorn and level == len(self.codewords_MKL) - 1
        codes_B = _evenly(distances_BK) if evenly else distances_BK.argmin(1)
        self._taken_MK[level, codes_B] = True
        return codes_B

    def _average(self, level: int, residual_BL: Tensor, codes_B: Tensor) -> None:
        """Move codewords towards the mean of what they encode (van den Oord et al. 2017, appendix A.1, as an increment)."""
        codewords_KL, sizes_K, decay = self.codewords_MKL[level], self._sizes_MK[level], self._settings.ema_decay
        counts_K = torch.bincount(codes_B, minlength=len(sizes_K)).float()
        sums_KL = torch.zeros_like(codewords_KL).index_add_(0, codes_B, residual_BL)
        sizes_K.mul_(decay).add_(counts_K, alpha=1 - decay)
        # The average of a codeword that nobody takes fades away; its place stays.
        pace_K = (1 - decay) / sizes_K.clamp_min(1e-12)
        codewords_KL.add_((sums_KL - counts_K[:, None] * codewords_KL) * pace_K[:, None])

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


def _step(
    network: _Autoencoder, codebooks: _TrainedCodebooks | None, optimizer: torch.optim.Optimizer, rows_BD: Tensor, epoch: int
) -> None:
    """One step down the loss: reconstruction, and the codebooks' part once there are some."""
    latents_BL = network.encoder(rows_BD)
    decoded_from_BL, loss = latents_BL, latents_BL.new_zeros(())
    if codebooks is not None:
        quantized_BL, loss = codebooks.quantize(latents_BL)
        # Straight through: the value of the codewords, the gradient of the latents.
        decoded_from_BL = latents_BL + (quantized_BL - latents_BL).detach()
    loss = loss + F.mse_loss(network.decoder(decoded_from_BL), rows_BD)
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.get_total_norm([weight.grad for weight in network.parameters() if weight.grad is not None])
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        raise TrainingError(
            f"the RQ-VAE's loss is {loss.item():g} with gradients of norm {norm.item():g} in epoch {epoch + 1}",
            where="semantic_ids.rq_vae",
            mend="lower semantic_ids.rq_vae.learning_rate, or take the quantizer rq_kmeans",
        )
    optimizer.step()


def _distances(rows_BL: Tensor, codewords_KL: Tensor) -> Tensor:
    """Squared distances_BK less |row|^2, which no choice depends on."""
    return torch.addmm(codewords_KL.square().sum(1), rows_BL, codewords_KL.T, alpha=-2)


def _evenly(distances_BK: Tensor) -> Tensor:
    """codes_B of an optimal transport that gives each codeword the same mass (Sinkhorn and Knopp; LC-Rec, Zheng et al. 2024)."""
    cost_BK = (distances_BK - distances_BK.amin(1, keepdim=True)).double()
    plan_BK = torch.exp(-_SINKHORN_SHARPNESS * cost_BK / cost_BK.max().clamp_min(1e-12))
    for _ in range(_SINKHORN_PASSES):
        plan_BK /= plan_BK.sum(0, keepdim=True)
        plan_BK /= plan_BK.sum(1, keepdim=True)
    return plan_BK.argmax(1)


def _scaled(rows_nD: Matrix, scale: float) -> Tensor:
    return torch.from_numpy(rows_nD.astype(np.float32) / np.float32(scale))


def _width_and_scale(features: Shards) -> tuple[int, float]:
    """D, and the root mean square of all entries; 1 where they are all zero."""
    squares, entries, width = 0.0, 0, 0
    for rows_nD in _each_shard(features):
        squares += float(np.square(rows_nD, dtype=np.float64).sum())
        entries, width = entries + rows_nD.size, rows_nD.shape[1]
    if not math.isfinite(squares):
        mend = "look for NaN or infinite values in the items' embeddings"
        raise DataError("the item features have values that are not finite", where="semantic_ids.rq_vae", mend=mend)
    # Rounded to what `tensors` stores, so that a restored quantizer computes the same.
    return width, float(np.float32(math.sqrt(squares / entries))) or 1.0


def _each_shard(features: Shards, rng: np.random.Generator | None = None) -> Iterator[Matrix]:
    """rows_nD of one shard after the other; where there is a generator, in random order, and so are the rows of each."""
    for shard in range(len(features.sizes)) if rng is None else rng.permutation(len(features.sizes)):
        rows = np.arange(features.sizes[shard]) if rng is None else rng.permutation(int(features.sizes[shard]))
        yield features.one(int(shard), "pick", rows)


def _batches(features: Shards, batch: int, rng: np.random.Generator) -> Iterator[Matrix]:
    """Every row once, in rows_BD from shards in random order; what a shard has too many goes with the next one."""
    rest_nD: Matrix | None = None
    for rows_nD in _each_shard(features, rng):
        ready_nD = rows_nD if rest_nD is None else np.concatenate([rest_nD, rows_nD])
        whole = len(ready_nD) // batch * batch
        yield from np.split(ready_nD[:whole], whole // batch) if whole else ()
        rest_nD = ready_nD[whole:]
    if rest_nD is not None and len(rest_nD):
        yield rest_nD
