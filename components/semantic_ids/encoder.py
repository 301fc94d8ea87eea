"""From the content of any item, new ones too, to the features that codebooks were fitted on, without refitting.

Shapes: N items, V words, D content width, S signal width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from components.semantic_ids.collaborative import Matrix, SignalOfContent, join, unit
from infra import storage
from infra.errors import DataError, ServiceError
from infra.sections import SemanticIdConfig

Tensors = dict[str, npt.NDArray[Any]]
Embeddings = Sequence[Sequence[float] | None]
_TEXT, _SIGNAL = "text.", "signal."


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
    def fit(cls, texts: Sequence[str], config: SemanticIdConfig, *, seed: int) -> TextEncoder:
        """Learn vocabulary and directions; a model by name has nothing to learn.

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
        vectorizer = _vectorizer(self.words)
        vectorizer.idf_ = self.idf_V
        return np.asarray(vectorizer.transform(texts) @ self.components_WV.T, dtype=np.float32)


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

    def content(self, texts: Sequence[str], embeddings: Embeddings, item_ids: Sequence[str]) -> Matrix:
        """Weighted text and embedding parts content_ND, each of unit norm times its weight or zero; D is 0 without either.

        Raises:
            DataError: an embedding with a value that is not finite or of another width than the rest.
        """
        parts = [np.empty((len(texts), 0), np.float32)]
        if self.text is not None:
            parts.append(self.config.text_weight * unit(self.text.encode(texts)))
        if self.embedding_width:
            parts.append(self.config.embedding_weight * unit(given_embeddings(embeddings, item_ids, self.embedding_width)))
        return np.concatenate(parts, axis=1)

    def transform(self, texts: Sequence[str], embeddings: Embeddings, item_ids: Sequence[str]) -> Matrix:
        """Features of items of which no timeline tells anything.

        Args:
            texts: empty where there is none.
            embeddings: None where there is none.
            item_ids: named in errors.

        Returns:
            features_ND as wide as those that `item_features` gave. Their collaborative part is estimated from the content (see
            `SignalOfContent`); an item without content has a zero row.

        Raises:
            DataError: an embedding with a value that is not finite or of another width than those fitted on.
        """
        content_ND = self.content(texts, embeddings, item_ids)
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


def width_of(embeddings: Embeddings) -> int:
    """The one width of the embeddings given; 0 where none is.

    Raises:
        DataError: they differ.
    """
    widths = {len(embedding) for embedding in embeddings if embedding is not None}
    if len(widths) > 1:
        raise DataError(f"item embeddings have different widths: {sorted(widths)}", where="columns.embedding", mend="give one width")
    return widths.pop() if widths else 0


def given_embeddings(embeddings: Embeddings, item_ids: Sequence[str], width: int) -> Matrix:
    """Embeddings as a matrix; zero rows where none is given.

    Raises:
        DataError: a value that is not finite, or another width; the items are named.
    """
    wrong = [item for item, embedding in zip(item_ids, embeddings, strict=True) if embedding is not None and len(embedding) != width]
    if wrong:
        names = ", ".join(wrong[:5])
        raise DataError(f"{len(wrong)} item embeddings are not {width} wide: {names}", where="columns.embedding", mend="give one width")
    zero = np.zeros(width, dtype=np.float32)
    matrix = np.asarray([zero if e is None else e for e in embeddings], dtype=np.float32).reshape(len(embeddings), width)
    bad = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
    if bad.size:
        names = ", ".join(item_ids[i] for i in bad[:5])
        raise DataError(f"{bad.size} item embeddings hold NaN or infinity: {names}", where="columns.embedding", mend="repair them")
    return matrix


def _vectorizer(words: Sequence[str] | None) -> Any:
    return TfidfVectorizer(sublinear_tf=True, strip_accents="unicode", vocabulary=words)


def _directions(counts: Any, dim: int, seed: int) -> Matrix:
    """components_WV of the SVD of counts_NV."""
    rank = min(dim, min(counts.shape) - 1)
    if rank < 1:  # one word or one text: the only direction there is
        row = counts[np.asarray(counts.sum(axis=1)).argmax()].toarray()
        return unit(row.astype(np.float32))
    with np.errstate(divide="ignore", invalid="ignore"):  # the explained share of a constant matrix, which nobody asks for
        return np.asarray(TruncatedSVD(rank, random_state=seed).fit(counts).components_, dtype=np.float32)


def _sentence_embeddings(texts: Sequence[str], name: str) -> Matrix:
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
            model = SentenceTransformer(str(folder))
    else:
        model = SentenceTransformer(name)
    return np.asarray(model.encode(list(texts), show_progress_bar=False), dtype=np.float32)
