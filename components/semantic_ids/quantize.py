"""Residual quantization: features to codewords, one level after the other (RankGR Eq. 1, GenRec Eq. 1).

Shapes: N items, D feature width, L width that is quantized, M levels, K codewords a level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np

from components.semantic_ids.kmeans import fit_codebook
from components.semantic_ids.shards import Codebook, Codes, Matrix, Shards, nearest
from infra.errors import DataError

Tell = Callable[[int, int], None]  # level, pass


def _silent(_level: int, _pass: int) -> None:
    """Tell nobody."""


class Quantizer(Protocol):
    """Fits codebooks and encodes vectors; one interface for every kind.

    Attributes:
        codebooks: one a level.
    """

    codebooks: tuple[Codebook, ...]

    def fit(self, features: Shards, *, before_NM: Codes | None = None, tell: Tell = _silent) -> Codes:
        """Learn the codebooks; returns codes_NM of the rows, in their order.

        Args:
            features: rows_ND.
            before_NM: codes of an earlier fit, -1 for items that it did not have: what did not change keeps its codes where it can.
            tell: is told of each level and pass.
        """
        ...

    def encode(self, features_ND: Matrix) -> Codes:
        """codes_NM of any vectors on the frozen codebooks."""
        ...

    def project(self, features_ND: Matrix) -> Matrix:
        """vectors_NL that are quantized."""
        ...

    def reconstruct(self, codes_NM: Codes) -> Matrix:
        """features_ND that codes stand for."""
        ...

    def tensors(self) -> dict[str, Matrix]:
        """All that `restore` needs."""
        ...

    @classmethod
    def restore(cls, tensors: dict[str, Matrix]) -> Self:
        """The quantizer of such tensors, frozen."""
        ...


@dataclass
class ResidualKMeans:
    """RQ-k-means: k-means on the vectors, then on what each level left over; balanced or not.

    Attributes:
        levels: M.
        codes: K.
        iterations: passes a level.
        seed: of the first codewords; equal seeds give equal codebooks.
        balanced: codewords of a level have the same number of items, give or take one (OneRec Algorithm 1). Codes of `fit` then
            are exactly even, before collisions are resolved; `encode` gives what is cheapest at the prices found, which is even
            only roughly.
    """

    levels: int
    codes: int
    iterations: int = 25
    seed: int = 0
    balanced: bool = False
    codebooks: tuple[Codebook, ...] = field(default=(), repr=False)

    def fit(self, features: Shards, *, before_NM: Codes | None = None, tell: Tell = _silent) -> Codes:
        """Learn M codebooks of K codewords; returns codes_NM.

        Raises:
            DataError: fewer vectors than codewords.
        """
        check_enough(int(features.sizes.sum()), self.codes)
        found, columns = [], []
        for level in range(self.levels):
            codebook = fit_codebook(
                features,
                self.codes,
                iterations=self.iterations,
                seed=self.seed + level,
                balanced=self.balanced,
                before_N=None if before_NM is None else before_NM[:, level],
                tell=lambda number, level=level: tell(level, number),  # type: ignore[misc]
            )
            columns.append(np.concatenate(features.every("finish_level", codebook.codewords_KD)))
            found.append(codebook)
        self.codebooks = tuple(found)
        return np.stack(columns, axis=1)

    def encode(self, features_ND: Matrix) -> Codes:
        """codes_NM of any vectors on the frozen codebooks."""
        return encode(features_ND, self.codebooks)

    def project(self, features_ND: Matrix) -> Matrix:
        """The features themselves."""
        return features_ND

    def reconstruct(self, codes_NM: Codes) -> Matrix:
        """Sums of codewords."""
        return decode(codes_NM, self.codebooks)

    def tensors(self) -> dict[str, Matrix]:
        """Codebooks and prices."""
        return codebook_tensors(self.codebooks)

    @classmethod
    def restore(cls, tensors: dict[str, Matrix]) -> Self:
        """Of codebooks and prices."""
        return cls.frozen(codebooks_of(tensors))

    @classmethod
    def frozen(cls, codebooks: Sequence[Codebook]) -> Self:
        """With such codebooks, for encoding."""
        return cls(len(codebooks), len(codebooks[0].codewords_KD), codebooks=tuple(codebooks))


def check_enough(items: int, codes: int) -> None:
    """Refuse fewer items than codewords.

    Raises:
        DataError: with a number that would do.
    """
    if items < codes:
        raise DataError(
            f"{items} items cannot fill {codes} codewords a level",
            where="semantic_ids.codes",
            mend=f"set it to {max(2, items // 4)} or less",
        )


def codebook_tensors(codebooks: Sequence[Codebook]) -> dict[str, Matrix]:
    """Codebooks as tensors that can be stored: `codebooks` MKL and `prices` MK."""
    return {"codebooks": np.stack([c.codewords_KD for c in codebooks]), "prices": np.stack([c.prices_K for c in codebooks])}


def codebooks_of(tensors: dict[str, Matrix]) -> tuple[Codebook, ...]:
    """Inverse of `codebook_tensors`."""
    return tuple(Codebook(codewords, prices) for codewords, prices in zip(tensors["codebooks"], tensors["prices"], strict=True))


def encode(vectors_NL: Matrix, codebooks: Sequence[Codebook]) -> Codes:
    """Greedy residual encoding: at each level the cheapest codeword, then its residual goes on (RankGR Eq. 1)."""
    residual = vectors_NL.astype(np.float32, copy=True)
    codes = np.empty((len(residual), len(codebooks)), dtype=np.int32)
    for level, codebook in enumerate(codebooks):
        codes[:, level], _ = nearest(residual, codebook)
        residual -= codebook.codewords_KD[codes[:, level]]
    return codes


def decode(codes_NM: Codes, codebooks: Sequence[Codebook]) -> Matrix:
    """Sum of the codewords: the reconstruction of each item."""
    return np.asarray(sum(book.codewords_KD[codes_NM[:, level]] for level, book in enumerate(codebooks)), dtype=np.float32)
