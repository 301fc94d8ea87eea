"""The bundle: unit of registry, release and serving. Weights, SIDs, catalogue and settings in one committed folder.

    config.json         the run's configuration
    model.safetensors   weights; the SID codes are among them
    sids.parquet        SIDS         quantizer.safetensors, features.safetensors, words.json: for items to come
    catalogue.parquet   CATALOGUE    manifest.json: sha256 of each file, hash of the SID table

A file with a wrong hash, or weights trained on another SID table, is refused before anything is loaded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from safetensors import SafetensorError, safe_open

from components.semantic_ids.coder import FILES as CODER_FILES
from components.semantic_ids.table import codes_of, sid_hash
from components.semantic_ids.trie import Trie, build_trie
from infra import records as r
from infra import storage
from infra.config import Config
from infra.errors import IntegrityError

if TYPE_CHECKING:  # torch is imported where a model is restored: writing a bundle, and skipping a step, go without
    from torch import Tensor

    from components.retriever.model import Retriever
    from components.retriever.recommender import RetrieverRecommender

CONFIG, WEIGHTS, SIDS, CATALOGUE = "config.json", "model.safetensors", "sids.parquet", "catalogue.parquet"
_SID_HASH, _CODES = "sid_hash", "sid_codes"


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle.

    Attributes:
        version: first 12 digits of the hash over all files.
        config: settings that the model was trained with.
        sids: SIDS table.
        catalogue: CATALOGUE table, sorted by item index.
        weights: state of the model.
    """

    version: str
    config: Config
    sids: pa.Table
    catalogue: pa.Table
    weights: Mapping[str, Tensor]

    @cached_property
    def item_ids(self) -> list[str]:
        """Item id of each item index."""
        return list(self.catalogue[r.ITEM_ID].to_pylist())

    @cached_property
    def titles(self) -> list[str]:
        """Title of each item index."""
        return list(self.catalogue[r.TITLE].to_pylist())

    @cached_property
    def popularity(self) -> npt.NDArray[np.int64]:
        """Positive training events of each item."""
        return np.asarray(self.catalogue[r.POPULARITY].to_numpy(), dtype=np.int64)

    @cached_property
    def trie(self) -> Trie:
        """The trie of live items."""
        return build_trie(codes_of(self.sids), self.popularity, n_codes=self.config.semantic_ids.codes)

    def model(self) -> Retriever:
        """The retriever with its weights, in evaluation mode."""
        return restore_model(self.config, codes_of(self.sids), self.weights)

    def recommender(self) -> RetrieverRecommender:
        """The retriever as a recommender, decoding as configured."""
        from components.retriever.recommender import RetrieverRecommender

        return RetrieverRecommender(self.model(), self.trie, self.config.decoding)


def restore_model(config: Config, codes_NM: npt.NDArray[np.integer], weights: Mapping[str, Tensor]) -> Retriever:
    """A retriever from its weights.

    Raises:
        IntegrityError: weights trained on another SID table, of another architecture, or not finite.
    """
    import torch

    from components.retriever.model import Retriever, architecture_of

    trained = weights.get(_CODES)
    _require_same(None if trained is None else trained.numpy(), codes_NM)
    broken = [name for name, tensor in weights.items() if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())]
    if broken:
        raise IntegrityError(f"weights hold NaN or infinity: {', '.join(broken[:3])}", where=WEIGHTS, mend="train again with a lower rate")
    architecture = architecture_of(weights)
    if (architecture is None) != (config.retriever.backbone == "tiny"):
        raise IntegrityError(
            "weights and configuration do not match: another kind of backbone", where=WEIGHTS, mend="keep the bundle's config"
        )
    model = Retriever(
        config.retriever,
        codes_NM,
        n_codes=config.semantic_ids.codes,
        positive_level=config.split.positive_level,
        architecture=architecture,
    )
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise IntegrityError(f"weights and configuration do not match: {error}", where=WEIGHTS, mend="keep the bundle's config") from error
    return model.eval()


