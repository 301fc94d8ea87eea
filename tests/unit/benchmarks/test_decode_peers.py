"""What decides whether two searches are equal, and the peers' tries, on examples worked out by hand."""

import numpy as np
import pytest
import torch

from tests.benchmarks.decode_peers import Found, dense_trie, prefix_table, same_up_to_ties, trie_callback

SIDS = np.array([[1, 0], [1, 2], [3, 1], [1, 2]])


def found(*pairs):
    sids, scores = zip(*pairs, strict=True)
    return Found(torch.tensor(sids), torch.tensor(scores))


A, B, C, D = (0, 0), (0, 1), (1, 0), (1, 1)
PLAIN = found((A, -1.0), (B, -2.0), (C, -3.0))


def test_float_noise_leaves_two_searches_equal():
    assert same_up_to_ties(PLAIN, found((A, -1.00001), (B, -2.00001), (C, -2.99999)))


def test_tied_sids_may_change_places():
    assert same_up_to_ties(found((A, -1.0), (B, -2.0), (C, -2.00001)), found((A, -1.0), (C, -2.0), (B, -2.00001)))


def test_a_tie_at_the_last_place_may_be_decided_either_way():
    assert same_up_to_ties(PLAIN, found((A, -1.0), (B, -2.0), (D, -3.00001)))


@pytest.mark.parametrize(
    "other",
    [
        found((A, -1.0), (C, -2.0), (B, -3.0)),
        found((A, -1.0), (D, -2.0), (C, -3.0)),
        found((A, -1.0), (B, -2.0), (C, -3.01)),
        found((A, -1.0), (B, -2.0)),
        found((A, -1.0), (B, -2.0), (B, -3.0)),
    ],
    ids=["other order", "other SID in the middle", "other score", "one missing", "one twice"],
)
def test_a_real_difference_is_seen(other):
    assert not same_up_to_ties(PLAIN, other)


def test_the_prefix_table_lists_what_may_follow_each_prefix():
    assert prefix_table(SIDS) == {(): [1, 3], (1,): [0, 2], (3,): [1]}


def test_the_callback_answers_in_tokens():
    callback = trie_callback(SIDS, first_token=10, n_codes=4)
    assert callback(0, torch.tensor([], dtype=torch.int64)) == [11, 13]
    assert callback(0, torch.tensor([11])) == [14, 16]


def test_the_dense_trie_forbids_all_but_the_sids():
    trie = dense_trie(SIDS, n_codes=4, device="cpu")
    assert (~trie.first_K).nonzero().flatten().tolist() == [1, 3]
    assert (~trie.second_KK).nonzero().tolist() == [[1, 0], [1, 2], [3, 1]]
