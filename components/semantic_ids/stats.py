"""How good a SID table is: collisions, use of the codebooks, reconstruction."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from components.semantic_ids.quantize import Codes, Matrix, decode


def sid_statistics(features_ND: Matrix, encoded_NM: Codes, final_NM: Codes, codebooks_MKD: Matrix) -> dict[str, Any]:
    """Figures of a SID table as JSON values.

    Args:
        features_ND: what was quantized.
        encoded_NM: nearest codes, before collisions were resolved.
        final_NM: the table.
        codebooks_MKD: the codewords.

    Returns:
        `collision_rate` (share of items that share their SID) before and after, `largest_bucket`, `moved` items,
        `reconstruction_error` (share of the variance lost), and per level `utilisation` (share of codewords used),
        `perplexity` (2 to the entropy) and the `counts` of codewords, falling.
    """
    n_codes = codebooks_MKD.shape[1]
    error = ((features_ND - decode(final_NM, codebooks_MKD)) ** 2).sum()
    spread = ((features_ND - features_ND.mean(axis=0)) ** 2).sum()
    return {
        "items": len(final_NM),
        "collision_rate_before": _collision_rate(encoded_NM),
        "collision_rate": _collision_rate(final_NM),
        "largest_bucket": max(Counter(map(tuple, final_NM.tolist())).values()),
        "moved": int((encoded_NM != final_NM).any(axis=1).sum()),
        "reconstruction_error": float(error / max(spread, 1e-12)),
        "levels": [_level_statistics(final_NM[:, level], n_codes) for level in range(final_NM.shape[1])],
    }


def _collision_rate(codes_NM: Codes) -> float:
    buckets = Counter(map(tuple, codes_NM.tolist()))
    return sum(count for count in buckets.values() if count > 1) / max(len(codes_NM), 1)


def _level_statistics(codes_N: npt.NDArray[np.integer], n_codes: int) -> dict[str, Any]:
    counts = np.bincount(codes_N, minlength=n_codes)
    share = counts[counts > 0] / counts.sum()
    return {
        "utilisation": float((counts > 0).mean()),
        "perplexity": float(2 ** -(share * np.log2(share)).sum()),
        "counts": sorted(counts.tolist(), reverse=True),
    }
