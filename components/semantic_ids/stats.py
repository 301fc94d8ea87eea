"""How good a SID table is: collisions, use of the codebooks level by level, reconstruction, neighbours.

Shapes: N items, L width that is quantized, M levels, K codewords a level, P pairs of items.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from components.semantic_ids.quantize import Quantizer
from components.semantic_ids.shards import ROWS, Codes, Ints, Matrix
from components.semantic_ids.table import run_lengths, sid_numbers


def sid_statistics(features_ND: Matrix, encoded_NM: Codes, final_NM: Codes, quantizer: Quantizer) -> dict[str, Any]:
    """Figures of a SID table as JSON values.

    Args:
        features_ND: what the quantizer was fitted on.
        encoded_NM: nearest codes, before collisions were resolved.
        final_NM: the table.
        quantizer: that gave the codes.

    Returns:
        `items`, `sids` (distinct ones), `collision_rate` (share of items that share their SID) before and after,
        `largest_bucket` (items of the fullest SID), `moved` items, `duplicates` (items whose vector is exactly that of another
        item), `reconstruction_error` (share of the features' variance lost), and of each of the `levels` what `level_statistics`
        tells, `utilisation_before` (share of codewords that `encoded_NM` uses) and `conditional_entropy`: bits that a codeword
        adds once the codewords before it are known. A level in the middle with much less entropy than its neighbours is the
        hourglass of residual quantization (arXiv:2407.21488).
    """
    joint, sizes = [0.0], np.empty(0, np.int64)
    for sizes in prefix_sizes(final_NM):
        joint.append(entropy(sizes))
    levels = [
        level_statistics(np.bincount(codes_N, minlength=len(book.codewords_KD)))
        for codes_N, book in zip(final_NM.T, quantizer.codebooks, strict=True)
    ]
    for level, figures in enumerate(levels):
        figures["conditional_entropy"] = max(joint[level + 1] - joint[level], 0.0)
        figures["utilisation_before"] = len(np.unique(encoded_NM[:, level])) / len(quantizer.codebooks[level].codewords_KD)
    return {
        "items": len(final_NM),
        "sids": len(sizes),
        "collision_rate_before": _collision_rate(bucket_sizes(encoded_NM)),
        "collision_rate": _collision_rate(sizes),
        "largest_bucket": int(sizes.max()),
        "moved": int((encoded_NM != final_NM).any(axis=1).sum()),
        "duplicates": _duplicates(features_ND),
        "reconstruction_error": _reconstruction_error(features_ND, final_NM, quantizer),
        "levels": levels,
    }


def prefix_hit_rate(codes_NM: Codes, pairs_P2: npt.NDArray[np.integer]) -> dict[str, Any]:
    """How often items that belong together begin with the same codewords.

    Args:
        codes_NM: the table.
        pairs_P2: rows of the table that occurred together; pairs of an item with itself say nothing and are left out.

    Returns:
        `pairs` (how many were left), and lists with a figure a level, of the first codeword, the first two, ...: `rates` (share
        of pairs that have them in common), `chance` (that of two different items drawn evenly) and `chance_popular` (that of two
        items drawn as often as they stand in pairs, so that popular items in few codewords do not pass for neighbours).
        Without pairs the lists hold None, but `chance`.
    """
    left, right = pairs_P2[pairs_P2[:, 0] != pairs_P2[:, 1]].T
    assert pairs_P2.size == 0 or pairs_P2.min() >= 0, "no item is missing"
    rates: list[float | None] = []
    popular: list[float | None] = []
    chance: list[float] = []
    for level, counts in enumerate(prefix_sizes(codes_NM)):
        sizes = counts.astype(np.float64)
        prefixes = codes_NM[left, : level + 1], codes_NM[right, : level + 1]
        _, ends = np.unique(np.concatenate(prefixes), axis=0, return_counts=True)
        rates.append(float((prefixes[0] == prefixes[1]).all(axis=1).mean()) if len(left) else None)
        chance.append(float((sizes * (sizes - 1)).sum() / max(len(codes_NM) * (len(codes_NM) - 1), 1)))
        popular.append(float((ends.astype(np.float64) ** 2).sum() / (2 * len(left)) ** 2) if len(left) else None)
    return {"pairs": len(left), "rates": rates, "chance": chance, "chance_popular": popular}


def level_statistics(counts_K: npt.NDArray[np.integer]) -> dict[str, Any]:
    """How a level uses its codewords.

    Args:
        counts_K: items of each codeword, at least one item in all.

    Returns:
        `utilisation` (share of codewords used), `entropy` in bits, `perplexity` (2 to the entropy: as many codewords, evenly used,
        would tell as much), `gini` (over all codewords; 0 is even), `size_min` and `size_max` (items of the rarest and of
        the most frequent codeword) and the `counts`, falling.
    """
    bits = entropy(counts_K)
    return {
        "utilisation": float((counts_K > 0).mean()),
        "perplexity": 2**bits,
        "entropy": bits,
        "gini": gini(counts_K),
        "size_min": int(counts_K.min()),
        "size_max": int(counts_K.max()),
        "counts": sorted(counts_K.tolist(), reverse=True),
    }


def entropy(counts: npt.NDArray[np.integer]) -> float:
    """Bits of the distribution that the counts are of; 0 where there is nothing."""
    share = counts[counts > 0] / max(counts.sum(), 1)
    return max(float(-(share * np.log2(share)).sum()), 0.0)


def gini(counts: npt.NDArray[np.integer]) -> float:
    """Gini coefficient: 0 where all counts are equal, (K - 1) / K where one of K has everything; 0 where there is nothing."""
    rising = np.sort(counts).astype(np.float64)
    ranks = np.arange(1, len(rising) + 1)
    # Half the mean difference between two counts over their mean.
    return max(float(((2 * ranks - len(rising) - 1) * rising).sum() / max(len(rising) * rising.sum(), 1.0)), 0.0)


def bucket_sizes(codes_NM: Codes) -> Ints:
    """Items of each SID that is used, in the order of the SIDs."""
    *_, sizes = prefix_sizes(codes_NM)
    return sizes


def prefix_sizes(codes_NM: Codes) -> Iterator[Ints]:
    """Level by level, the items of each prefix that is used, in the order of the prefixes."""
    n_codes, levels = int(codes_NM.max()) + 1, codes_NM.shape[1]
    numbers_N = sid_numbers(codes_NM, n_codes)
    numbers_N.sort()
    for level in range(levels):
        yield run_lengths(numbers_N // n_codes ** (levels - 1 - level))


def _collision_rate(sizes: Ints) -> float:
    return float(sizes[sizes > 1].sum() / sizes.sum())


def _duplicates(vectors_NL: Matrix) -> int:
    """Rows that occur more than once; by hashes of 64 bits, of which ten million rows have two alike by chance once in 300,000 times."""
    hashes_N = np.empty(len(vectors_NL), np.uint64)
    for start in range(0, len(vectors_NL), ROWS):
        rows = np.ascontiguousarray(vectors_NL[start : start + ROWS]) + 0.0  # -0.0 becomes 0.0
        hashes_N[start : start + ROWS] = np.frombuffer(b"".join(blake2b(row, digest_size=8).digest() for row in rows), np.uint64)
    hashes_N.sort()
    counts = run_lengths(hashes_N)
    return int(counts[counts > 1].sum())


def _reconstruction_error(features_ND: Matrix, codes_NM: Codes, quantizer: Quantizer) -> float:
    """Share of the variance lost, block by block: no second matrix of that size."""
    mean_D = features_ND.mean(axis=0, dtype=np.float64)
    error = spread = 0.0
    for start in range(0, len(features_ND), ROWS):
        block, codes = features_ND[start : start + ROWS], codes_NM[start : start + ROWS]
        error += float(((block - quantizer.reconstruct(codes)) ** 2).sum(dtype=np.float64))
        spread += float(((block - mean_D) ** 2).sum())
    return error / max(spread, 1e-12)
