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
_SHRINKAGE = 5.0


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
        features = {"pmi": pmi_features, "cosine": cosine_features}[config.collaborative]
        signal = features(timelines, len(texts), dim=config.collaborative_dim, window=config.cooccurrence_window, seed=seed)
        parts.append(config.collaborative_weight * _unit(signal))
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


def pmi_features(timelines: Sequence[npt.NDArray[np.integer]], n_items: int, *, dim: int, window: int, seed: int) -> Matrix:
    """Item vectors from co-occurrence in timelines: SVD of positive pointwise mutual information.

    Pairs at most `window` events apart count with weight 1 / distance. Levy and Goldberg 2014 is the source of the
    factorisation; FORGE and OneRec 3.1 of the need for the signal.
    """
    counts = _neighbours(timelines, n_items, window).tocoo()
    if not counts.nnz:
        return np.zeros((n_items, dim), dtype=np.float32)
    marginal = np.asarray(counts.sum(axis=1)).ravel()
    pmi = np.log(counts.data * marginal.sum() / (marginal[counts.row] * marginal[counts.col]))
    positive = sp.csr_matrix((np.maximum(pmi, 0), (counts.row, counts.col)), shape=counts.shape, dtype=np.float32)
    positive.setdiag(0)
    return _svd(positive, dim, seed)


def cosine_features(timelines: Sequence[npt.NDArray[np.integer]], n_items: int, *, dim: int, window: int, seed: int) -> Matrix:
    """Item vectors for short timelines of many items, where mutual information is mostly that of single meetings.

    Two halves of unit norm, `dim` wide each: the SVD of D^-1/2 C D^-1/2, where C are neighbours as in `pmi_features` and D
    the events of each item plus `_SHRINKAGE`, and the SVD of who had what, with each entry divided by the roots of the
    item's and the user's number of entries (the bipartite normalisation of Dhillon 2001; its left vectors are items).
    """
    if not len(timelines):
        return np.zeros((n_items, 2 * dim), dtype=np.float32)
    events = np.concatenate(timelines)
    per_item = np.bincount(events, minlength=n_items).astype(np.float32)
    counts = _neighbours(timelines, n_items, window)
    counts.setdiag(0)
    scale = sp.diags((per_item + _SHRINKAGE) ** -0.5)
    users = np.repeat(np.arange(len(timelines)), [len(items) for items in timelines])
    visits = sp.csr_matrix((np.ones(len(users), np.float32), (events, users)), shape=(n_items, len(timelines)))
    visits.data[:] = 1  # an item counts once a user
    per_user = np.asarray(visits.sum(axis=0)).ravel()
    entries = sp.diags(np.maximum(np.asarray(visits.sum(axis=1)).ravel(), 1) ** -0.5) @ visits @ sp.diags(np.maximum(per_user, 1) ** -0.5)
    return np.concatenate([_unit(_svd(scale @ counts @ scale, dim, seed)), _unit(_svd(entries, dim, seed))], axis=1)


def _neighbours(timelines: Sequence[npt.NDArray[np.integer]], n_items: int, window: int) -> sp.csr_matrix:
    """counts_NN of pairs at most `window` events apart in a timeline, each with weight 1 / distance; symmetric."""
    rows: list[npt.NDArray[np.integer]] = [np.empty(0, np.int64)]
    cols: list[npt.NDArray[np.integer]] = [np.empty(0, np.int64)]
    weights = [np.empty(0, np.float32)]
    for items in timelines:
        for distance in range(1, min(window, len(items) - 1) + 1):
            rows.append(items[:-distance])
            cols.append(items[distance:])
            weights.append(np.full(len(items) - distance, 1.0 / distance, dtype=np.float32))
    half = sp.coo_matrix((np.concatenate(weights), (np.concatenate(rows), np.concatenate(cols))), shape=(n_items, n_items)).tocsr()
    return (half + half.T).tocsr()


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
