"""Residual quantization: features to codewords, one level after the other (RankGR Eq. 1, GenRec Eq. 1).

Shapes: N items, D feature width, M levels, K codewords a level.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from infra.errors import DataError

Matrix = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int32]


class Quantizer(Protocol):
    """Fits codebooks and encodes vectors; one interface for every kind."""

    codebooks_MKD: Matrix

    def fit(self, embeddings_ND: Matrix) -> Self:
        """Learn the codebooks."""
        ...

    def encode(self, embeddings_ND: Matrix) -> Codes:
        """codes_NM of any vectors on the frozen codebooks."""
        ...


@dataclass
class ResidualKMeans:
    """RQ-k-means: k-means on the vectors, then on what each level left over.

    Attributes:
        levels: M.
        codes: K.
        iterations: Lloyd iterations a level.
        seed: of the initialisation; equal seeds give equal codebooks.
    """

    levels: int
    codes: int
    iterations: int = 25
    seed: int = 0

    def fit(self, embeddings_ND: Matrix) -> Self:
        """Learn M codebooks of K codewords.

        Raises:
            DataError: fewer vectors than codewords.
        """
        if len(embeddings_ND) < self.codes:
            raise DataError(
                f"{len(embeddings_ND)} items cannot fill {self.codes} codewords a level",
                where="semantic_ids.codes",
                mend=f"set it to {max(2, len(embeddings_ND) // 4)} or less",
            )
        residual = embeddings_ND.astype(np.float32, copy=True)
        codebooks = []
        for level in range(self.levels):
            # Threads change the order of sums, and with it the codes of near ties. Fewer distinct vectors than codewords
            # leave some unused, which the statistics tell.
            with threadpool_limits(1), warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                means = KMeans(self.codes, n_init=1, max_iter=self.iterations, random_state=self.seed + level).fit(residual)
            codebook = means.cluster_centers_.astype(np.float32)
            codebooks.append(codebook)
            residual -= codebook[nearest_codes(residual, codebook)]
        self.codebooks_MKD = np.stack(codebooks)
        return self

    def encode(self, embeddings_ND: Matrix) -> Codes:
        """codes_NM of any vectors on the frozen codebooks."""
        return encode(embeddings_ND, self.codebooks_MKD)


def encode(embeddings_ND: Matrix, codebooks_MKD: Matrix) -> Codes:
    """Greedy residual encoding: at each level the nearest codeword, then its residual goes on (RankGR Eq. 1)."""
    residual = embeddings_ND.astype(np.float32, copy=True)
    codes = np.empty((len(residual), len(codebooks_MKD)), dtype=np.int32)
    for level, codebook in enumerate(codebooks_MKD):
        codes[:, level] = nearest_codes(residual, codebook)
        residual -= codebook[codes[:, level]]
    return codes


def decode(codes_NM: Codes, codebooks_MKD: Matrix) -> Matrix:
    """Sum of the codewords: the reconstruction of each item."""
    levels = np.arange(len(codebooks_MKD))
    return np.asarray(codebooks_MKD[levels, codes_NM].sum(axis=1), dtype=np.float32)


def squared_distances(vectors_ND: Matrix, codebook_KD: Matrix) -> Matrix:
    """distances_NK between vectors and codewords."""
    cross = vectors_ND @ codebook_KD.T
    return np.asarray((vectors_ND**2).sum(1)[:, None] - 2 * cross + (codebook_KD**2).sum(1)[None], dtype=np.float32)


def nearest_codes(vectors_ND: Matrix, codebook_KD: Matrix, block: int = 65_536) -> npt.NDArray[np.int32]:
    """Index of the nearest codeword of each vector, computed in blocks of rows."""
    parts = [squared_distances(vectors_ND[i : i + block], codebook_KD).argmin(1) for i in range(0, len(vectors_ND), block)]
    return np.concatenate(parts).astype(np.int32) if parts else np.empty(0, dtype=np.int32)
