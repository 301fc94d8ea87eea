"""A catalogue on the frozen codebooks of an earlier table: items that it has keep their SIDs, new ones are encoded, nothing is fitted."""

from __future__ import annotations

import numpy as np

from components.semantic_ids.blocks import Catalogue, NewMatrix, cut, filled
from components.semantic_ids.collisions import resolve_collisions
from components.semantic_ids.encoder import FeatureEncoder
from components.semantic_ids.features import ItemFeatures
from components.semantic_ids.quantize import Quantizer, encode
from components.semantic_ids.shards import Codes, Ints, Matrix
from infra import records as r
from infra.errors import DataError


def frozen_features(catalogue: Catalogue, encoder: FeatureEncoder, new: NewMatrix) -> ItemFeatures:
    """Features of all items by a fitted encoder, a block at a time."""
    features_ND = filled(new, len(catalogue), map(encoder.transform, catalogue.blocks(r.ITEM_ID, r.TEXT, r.EMBEDDING)))
    return ItemFeatures(features_ND, None, encoder, np.flatnonzero(~features_ND.any(axis=1)))


def encode_frozen(vectors_NL: Matrix, quantizer: Quantizer) -> Codes:
    """codes_NM of all items, before anyone keeps an earlier one and before collisions are resolved."""
    return np.concatenate([encode(vectors_NL[block], quantizer.codebooks) for block in cut(len(vectors_NL))])


def join_frozen(
    encoded_NM: Codes,
    vectors_NL: Matrix,
    quantizer: Quantizer,
    before_NM: Codes | None,
    taken_PM: Codes,
    popularity_N: Ints,
    *,
    capacity: int,
) -> Codes:
    """codes_NM: the earlier ones, and for items without one those nearest to what they were encoded to.

    Args:
        before_NM: earlier codes, -1 for new items.
        taken_PM: codes of the whole earlier table.
        capacity: items a SID.

    Raises:
        DataError: there is no room for so many new items.
    """
    assert before_NM is not None, "semantic_ids.freeze goes with semantic_ids.earlier"
    codes_NM = before_NM.copy()
    fresh_N = (before_NM < 0).any(axis=1)
    books = quantizer.codebooks
    room = len(books[0].codewords_KD) ** len(books) * capacity - len(taken_PM)
    if int(fresh_N.sum()) > room:
        raise DataError(
            f"{int(fresh_N.sum())} items are new and there is room for {room} more SIDs",
            where="semantic_ids.freeze",
            mend="fit anew with more codes: run the training pipeline",
        )
    if fresh_N.any():
        new = (encoded_NM[fresh_N], np.asarray(vectors_NL)[fresh_N])
        codes_NM[fresh_N] = resolve_collisions(*new, books, popularity_N[fresh_N], capacity=capacity, taken_PM=taken_PM)
    return codes_NM
