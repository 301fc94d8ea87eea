"""RQ-VAE: an autoencoder whose latent vectors are quantized residually (RankGR Eq. 1; TIGER, Rajput et al. 2023).

Shapes: N items, D feature width, L latent width, M levels, K codewords a level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from components.semantic_ids import quantize
from components.semantic_ids.quantize import Tell, check_enough, codebook_tensors, codebooks_of
from components.semantic_ids.rq_vae_training import Autoencoder, Model, TrainedCodebooks, Trainer, minibatches
from components.semantic_ids.shards import Codebook, Codes, Ints, LocalShards, Matrix, Shards, chosen_rows
from infra.errors import DataError
from infra.sections import RqVaeConfig

_ALONE = 10  # one epoch of so many trains the autoencoder without codebooks
_SAMPLE_A_CODE = 32  # rows that the first codewords are found on
_SMALLEST_SAMPLE = 4096


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
    network: Autoencoder | None = field(default=None, repr=False)
    scale: float = 1.0

    def fit(self, features: Shards, *, before_NM: Codes | None = None, tell: Tell = lambda _level, _pass: None) -> Codes:
        """Train on minibatches, whose work the processes of the shards share; returns codes_NM as `encode` gives them.

        Args:
            features: rows_ND, of which a few shards are in memory at a time.
            before_NM: codes of an earlier fit, -1 where there are none: the k-means that the codebooks begin with starts from
                those clusters.
            tell: is told of each epoch, as passes of level 0.

        Raises:
            DataError: fewer rows than codewords, or rows that are not finite.
            TrainingError: the loss or its gradients are not finite.
        """
        check_enough(int(features.sizes.sum()), self.codes)
        width, self.scale = _width_and_scale(features)
        self.network = Autoencoder([width, *self.settings.hidden_dims, self.settings.latent_dim], self.seed)
        with threadpool_limits(1):  # another number of threads sums in another order, and trains other weights
            self._train(features, before_NM, tell)
            return np.concatenate(features.every("apply", self.encode))

    def encode(self, features_ND: Matrix) -> Codes:
        """codes_NM of any vectors, with frozen weights and codebooks: the nearest codeword of each residual (RankGR Eq. 1)."""
        return quantize.encode(self.project(features_ND), self.codebooks)

    def project(self, features_ND: Matrix) -> Matrix:
        """latents_NL: what is quantized."""
        return Model(self._fitted(), self.scale).project(features_ND)

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
        network = Autoencoder(widths, 0)
        network.load_state_dict({name: torch.tensor(tensors[name]) for name in network.state_dict()})
        settings = RqVaeConfig(latent_dim=widths[-1], hidden_dims=widths[1:-1])
        shape = len(codebooks), len(codebooks[0].codewords_KD)
        return cls(*shape, settings, codebooks=codebooks, network=network, scale=float(tensors["scale"][0]))

    def _fitted(self) -> Autoencoder:
        assert self.network is not None, "fit or restore first"
        return self.network

    def _train(self, features: Shards, before_NM: Codes | None, tell: Tell) -> None:
        """Autoencoder alone, then with codebooks; leaves both in this object."""
        rng = np.random.default_rng(self.seed)
        trainer = Trainer(self._fitted(), self.scale, self.settings)
        alone = min(math.ceil(self.settings.epochs / _ALONE), self.settings.epochs - 1)
        for epoch in range(self.settings.epochs):
            tell(0, epoch)
            if epoch == alone:
                trainer.begin(self._first_codebooks(features, before_NM, rng))
            for rows in minibatches(features, self.settings.batch, rng):
                trainer.step(features, rows, epoch)
            if trainer.codebooks is not None:
                trainer.codebooks.revive(lambda: self._latents(features, self.codes, rng)[1], rng)
        assert trainer.codebooks is not None
        self.codebooks = tuple(Codebook.free(codewords_KL) for codewords_KL in trainer.codebooks.codewords_MKL.detach().numpy().copy())

    def _first_codebooks(self, features: Shards, before_NM: Codes | None, rng: np.random.Generator) -> TrainedCodebooks:
        """Residual k-means on the latents of a sample."""
        rows, latents_nL = self._latents(features, first_sample_size(self.codes), rng)
        quantizer = quantize.ResidualKMeans(self.levels, self.codes, iterations=self.iterations, seed=self.seed)
        codes_nM = quantizer.fit(LocalShards(latents_nL), before_NM=None if before_NM is None else before_NM[rows])
        counts_MK = np.stack([np.bincount(column, minlength=self.codes) for column in codes_nM.T])
        sizes_MK = (counts_MK / len(rows) * min(self.settings.batch, int(features.sizes.sum()))).astype(np.float32)
        return TrainedCodebooks(quantizer.tensors()["codebooks"], sizes_MK, self.settings)

    def _latents(self, features: Shards, most: int, rng: np.random.Generator) -> tuple[Ints, Matrix]:
        """So many random rows, or all of them: their numbers, rising, and latents_nL."""
        rows, parts = chosen_rows(features, most, rng)
        return rows, np.concatenate(features.each("apply", [(self.project, part) for part in parts]))


def first_sample_size(codes: int) -> int:
    """On how many rows the first codewords are found, at most."""
    return max(_SMALLEST_SAMPLE, _SAMPLE_A_CODE * codes)


def _width_and_scale(features: Shards) -> tuple[int, float]:
    """D, and the root mean square of all entries; 1 where they are all zero."""
    squares, entries = (total.item() for total in features.add_up("apply", _squares))
    if not math.isfinite(squares):
        mend = "look for NaN or infinite values in the items' embeddings"
        raise DataError("the item features have values that are not finite", where="semantic_ids.rq_vae", mend=mend)
    # Rounded to what `tensors` stores, so that a restored quantizer computes the same.
    return entries // int(features.sizes.sum()), float(np.float32(math.sqrt(squares / entries))) or 1.0


def _squares(rows_nD: Matrix) -> tuple[npt.NDArray[np.float64], Ints]:
    """Their sum, and how many they are."""
    return np.square(rows_nD, dtype=np.float64).sum(keepdims=True), np.array([rows_nD.size])
