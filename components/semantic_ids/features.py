"""Item features that are quantized: text, a given embedding, collaborative signal; joined with weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from components.semantic_ids.collaborative import Matrix, Timelines, collaborative_signal, join, judge_signal
from components.semantic_ids.encoder import Embeddings, FeatureEncoder, TextEncoder, width_of
from infra.errors import DataError
from infra.sections import SemanticIdConfig


@dataclass(frozen=True)
class ItemFeatures:
    """Features of a catalogue and how to compute those of items that join it.

    Attributes:
        features_ND: float32; an item without any feature has a zero row.
        acceptance: what `judge_signal` found, JSON values; None without timelines or with a `collaborative_weight` of 0.
        encoder: of new items.
        without_features: items with a zero row.
    """

    features_ND: Matrix
    acceptance: dict[str, Any] | None
    encoder: FeatureEncoder
    without_features: int


def item_features(
    texts: Sequence[str],
    embeddings: Embeddings,
    timelines: Timelines,
    config: SemanticIdConfig,
    *,
    item_ids: Sequence[str],
    seed: int,
) -> ItemFeatures:
    """Features of all items as one matrix: text, embedding and signal, each scaled to unit norm and weighted, side by side.

    The collaborative signal is taken if it finds neighbours in timelines of users that it was not fitted on (`judge_signal`).
    It is then fitted again on all of them.

    Args:
        texts: text of each item; empty where there is none.
        embeddings: given vector of each item, or None.
        timelines: item indices of each user in time order, training phase only.
        config: weights, dimensions and encoder.
        item_ids: named in errors.
        seed: of the SVDs, the adapter and the users held out.

    Returns:
        the features and the encoder of new items. A part that no item has is left out. An item without any feature is encoded
        to the codes nearest the mean.

    Raises:
        DataError: no item has a feature, an embedding with a value that is not finite or of another width than the rest.
    """
    has_text, has_embedding = config.text_weight > 0 and any(texts), config.embedding_weight > 0
    text = TextEncoder.fit(texts, config, seed=seed) if has_text else None
    encoder = FeatureEncoder(config, text, width_of(embeddings) if has_embedding else 0, signal=None)
    features_ND = encoder.content(texts, embeddings, item_ids)
    acceptance = None
    if config.collaborative_weight > 0 and len(timelines):
        acceptance = judge_signal(features_ND, timelines, config, seed=seed)
        if acceptance["accepted"]:
            signal = collaborative_signal(features_ND, timelines, config, seed=seed)
            encoder = FeatureEncoder(config, text, encoder.embedding_width, signal.of_content)
            features_ND = join(features_ND, signal.vectors_NS, config)
    if not features_ND.shape[1]:
        raise DataError("no item has a feature", mend="give items with text or embeddings, or raise collaborative_weight")
    return ItemFeatures(features_ND, acceptance, encoder, int((~features_ND.any(axis=1)).sum()))
