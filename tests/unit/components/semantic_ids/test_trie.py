"""The flat trie against a plain set of SIDs."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from components.semantic_ids.trie import Trie, build_trie

K = 4
Sid = tuple[int, ...]


def trie_of(sids: list[Sid], popularity: list[int] | None = None) -> Trie:
    return build_trie(np.asarray(sids, dtype=np.int32), np.asarray(popularity or [0] * len(sids)), n_codes=K)


def walk(trie: Trie) -> dict[Sid, int]:
    """Every SID that can be decoded, and its leaf."""
    paths: dict[Sid, int] = {(int(code),): node for node, code in enumerate(trie.codes[0])}
    for codes, start in zip(trie.codes[1:], trie.child_start, strict=True):
        paths = {(*sid, int(codes[child])): child for sid, node in paths.items() for child in range(start[node], start[node + 1])}
    return paths


def items_of(trie: Trie, leaf: int) -> list[int]:
    return trie.leaf_items[trie.leaf_start[leaf] : trie.leaf_start[leaf + 1]].tolist()


def test_a_trie_of_two_levels_by_hand() -> None:
    trie = trie_of([(2, 1), (0, 3), (2, 0), (0, 3)], [1, 5, 1, 9])
    assert [codes.tolist() for codes in trie.codes] == [[0, 2], [3, 0, 1]]
    assert [starts.tolist() for starts in trie.child_start] == [[0, 1, 3]]
    assert trie.n_leaves == 3
    assert trie.leaf_codes().tolist() == [[0, 3], [2, 0], [2, 1]]
    assert [items_of(trie, leaf) for leaf in range(3)] == [[3, 1], [2], [0]]


def test_one_item_is_a_path() -> None:
    trie = trie_of([(3, 0, 2)])
    assert walk(trie) == {(3, 0, 2): 0}
    assert items_of(trie, 0) == [0]


def test_items_of_a_leaf_come_by_popularity_and_ties_by_index() -> None:
    trie = trie_of([(1,)] * 5, [3, 7, 3, 0, 7])
    assert items_of(trie, 0) == [1, 4, 0, 2, 3]


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(1, 4))
def test_exactly_the_sids_of_items_can_be_decoded_and_lead_to_them(data: st.DataObject, levels: int) -> None:
    sids: list[Sid] = data.draw(st.lists(st.tuples(*[st.integers(0, K - 1)] * levels), min_size=1, max_size=30))
    popularity = data.draw(st.lists(st.integers(0, 3), min_size=len(sids), max_size=len(sids)))
    trie = trie_of(sids, popularity)
    leaves = walk(trie)
    assert set(leaves) == set(sids)
    assert trie.n_leaves == len(leaves)
    assert list(leaves.values()) == [sorted(leaves).index(sid) for sid in leaves]
    for sid, leaf in leaves.items():
        here = [item for item in range(len(sids)) if sids[item] == sid]
        assert items_of(trie, leaf) == sorted(here, key=lambda item: (-popularity[item], item))
        assert trie.leaf_codes()[leaf].tolist() == list(sid)


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(1, 3))
def test_a_restricted_trie_is_the_trie_of_the_allowed_items(data: st.DataObject, levels: int) -> None:
    sids: list[Sid] = data.draw(st.lists(st.tuples(*[st.integers(0, K - 1)] * levels), min_size=1, max_size=20))
    allowed = np.asarray(data.draw(st.lists(st.booleans(), min_size=len(sids), max_size=len(sids))))
    popularity = data.draw(st.lists(st.integers(0, 3), min_size=len(sids), max_size=len(sids)))
    restricted = trie_of(sids, popularity).restrict(allowed)
    expected = {sid for sid, kept in zip(sids, allowed, strict=True) if kept}
    leaves = walk(restricted)
    assert set(leaves) == expected
    assert restricted.n_leaves == len(expected)
    for sid, leaf in leaves.items():
        here = [item for item in range(len(sids)) if sids[item] == sid and allowed[item]]
        assert items_of(restricted, leaf) == sorted(here, key=lambda item: (-popularity[item], item))