def write_bundle(
    uri: str,
    *,
    config: Config,
    weights: bytes,
    sids: pa.Table,
    catalogue: pa.Table,
    coder: str,
    metadata: Mapping[str, Any],
) -> storage.Manifest:
    """Write and commit a bundle.

    Args:
        weights: a safetensors file.
        coder: folder with the files of `components.semantic_ids.coder`.
        metadata: added to the manifest (metrics, lineage).
    """
    storage.write_bytes(storage.join(uri, CONFIG), config.to_json().encode())
    storage.write_bytes(storage.join(uri, WEIGHTS), weights)
    for name in CODER_FILES:
        storage.write_bytes(storage.join(uri, name), storage.read_bytes(storage.join(coder, name)))
    storage.write_table(sids, storage.join(uri, SIDS))
    storage.write_table(catalogue, storage.join(uri, CATALOGUE))
    return storage.commit(uri, {**metadata, _SID_HASH: sid_hash(sids)})


def verified_version(uri: str) -> str:
    """The version of a bundle that `load_bundle` would take, as far as that can be said without torch.

    Raises:
        IntegrityError: as `load_bundle`.
    """
    manifest, sids = _verified(uri)
    weights = storage.join(uri, WEIGHTS)
    with _local_copy(weights) as path, _safetensors_errors(weights), safe_open(path, framework="numpy") as tensors:
        _require_same(tensors.get_tensor(_CODES) if _CODES in tensors.keys() else None, codes_of(sids))  # noqa: SIM118 - no mapping
    return manifest.digest[:12]


@contextmanager
def _local_copy(uri: str) -> Iterator[str]:
    """Path of a file, which is fetched if it lies elsewhere."""
    if storage.is_local(uri):
        yield storage.filesystem(uri)[1]
        return
    with tempfile.NamedTemporaryFile() as copy:
        copy.write(storage.read_bytes(uri))
        copy.flush()
        yield copy.name


def _require_same(trained: npt.NDArray[np.integer] | None, codes_NM: npt.NDArray[np.integer]) -> None:
    if trained is None or not np.array_equal(trained, codes_NM):
        raise IntegrityError(
            "the weights were trained on another SID table", where=WEIGHTS, mend="train again, or use the table it was trained on"
        )


def load_bundle(uri: str) -> Bundle:
    """Read a bundle after all its hashes have been checked.

    Raises:
        IntegrityError: no manifest, a missing file, a wrong hash, a SID table that is not the one of the manifest, weights
            in another format than safetensors.
    """
    from safetensors.torch import load

    manifest, sids = _verified(uri)
    with _safetensors_errors(storage.join(uri, WEIGHTS)):
        weights = load(storage.read_bytes(storage.join(uri, WEIGHTS)))
    return Bundle(
        version=manifest.digest[:12],
        config=Config.from_json(storage.read_bytes(storage.join(uri, CONFIG)).decode()),
        sids=sids,
        catalogue=storage.read_table(storage.join(uri, CATALOGUE)),
        weights=weights,
    )


def _verified(uri: str) -> tuple[storage.Manifest, pa.Table]:
    """Manifest and SID table of a bundle whose files and hashes are as they should be."""
    manifest = storage.open_committed(uri)
    missing = {CONFIG, WEIGHTS, SIDS, CATALOGUE, *CODER_FILES} - manifest.files.keys()
    if missing:
        raise IntegrityError(f"the bundle lacks {', '.join(sorted(missing))}", where=uri, mend="release the model again")
    sids = storage.read_table(storage.join(uri, SIDS))
    if manifest.metadata.get(_SID_HASH) != sid_hash(sids):
        raise IntegrityError("the SID table is not the one that the bundle was made with", where=uri, mend="release the model again")
    return manifest, sids


@contextmanager
def _safetensors_errors(where: str) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise IntegrityError(f"not a safetensors file: {error}", where=where, mend="release the model again") from error
