import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.retriever.decoding_trie import DecodingTrie
from components.semantic_ids.trie import build_trie

K = 4


def trie_of(sids):
    return DecodingTrie(build_trie(np.array(sids), np.zeros(len(sids)), n_codes=K))


def test_the_children_of_two_levels_by_hand():
    trie = trie_of([(2, 1), (0, 3), (2, 0)])
    codes, nodes, valid = trie.children(0, torch.zeros(1, 2, dtype=torch.int64))
    assert (codes.tolist(), nodes.tolist(), bool(valid.all())) == ([[[0, 2], [0, 2]]], [[[0, 1], [0, 1]]], True)
    codes, nodes, valid = trie.children(1, torch.tensor([[1, 0]]))
    assert valid.tolist() == [[[True, True], [True, False]]]
    assert (codes[valid].tolist(), nodes[valid].tolist()) == ([0, 1, 3], [1, 2, 0])


@given(st.integers(1, 4).flatmap(lambda m: st.lists(st.tuples(*[st.integers(0, K - 1)] * m), min_size=1, max_size=30)))
@settings(max_examples=80, deadline=None)
def test_walking_over_children_finds_exactly_the_sids_of_items(sids):
    trie = trie_of(sids)
    paths = {(): 0}
    for level in range(len(sids[0])):
        below = {}
        for sid, node in paths.items():
            codes, nodes, valid = trie.children(level, torch.tensor([[node]]))
            below |= {(*sid, code): child for code, child in zip(codes[valid].tolist(), nodes[valid].tolist(), strict=True)}
        paths = below
    assert paths == {sid: leaf for leaf, sid in enumerate(sorted(set(sids)))}
