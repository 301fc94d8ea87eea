"""From the content of any item, new ones too, to the features that codebooks were fitted on, without refitting.

Shapes: N items, V words, D content width, S signal width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from components.semantic_ids.collaborative import SignalOfContent, join, unit
from components.semantic_ids.shards import Matrix
from infra import records as r
from infra import storage
from infra.errors import DataError, ServiceError
from infra.sections import SemanticIdConfig

Tensors = dict[str, npt.NDArray[Any]]
Items: TypeAlias = pa.RecordBatch | pa.Table  # CATALOGUE rows
_TEXT, _SIGNAL, _NAMED = "text.", "signal.", 5


@dataclass(frozen=True)
class TextEncoder:
    """TF-IDF and SVD as fitted on a catalogue, or a sentence-transformers model by its name.

    Attributes:
        name: `tfidf`, or name, folder or s3:// URI of the model.
        words: vocabulary in the order of columns; empty for a model.
        idf_V: inverse document frequencies.
        components_WV: directions that counts are projected on.
    """

    name: str
    words: tuple[str, ...] = ()
    idf_V: Matrix = field(default_factory=lambda: np.empty(0, np.float32))
    components_WV: Matrix = field(default_factory=lambda: np.empty((0, 0), np.float32))

    @classmethod
    def fit(cls, texts: Iterable[str], config: SemanticIdConfig, *, seed: int) -> TextEncoder:
        """Learn vocabulary and directions; a model by name has nothing to learn.

        Args:
            texts: asked for once, one after the other: only their counts are held.
            config: encoder and `text_dim`.
            seed: of the SVD.

        Raises:
            DataError: the texts hold no words.
        """
        if config.text_encoder != "tfidf":
            return cls(config.text_encoder)
        vectorizer = _vectorizer(None)
        try:
            counts = vectorizer.fit_transform(texts)
        except ValueError as error:  # only stop words or punctuation
            raise DataError("the item texts hold no words", where="columns.text", mend="choose other text columns") from error
        words = tuple(str(word) for word in vectorizer.get_feature_names_out())
        return cls("tfidf", words, vectorizer.idf_.astype(np.float32), _directions(counts, config.text_dim, seed))

    def encode(self, texts: Sequence[str]) -> Matrix:
        """Vectors of texts; zero where no word is known.

        Raises:
            ServiceError: sentence-transformers is not installed.
        """
        if self.name != "tfidf":
            return _sentence_embeddings(texts, self.name)
        return np.asarray(self._vectorizer.transform(texts) @ self.components_WV.T, dtype=np.float32)

    @cached_property
    def _vectorizer(self) -> Any:
        vectorizer = _vectorizer(self.words)
        vectorizer.idf_ = self.idf_V
        return vectorizer


@dataclass(frozen=True)
class FeatureEncoder:
    """Computes features of items as `item_features` did, in parts: text, given embedding, collaborative signal.

    Attributes:
        config: weights and kinds.
        text: None where there is no text part.
        embedding_width: 0 where there is no such part.
        signal: the collaborative part of an item that nobody had yet, from its content; None where there is no such part.
    """

    config: SemanticIdConfig
    text: TextEncoder | None
    embedding_width: int
    signal: SignalOfContent | None

    def content(self, items: Items) -> Matrix:
        """Weighted text and embedding parts content_ND, each of unit norm times its weight or zero; D is 0 without either.

        Args:
            items: their ids, which errors name, texts, empty where there is none, and embeddings, null where there is none.

        Raises:
            DataError: an embedding with a value that is not finite or of another width than the rest.
        """
        parts = [np.empty((len(items), 0), np.float32)]
        if self.text is not None:
            parts.append(self.config.text_weight * unit(self.text.encode(items[r.TEXT].to_pylist())))
        if self.embedding_width:
            parts.append(self.config.embedding_weight * unit(given_embeddings(items, self.embedding_width)))
        return np.concatenate(parts, axis=1)

    def transform(self, items: Items) -> Matrix:
        """Features of items of which no timeline tells anything.

        Args:
            items: as for `content`.

        Returns:
            features_ND as wide as those that `item_features` gave. Their collaborative part is estimated from the content (see
            `SignalOfContent`); an item without content has a zero row.

        Raises:
            DataError: an embedding with a value that is not finite or of another width than those fitted on.
        """
        content_ND = self.content(items)
        if self.signal is None:
            return content_ND
        return join(content_ND, self.signal.estimate(content_ND, self.config.collaborative_weight), self.config)

    def tensors(self) -> Tensors:
        """All that `restore` needs beside the configuration and `words`."""
        found: Tensors = {"embedding_width": np.array([self.embedding_width], np.int64)}
        if self.text is not None:
            found |= {_TEXT + "idf_V": self.text.idf_V, _TEXT + "components_WV": self.text.components_WV}
        if self.signal is not None:
            found |= {_SIGNAL + name: tensor for name, tensor in self.signal.tensors().items()}
        return {name: np.ascontiguousarray(tensor) for name, tensor in found.items()}

    def words(self) -> list[str]:
        """The vocabulary in the order of columns; empty without TF-IDF."""
        return [] if self.text is None else list(self.text.words)

    @classmethod
    def restore(cls, config: SemanticIdConfig, tensors: Mapping[str, npt.NDArray[Any]], words: Sequence[str]) -> FeatureEncoder:
        """The encoder of such tensors and words, under the configuration that it was fitted with."""
        text = None
        if _TEXT + "idf_V" in tensors:
            text = TextEncoder(config.text_encoder, tuple(words), tensors[_TEXT + "idf_V"], tensors[_TEXT + "components_WV"])
        signal = {name.removeprefix(_SIGNAL): tensor for name, tensor in tensors.items() if name.startswith(_SIGNAL)}
        width = int(tensors["embedding_width"][0])
        return cls(config, text, width, SignalOfContent.restore(signal) if signal else None)


def width_of(blocks: Iterable[Items]) -> int:
    """The one width of the embeddings given; 0 where none is.

    Raises:
        DataError: they differ, or hold values that are not finite; of these items the first are named.
    """
    widths: set[int] = set()
    bad, names = 0, list[str]()
    for items in blocks:
        widths |= set(pc.unique(pc.list_value_length(items[r.EMBEDDING])).drop_null().to_pylist())
        wrong = _not_finite(items)
        bad, names = bad + len(wrong), names + wrong[: _NAMED - len(names)]
    if len(widths) > 1:
        raise DataError(f"item embeddings have different widths: {sorted(widths)}", where="columns.embedding", mend="give one width")
    _refuse(bad, names, "hold NaN or infinity", "repair them")
    return widths.pop() if widths else 0


def given_embeddings(items: Items, width: int) -> Matrix:
    """Embeddings as a matrix; zero rows where none is given.

    Raises:
        DataError: a value that is not finite, or another width; the items are named.
    """
    embeddings = items[r.EMBEDDING]
    lengths = pc.list_value_length(embeddings)
    wrong = items[r.ITEM_ID].filter(pc.not_equal(lengths, width)).to_pylist()
    _refuse(len(wrong), wrong, f"are not {width} wide", "give one width")
    wrong = _not_finite(items)
    _refuse(len(wrong), wrong, "hold NaN or infinity", "repair them")
    matrix = np.zeros((len(items), width), np.float32)
    matrix[np.asarray(lengths.is_valid())] = _values(embeddings).reshape(-1, width)
    return matrix


def _not_finite(items: Items) -> list[str]:
    """Ids of the items whose embedding holds NaN, infinity or nothing in place of a number."""
    bad = np.flatnonzero(~np.isfinite(_values(items[r.EMBEDDING])))
    if not bad.size:
        return []
    ends = np.cumsum(np.asarray(pc.fill_null(pc.list_value_length(items[r.EMBEDDING]), 0)))
    rows = np.unique(np.searchsorted(ends, bad, side="right"))
    return list(items[r.ITEM_ID].take(pa.array(rows)).to_pylist())


def _values(embeddings: pa.Array | pa.ChunkedArray) -> Matrix:
    """All values of the lists, one after the other."""
    return np.asarray(pc.list_flatten(embeddings), dtype=np.float32)


def _refuse(count: int, names: Sequence[str], what: str, mend: str) -> None:
    if count:
        raise DataError(f"{count} item embeddings {what}: {', '.join(names[:_NAMED])}", where="columns.embedding", mend=mend)


def _vectorizer(words: Sequence[str] | None) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer  # seconds that a skipped step does not need

    return TfidfVectorizer(sublinear_tf=True, strip_accents="unicode", vocabulary=words)


def _directions(counts: Any, dim: int, seed: int) -> Matrix:
    """components_WV of the SVD of counts_NV."""
    from sklearn.decomposition import TruncatedSVD

    rank = min(dim, min(counts.shape) - 1)
    if rank < 1:  # one word or one text: the only direction there is
        row = counts[np.asarray(counts.sum(axis=1)).argmax()].toarray()
        return unit(row.astype(np.float32))
    with np.errstate(divide="ignore", invalid="ignore"):  # the explained share of a constant matrix, which nobody asks for
        return np.asarray(TruncatedSVD(rank, random_state=seed).fit(counts).components_, dtype=np.float32)


def _sentence_embeddings(texts: Sequence[str], name: str) -> Matrix:
    return np.asarray(_sentence_transformer(name).encode(list(texts), show_progress_bar=False), dtype=np.float32)


@lru_cache(maxsize=1)
def _sentence_transformer(name: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ServiceError(
            "sentence-transformers is not installed",
            where=f"semantic_ids.text_encoder={name}",
            mend="pip install -c constraints.txt -e '.[text]'",
        ) from error
    if "://" in name:
        with storage.local_copy(name) as folder:
            return SentenceTransformer(str(folder))
    return SentenceTransformer(name)
