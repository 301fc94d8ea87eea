"""Residual k-means: known clusters are found again, encoding is the nearest codeword of each residual."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from components.semantic_ids.quantize import ResidualKMeans, decode, encode
from components.semantic_ids.shards import Codebook, LocalShards
from infra.errors import DataError

# Two levels by hand: four far corners, around each of them four near offsets.
CORNERS = np.array([[0, 0], [100, 0], [0, 100], [100, 100]], dtype=np.float32)
OFFSETS = np.array([[-4, -1], [4, 1], [-1, 4], [1, -4]], dtype=np.float32)
ITEMS = (CORNERS[:, None] + OFFSETS[None]).reshape(-1, 2)


def fitted(vectors: np.ndarray, *, codes: int = 4, seed: int = 0) -> ResidualKMeans:
    quantizer = ResidualKMeans(levels=2, codes=codes, seed=seed)
    quantizer.fit(LocalShards(vectors))
    return quantizer


def test_hand_made_clusters_are_recovered_level_by_level() -> None:
    first, second = (codebook.codewords_KD for codebook in fitted(ITEMS).codebooks)
    np.testing.assert_allclose(sorted(first.tolist()), sorted(CORNERS.tolist()), atol=1e-4)
    np.testing.assert_allclose(sorted(second.tolist()), sorted(OFFSETS.tolist()), atol=1e-4)


def test_items_of_a_cluster_share_their_first_code_and_every_item_is_reconstructed() -> None:
    quantizer = fitted(ITEMS)
    codes = quantizer.encode(ITEMS)
    assert codes.dtype == np.int32
    assert [len(set(group.tolist())) for group in codes[:, 0].reshape(4, 4)] == [1, 1, 1, 1]
    assert len({tuple(code) for code in codes.tolist()}) == 16
    np.testing.assert_allclose(decode(codes, quantizer.codebooks), ITEMS, atol=1e-3)


def test_equal_seeds_give_equal_codebooks_and_others_do_not() -> None:
    vectors = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    one, again, other = (fitted(vectors, codes=8, seed=seed).tensors()["codebooks"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_too_few_items_name_the_setting_and_a_size_that_would_do() -> None:
    with pytest.raises(DataError, match="7 items cannot fill 8 codewords") as caught:
        fitted(np.zeros((7, 2), dtype=np.float32), codes=8)
    assert caught.value.where == "semantic_ids.codes"
    assert "2 or less" in caught.value.mend


def test_items_that_are_all_alike_are_no_error() -> None:
    vectors = np.array([[0, 0], [0, 0], [3, 3], [3, 3], [0, 0]], dtype=np.float32)
    quantizer = fitted(vectors)
    np.testing.assert_allclose(decode(quantizer.encode(vectors), quantizer.codebooks), vectors, atol=1e-2)


def test_the_vectors_that_are_fitted_stay_as_they_are() -> None:
    vectors = ITEMS.copy()
    fitted(vectors).encode(vectors)
    np.testing.assert_array_equal(vectors, ITEMS)


def test_codes_of_the_fit_are_those_of_encoding_unless_they_are_balanced() -> None:
    vectors = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    quantizer = ResidualKMeans(2, 8)
    assert quantizer.fit(LocalShards(vectors)).tolist() == quantizer.encode(vectors).tolist()
    assert quantizer.encode(np.empty((0, 3), np.float32)).shape == (0, 2)


def test_every_level_of_a_balanced_quantizer_is_even() -> None:
    vectors = np.random.default_rng(0).normal(size=(203, 3)).astype(np.float32) ** 3
    codes = ResidualKMeans(3, 8, balanced=True).fit(LocalShards(vectors))
    assert [sorted(np.bincount(level, minlength=8).tolist()) for level in codes.T] == [[25] * 5 + [26] * 3] * 3


def test_what_is_stored_encodes_as_before() -> None:
    vectors = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    quantizer = ResidualKMeans(2, 8, balanced=True)
    quantizer.fit(LocalShards(vectors))
    assert ResidualKMeans.restore(quantizer.tensors()).encode(vectors).tolist() == quantizer.encode(vectors).tolist()


WHOLE = st.integers(-50, 50).map(float)  # exact in float32, sums and squares too


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(2, 5), st.integers(1, 3), st.integers(1, 6))
def test_encoding_takes_the_nearest_codeword_of_each_residual(data: st.DataObject, levels: int, codes: int, width: int, items: int) -> None:
    codebooks = data.draw(arrays.arrays(np.float32, (levels, codes, width), elements=WHOLE))
    vectors = data.draw(arrays.arrays(np.float32, (items, width), elements=WHOLE))
    for vector, code in zip(vectors, encode(vectors, [Codebook.free(codewords) for codewords in codebooks]), strict=True):
        residual = vector
        for codebook, chosen in zip(codebooks, code, strict=True):
            distances = ((residual - codebook) ** 2).sum(axis=1)
            assert chosen == distances.argmin()
            residual = residual - codebook[chosen]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(2, 4))
def test_encoding_inverts_decoding_where_levels_differ_in_scale(data: st.DataObject, levels: int, codes: int) -> None:
    axes = np.eye(codes, dtype=np.float32)
    codebooks = [Codebook.free(axes * np.float32(100.0 / 10**level)) for level in range(levels)]
    chosen = data.draw(arrays.arrays(np.int32, (5, levels), elements=st.integers(0, codes - 1)))
    np.testing.assert_array_equal(encode(decode(chosen, codebooks), codebooks), chosen)
