"""Items that share a SID move to the nearest one with room, the most popular ones stay."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.semantic_ids import collisions
from components.semantic_ids.collisions import check_capacity, resolve_collisions
from components.semantic_ids.quantize import encode
from components.semantic_ids.shards import Codebook
from infra.errors import DataError

# Points on a line: the first level in steps of 100, the second in steps of 10, so that every distance is read off.
CODEBOOKS = [Codebook.free(np.array(codewords, np.float32)) for codewords in ([[0], [100], [200]], [[0], [10], [20]])]


def resolve(places: list[float], popularity: list[int], *, capacity: int = 1) -> list[list[int]]:
    vectors = np.asarray(places, dtype=np.float32)[:, None]
    return resolve_collisions(encode(vectors, CODEBOOKS), vectors, CODEBOOKS, np.asarray(popularity), capacity=capacity).tolist()


def test_items_without_collision_keep_their_codes() -> None:
    assert resolve([0, 110, 220], [1, 2, 3]) == [[0, 0], [1, 1], [2, 2]]


def test_the_most_popular_item_keeps_its_code_and_the_other_takes_the_nearest_free_last_level() -> None:
    # Both encode to 110 = (1, 1); 107 is nearer to 100 = (1, 0) than to 120 = (1, 2).
    assert resolve([107, 111], [1, 9]) == [[1, 0], [1, 1]]
    assert resolve([107, 111], [9, 1]) == [[1, 1], [1, 2]]


def test_ties_of_popularity_go_to_the_lower_index() -> None:
    assert resolve([110, 110, 110], [5, 5, 5]) == [[1, 1], [1, 0], [1, 2]]


def test_an_item_that_moves_takes_nobody_elses_own_code() -> None:
    # 100 = (1, 0) is nearest to the second item, but the third one's own, less popular as that is.
    assert resolve([110, 108, 101], [9, 5, 1]) == [[1, 1], [1, 2], [1, 0]]


def test_items_that_are_there_already_stay_and_count() -> None:
    vectors = np.array([[110], [110]], np.float32)
    taken = np.array([[1, 1], [1, 0]], np.int32)
    codes = resolve_collisions(encode(vectors, CODEBOOKS), vectors, CODEBOOKS, np.array([2, 1]), capacity=1, taken_PM=taken)
    assert codes.tolist() == [[1, 2], [2, 0]]


def test_a_full_prefix_sends_an_item_to_its_neighbour_at_the_level_above() -> None:
    # (1, *) is full; 104 is 96 away from 200 and 104 from 0, of which the best code left is (2, 0).
    assert resolve([100, 110, 120, 104], [9, 8, 7, 1]) == [[1, 0], [1, 1], [1, 2], [2, 0]]
    assert resolve([100, 110, 120, 98], [9, 8, 7, 1]) == [[1, 0], [1, 1], [1, 2], [0, 2]]


def test_shared_codes_hold_as_many_items_as_they_may() -> None:
    assert resolve([110, 110, 110, 109], [4, 3, 2, 1], capacity=3) == [[1, 1]] * 3 + [[1, 0]]


def test_a_full_code_space_is_used_to_the_last_code() -> None:
    codes = resolve([110] * 9, list(range(9)))
    assert sorted(codes) == [[first, second] for first in range(3) for second in range(3)]
    with pytest.raises(DataError, match="hold 9 items, the catalogue has 10"):
        resolve([110] * 10, list(range(10)))


def test_the_capacity_error_names_sizes_that_would_do() -> None:
    with pytest.raises(DataError, match=r"16\^2 codes x 5 items a code hold 1280 items, the catalogue has 2000") as caught:
        check_capacity(2000, levels=2, codes=16, per_sid=5)
    assert "semantic_ids.codes" in caught.value.where
    assert "at least 20" in caught.value.mend
    check_capacity(2000, levels=2, codes=20, per_sid=5)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 230), st.integers(0, 5)), min_size=1, max_size=18), st.sampled_from([1, 2, 5]))
def test_no_code_is_over_its_capacity_and_the_most_popular_item_of_each_code_stays(items: list[tuple[int, int]], capacity: int) -> None:
    items = items[: 9 * capacity]
    places, popularity = [float(place) for place, _ in items], [count for _, count in items]
    codes = [tuple(code) for code in resolve(places, popularity, capacity=capacity)]
    assert max(Counter(codes).values()) <= capacity
    assert codes == [tuple(code) for code in resolve(places, popularity, capacity=capacity)]
    own = [tuple(code) for code in encode(np.asarray(places, dtype=np.float32)[:, None], CODEBOOKS).tolist()]
    best = max(range(len(items)), key=lambda item: (popularity[item], -item))
    assert codes[best] == own[best]
    counts = Counter(own)
    if max(counts.values()) <= capacity:
        assert codes == own


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("known", [False, True])
def test_every_number_of_levels_gives_codes_of_the_codebooks(levels: int, known: bool) -> None:
    rng = np.random.default_rng(levels)
    codebooks = [Codebook.free(rng.normal(size=(8, 3)).astype(np.float32)) for _ in range(levels)]
    vectors = np.repeat(rng.normal(size=(2, 3)).astype(np.float32), 4, axis=0)
    before = encode(vectors, codebooks) if known else None
    codes = resolve_collisions(encode(vectors, codebooks), vectors, codebooks, np.arange(8), capacity=1, before_NM=before)
    assert len(np.unique(codes, axis=0)) == 8
    assert codes.min() >= 0
    assert codes.max() < 8


def test_a_full_prefix_of_three_levels_sends_an_item_to_a_sibling_before_another_first_code() -> None:
    codebooks = [Codebook.free(np.array(codewords, np.float32)) for codewords in ([[0], [100]], [[0], [10]], [[0], [1]])]
    vectors = np.array([[0], [1], [0]], np.float32)
    codes = resolve_collisions(encode(vectors, codebooks), vectors, codebooks, np.array([3, 2, 1]), capacity=1)
    assert codes.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0]]


def test_an_earlier_sid_below_the_same_prefix_is_kept() -> None:
    vectors = np.array([[110], [110]], np.float32)
    before = np.array([[1, 2], [1, 1]], np.int32)  # the less popular one had the code that both are nearest to
    codes = resolve_collisions(encode(vectors, CODEBOOKS), vectors, CODEBOOKS, np.array([9, 1]), capacity=1, before_NM=before)
    assert codes.tolist() == before.tolist()


def test_counts_that_are_forgotten_are_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    codebooks = [Codebook.free(rng.normal(size=(8, 3)).astype(np.float32)) for _ in range(3)]
    vectors = np.repeat(rng.normal(size=(40, 3)).astype(np.float32), 10, axis=0)
    arguments = encode(vectors, codebooks), vectors, codebooks, np.arange(400)
    expected = resolve_collisions(*arguments, capacity=1)
    assert len(np.unique(expected, axis=0)) == 400
    monkeypatch.setattr(collisions, "_MOST_USED", 5)
    monkeypatch.setattr(collisions, "_PARTS", 3)
    np.testing.assert_array_equal(resolve_collisions(*arguments, capacity=1), expected)
