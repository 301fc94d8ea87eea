"""Item features that are quantized: text, a given embedding, collaborative signal; joined with weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from infra import storage
from infra.config import SemanticIdConfig
from infra.errors import DataError, ServiceError

Matrix = npt.NDArray[np.float32]


def item_features(
    texts: Sequence[str],
    embeddings: Sequence[Sequence[float] | None],
    timelines: Sequence[npt.NDArray[np.integer]],
    config: SemanticIdConfig,
    *,
    item_ids: Sequence[str],
    seed: int,
) -> Matrix:
    """Features of all items as one matrix, each part scaled to unit norm and weighted.

    Args:
        texts: text of each item; empty where there is none.
        embeddings: given vector of each item, or None.
        timelines: item indices of each user in time order, training phase only.
        config: weights, dimensions and encoder.
        item_ids: named in errors.
        seed: of the SVDs.

    Returns:
        features_ND, float32. An item without any feature has a zero row: it is encoded to the codes nearest the mean.

    Raises:
        DataError: an embedding with a value that is not finite or of another width than the rest.
    """
    parts: list[Matrix] = []
    if config.text_weight > 0 and any(texts):
        parts.append(config.text_weight * _unit(text_features(texts, config, seed=seed)))
    if config.embedding_weight > 0 and any(e is not None for e in embeddings):
        parts.append(config.embedding_weight * _unit(_given_embeddings(embeddings, item_ids)))
    if config.collaborative_weight > 0 and len(timelines):
        cooccurrence = collaborative_features(
            timelines, len(texts), dim=config.collaborative_dim, window=config.cooccurrence_window, seed=seed
        )
        parts.append(config.collaborative_weight * _unit(cooccurrence))
    if not parts:
        raise DataError("no item has a feature", mend="give items with text or embeddings, or raise collaborative_weight")
    return np.concatenate(parts, axis=1)


def text_features(texts: Sequence[str], config: SemanticIdConfig, *, seed: int) -> Matrix:
    """Embeddings of texts: TF-IDF and SVD, or a sentence-transformers model by name, folder or s3:// URI."""
    if config.text_encoder != "tfidf":
        return _sentence_embeddings(texts, config.text_encoder)
    try:
        counts = TfidfVectorizer(sublinear_tf=True, strip_accents="unicode").fit_transform(texts)
    except ValueError as error:  # only stop words or punctuation
        raise DataError("the item texts hold no words", where="columns.text", mend="choose other text columns") from error
    return _svd(counts, config.text_dim, seed)


def collaborative_features(timelines: Sequence[npt.NDArray[np.integer]], n_items: int, *, dim: int, window: int, seed: int) -> Matrix:
    """Item vectors from co-occurrence in timelines: SVD of positive pointwise mutual information.

    Pairs at most `window` events apart count with weight 1 / distance. Levy and Goldberg 2014 is the source of the
    factorisation; FORGE and OneRec 3.1 of the need for the signal.
    """
    rows, cols, weights = [], [], []
    for items in timelines:
        for distance in range(1, min(window, len(items) - 1) + 1):
            rows.append(items[:-distance])
            cols.append(items[distance:])
            weights.append(np.full(len(items) - distance, 1.0 / distance, dtype=np.float32))
    if not rows:
        return np.zeros((n_items, dim), dtype=np.float32)
    half = sp.coo_matrix((np.concatenate(weights), (np.concatenate(rows), np.concatenate(cols))), shape=(n_items, n_items)).tocsr()
    counts = (half + half.T).tocoo()
    marginal = np.asarray(counts.sum(axis=1)).ravel()
    pmi = np.log(counts.data * marginal.sum() / (marginal[counts.row] * marginal[counts.col]))
    positive = sp.csr_matrix((np.maximum(pmi, 0), (counts.row, counts.col)), shape=counts.shape, dtype=np.float32)
    positive.setdiag(0)
    return _svd(positive, dim, seed)


def _given_embeddings(embeddings: Sequence[Sequence[float] | None], item_ids: Sequence[str]) -> Matrix:
    widths = {len(e) for e in embeddings if e is not None}
    if len(widths) != 1:
        raise DataError(f"item embeddings have different widths: {sorted(widths)}", where="columns.embedding", mend="give one width")
    zero = np.zeros(widths.pop(), dtype=np.float32)
    matrix = np.asarray([zero if e is None else e for e in embeddings], dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
    if bad.size:
        names = ", ".join(item_ids[i] for i in bad[:5])
        raise DataError(f"{bad.size} item embeddings hold NaN or infinity: {names}", where="columns.embedding", mend="repair them")
    return matrix


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


def _svd(matrix: sp.csr_matrix, dim: int, seed: int) -> Matrix:
    rank = min(dim, min(matrix.shape) - 1)
    if rank < 1:
        return np.asarray(matrix.toarray(), dtype=np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):  # the explained share of a constant matrix, which nobody asks for
        return np.asarray(TruncatedSVD(rank, random_state=seed).fit_transform(matrix), dtype=np.float32)


def _unit(matrix: Matrix) -> Matrix:
    norm = np.linalg.norm(matrix, axis=1, keepdims=True)
    return np.asarray(matrix / np.maximum(norm, 1e-12), dtype=np.float32)
