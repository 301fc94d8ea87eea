"""Item features that are quantized: text, a given embedding, collaborative signal; joined with weights, a block of items at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from components.semantic_ids.blocks import Catalogue, NewMatrix, cut, filled
from components.semantic_ids.collaborative import Joined, Timelines, collaborative_signal, judge_signal
from components.semantic_ids.encoder import FeatureEncoder, TextEncoder, width_of
from components.semantic_ids.shards import Ints, Matrix
from infra import records as r
from infra.errors import DataError
from infra.logs import track
from infra.sections import SemanticIdConfig

MOST_TEXTS = 1_000_000


@dataclass(frozen=True)
class ItemFeatures:
    """Features of a catalogue and how to compute those of items that join it.

    Attributes:
        features_ND: float32; an item without any feature has a zero row.
        acceptance: what `judge_signal` found, JSON values; None without timelines or with a `collaborative_weight` of 0.
        encoder: of new items.
        without_features: the zero rows.
    """

    features_ND: Matrix
    acceptance: dict[str, Any] | None
    encoder: FeatureEncoder
    without_features: Ints


def item_features(catalogue: Catalogue, timelines: Timelines, config: SemanticIdConfig, *, new: NewMatrix, seed: int) -> ItemFeatures:
    """Features of all items as one matrix: text, embedding and signal, each scaled to unit norm and weighted, side by side.

    The text encoder is fitted on all texts, or on `MOST_TEXTS` of them at most, evenly spaced. Texts and embeddings are encoded block
    by block, by `config.workers` Ray actors where there are any, with the same result. The collaborative signal is taken if it finds
    neighbours in timelines of users that it was not fitted on (`judge_signal`). It is then fitted again on all of them.

    Args:
        catalogue: texts, empty where there is none, and embeddings, null where there is none; errors name the ids.
        timelines: item indices of each user in time order, training phase only.
        config: weights, dimensions, encoder and workers; these need a Ray session.
        new: makes the matrices, in memory or in files (`blocks.scratch`).
        seed: of the SVDs, the adapter and the users held out.

    Returns:
        the features and the encoder of new items. A part that no item has is left out. An item without any feature is encoded
        to the codes nearest the mean.

    Raises:
        DataError: no item has a feature, an embedding with a value that is not finite or of another width than the rest.
    """
    text = TextEncoder.fit(_some_texts(catalogue), config, seed=seed) if config.text_weight > 0 and any(_texts(catalogue)) else None
    width = width_of(catalogue.blocks(r.ITEM_ID, r.EMBEDDING)) if config.embedding_weight > 0 else 0
    encoder = FeatureEncoder(config, text, width, signal=None)
    features_ND = filled(new, len(catalogue), _content(catalogue, encoder))
    acceptance = None
    if config.collaborative_weight > 0 and len(timelines):
        acceptance = judge_signal(features_ND, timelines, config, seed=seed)
        if acceptance["accepted"]:
            signal = collaborative_signal(features_ND, timelines, config, seed=seed)
            encoder = FeatureEncoder(config, text, width, signal.of_content)
            joined = Joined(features_ND, signal.vectors_NS, config)
            features_ND = filled(new, len(joined), (joined[block] for block in cut(len(joined))))
    if not features_ND.shape[1]:
        raise DataError("no item has a feature", mend="give items with text or embeddings, or raise collaborative_weight")
    return ItemFeatures(features_ND, acceptance, encoder, np.flatnonzero(~features_ND.any(axis=1)))


def _content(catalogue: Catalogue, encoder: FeatureEncoder) -> Iterator[Matrix]:
    """content_nD, block after block."""
    blocks = track(
        catalogue.blocks(r.ITEM_ID, r.TEXT, r.EMBEDDING), total=len(list(cut(len(catalogue)))), step="semantic_ids", unit="blocks of items"
    )
    if not encoder.config.workers:
        return map(encoder.content, blocks)
    from components.semantic_ids.ray_encoding import content_on_ray

    return content_on_ray(encoder, blocks, workers=encoder.config.workers)


def _texts(catalogue: Catalogue) -> Iterator[str]:
    """All texts, one after the other."""
    return itertools.chain.from_iterable(block[r.TEXT].to_pylist() for block in catalogue.blocks(r.TEXT))


def _some_texts(catalogue: Catalogue) -> Iterator[str]:
    """Texts of evenly spaced items."""
    return itertools.islice(_texts(catalogue), None, None, -(-len(catalogue) // MOST_TEXTS))
