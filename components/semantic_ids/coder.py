"""What gives an item its SID, frozen: the encoder of its features and the quantizer. Stored without pickle, beside the SID table.

`quantizer.safetensors` holds codebooks, prices and the autoencoder of `rq_vae`; `features.safetensors` what features are made of and
`words.json` the vocabulary of the text encoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from safetensors.numpy import load, save

from components.semantic_ids.encoder import FeatureEncoder, Items
from components.semantic_ids.quantize import Quantizer, ResidualKMeans, encode
from components.semantic_ids.shards import Codes, Matrix
from infra import records as r
from infra import storage
from infra.logs import get_logger
from infra.sections import SemanticIdConfig

QUANTIZER, FEATURES, WORDS = "quantizer.safetensors", "features.safetensors", "words.json"
FILES = (QUANTIZER, FEATURES, WORDS)


def new_quantizer(settings: SemanticIdConfig, *, seed: int) -> Quantizer:
    """The quantizer that the settings name, to be fitted."""
    if settings.quantizer == "rq_vae":
        from components.semantic_ids.rq_vae import RQVAE  # brings torch

        return RQVAE(settings.levels, settings.codes, settings.rq_vae, seed=seed, iterations=settings.iterations)
    balanced = settings.quantizer == "balanced_rq_kmeans"
    return ResidualKMeans(settings.levels, settings.codes, settings.iterations, seed, balanced)


@dataclass(frozen=True)
class Coder:
    """Features and quantizer of a SID table."""

    encoder: FeatureEncoder
    quantizer: Quantizer

    def encode(self, items: Items) -> tuple[Matrix, Codes]:
        """vectors_NL that are quantized and codes_NM of items, before collisions are resolved.

        Args:
            items: CATALOGUE rows, which need not be in any catalogue.

        Raises:
            DataError: embeddings that are not finite or of another width than those that the features were made with.
        """
        features = self.encoder.transform(items)
        blank = items[r.ITEM_ID].filter(pa.array(~features.any(axis=1)))
        if len(blank):
            warn_of_blank(len(blank), blank[:5].to_pylist())
        vectors = self.quantizer.project(features)
        return vectors, encode(vectors, self.quantizer.codebooks)

    def write(self, uri: str) -> None:
        """Write the files below `uri`."""
        storage.write_bytes(storage.join(uri, QUANTIZER), _packed(self.quantizer.tensors()))
        storage.write_bytes(storage.join(uri, FEATURES), _packed(self.encoder.tensors()))
        storage.write_json(storage.join(uri, WORDS), self.encoder.words())

    @staticmethod
    def read(uri: str, settings: SemanticIdConfig) -> Coder:
        """Inverse of `write`, given the settings that it was made with."""
        tensors = load(storage.read_bytes(storage.join(uri, FEATURES)))
        encoder = FeatureEncoder.restore(settings, tensors, storage.read_json(storage.join(uri, WORDS)))
        return Coder(encoder, read_quantizer(uri, settings))


def read_quantizer(uri: str, settings: SemanticIdConfig) -> Quantizer:
    """The fitted quantizer of a SID folder or a bundle."""
    tensors = load(storage.read_bytes(storage.join(uri, QUANTIZER)))
    if settings.quantizer == "rq_vae":
        from components.semantic_ids.rq_vae import RQVAE

        return RQVAE.restore(tensors)
    return ResidualKMeans.restore(tensors)


def warn_of_blank(count: int, names: list[str]) -> None:
    """Tell of so many items without a feature, and of a few of them by name."""
    get_logger("semantic_ids").warning("items without a feature: their codes say nothing", items=count, such_as=names)


def _packed(tensors: dict[str, Matrix]) -> bytes:
    return bytes(save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}))
