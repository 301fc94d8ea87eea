"""On small tries the beams are held against a scorer that runs every SID through a sequence of its own."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.retriever.beam_search import beam_search, top_k
from components.retriever.contract import History
from components.semantic_ids.trie import build_trie
from tests.unit.components.retriever import slow
from tests.unit.components.retriever.slow import tiny_model

K = 4
EVERYTHING = 64
SCORES = ["iap", "rsp", "sum"]


def history(*events):
    items, levels = zip(*events, strict=True) if events else ((), ())
    return History(np.array(items, dtype=np.int64), np.array(levels, dtype=np.int64))


@st.composite
def worlds(draw):
    """SIDs of 1 to 10 items with 1 to 3 levels, often sharing prefixes or even leaves, and up to three histories."""
    levels = draw(st.integers(1, 3))
    code = st.integers(0, K - 1)
    sids = draw(st.lists(st.tuples(*[code] * levels), min_size=1, max_size=10))
    event = st.tuples(st.integers(0, len(sids) - 1), st.integers(1, 4))
    histories = draw(st.lists(st.lists(event, max_size=5), min_size=1, max_size=3))
    kind = {"history": draw(st.sampled_from(["merged", "tokens"])), "rank_prior": draw(st.sampled_from(["iap", "none"]))}
    kind |= {"codeword_softmax": draw(st.sampled_from(["level", "children"])), "repeat_bias": draw(st.booleans())}
    model = tiny_model(sids, n_codes=K, seed=draw(st.integers(0, 99)), **kind)
    return model, build_trie(np.array(sids), np.zeros(len(sids)), n_codes=K), [history(*events) for events in histories]


def test_with_a_softmax_over_children_no_probability_is_lost_on_sids_without_an_item():
    sids = [(0, 1), (0, 2), (3, 0), (3, 1), (3, 3), (2, 2)]
    model = tiny_model(sids, n_codes=K, codeword_softmax="children")
    found = search(model, [history((0, 3), (4, 3))], build_trie(np.array(sids), np.zeros(len(sids)), n_codes=K), "iap")
    np.testing.assert_allclose(found.scores_BW.exp().sum(), 1.0, rtol=1e-5)


def leaf_sids(model, trie):
    """The SID of each leaf, by one of its items."""
    return [model.sid_codes[trie.leaf_items[start]].tolist() for start in trie.leaf_start[:-1]]


@torch.no_grad()
def score_all(model, trie, past, score):
    return np.array([slow.sid_score(model, past.items, past.levels, sid, score) for sid in leaf_sids(model, trie)])


def search(model, histories, trie, score, beams=EVERYTHING, lambdas=EVERYTHING):
    wide, kept = ([value] * model.n_levels if isinstance(value, int) else value[: model.n_levels] for value in (beams, lambdas))
    return beam_search(model, histories, trie, beams=wide, lambdas=kept, score=score)


@given(worlds(), st.sampled_from(SCORES))
@settings(max_examples=100, deadline=None)
def test_beams_that_cover_everything_equal_scoring_every_sid(world, score):
    model, trie, histories = world
    found = search(model, histories, trie, score)
    sids = leaf_sids(model, trie)
    for row, past in enumerate(histories):
        expected = score_all(model, trie, past, score)
        leaves = found.leaves_BW[row][: trie.n_leaves].numpy()
        assert sorted(leaves) == list(range(trie.n_leaves))
        scores = found.scores_BW[row][: trie.n_leaves].numpy()
        np.testing.assert_allclose(scores, expected[leaves], rtol=1e-4, atol=1e-4)
        assert (np.diff(expected[leaves]) <= 1e-3).all()
        assert found.codes_BWM[row][: trie.n_leaves].tolist() == [sids[leaf] for leaf in leaves]
        assert (found.leaves_BW[row][trie.n_leaves :] == -1).all()
        assert (found.scores_BW[row][trie.n_leaves :] == float("-inf")).all()


@given(
    worlds(),
    st.sampled_from(SCORES),
    st.lists(st.integers(1, 5), min_size=3, max_size=3),
    st.lists(st.integers(1, 4), min_size=3, max_size=3),
)
@settings(max_examples=100, deadline=None)
def test_narrow_beams_return_only_leaves_in_order_with_their_scores(world, score, beams, lambdas):
    model, trie, histories = world
    found = search(model, histories, trie, score, beams, lambdas)
    assert found.leaves_BW.shape[1] <= beams[model.n_levels - 1]
    for row, past in enumerate(histories):
        alive = found.leaves_BW[row] >= 0
        assert torch.equal(alive, found.scores_BW[row] > float("-inf"))
        assert alive.any()
        assert (alive.int().diff() <= 0).all()
        leaves, scores = found.leaves_BW[row][alive].numpy(), found.scores_BW[row][alive].numpy()
        assert len(set(leaves)) == len(leaves)
        assert (np.diff(scores) <= 0).all()
        np.testing.assert_allclose(scores, score_all(model, trie, past, score)[leaves], rtol=1e-4, atol=1e-4)


@given(worlds(), st.sampled_from(SCORES))
@settings(max_examples=25, deadline=None)
def test_a_batch_gives_what_its_histories_give_alone(world, score):
    model, trie, histories = world
    together = search(model, histories, trie, score)
    for row, past in enumerate(histories):
        alone = search(model, [past], trie, score)
        leaves = alone.leaves_BW[0] >= 0
        by_leaf = dict(zip(together.leaves_BW[row].tolist(), together.scores_BW[row].tolist(), strict=True))
        for leaf, value in zip(alone.leaves_BW[0][leaves].tolist(), alone.scores_BW[0][leaves].tolist(), strict=True):
            assert by_leaf[leaf] == pytest.approx(value, rel=1e-4, abs=1e-4)


def greedy_world():
    """Two first codewords; every history prefers one of them by IAP."""
    sids = [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2]]
    model = tiny_model(sids, n_codes=K, seed=3)
    return model, build_trie(np.array(sids), np.zeros(5), n_codes=K)


def test_lambda_1_leaves_the_rank_head_no_choice():
    model, trie = greedy_world()
    past = history((0, 3), (4, 2))
    greedy = search(model, [past], trie, "iap", beams=1, lambdas=1)
    ranked = search(model, [past], trie, "rsp", beams=1, lambdas=1)
    assert greedy.codes_BWM.tolist() == ranked.codes_BWM.tolist()
    assert greedy.scores_BW.tolist() != ranked.scores_BW.tolist()


def test_the_first_level_keeps_the_codewords_with_the_best_scores():
    model, trie = greedy_world()
    past = history((2, 3))
    found = search(model, [past], trie, "iap", beams=[1, 5])
    hidden, own = slow.hidden_states(model, past.items, past.levels, [])
    first = slow.codeword_logits(model, hidden, own)[0]
    best = int(first[:2].argmax())
    assert {sid[0] for sid, leaf in zip(found.codes_BWM[0].tolist(), found.leaves_BW[0].tolist(), strict=True) if leaf >= 0} == {best}


def test_without_a_trie_codewords_are_chosen_freely_and_there_are_no_leaves():
    model, _ = greedy_world()
    found = search(model, [history()], None, "iap", beams=K * K)
    assert sorted(map(tuple, found.codes_BWM[0].tolist())) == [(i, j) for i in range(K) for j in range(K)]
    assert (found.leaves_BW == -1).all()
    assert torch.isfinite(found.scores_BW).all()
    assert float(found.scores_BW.exp().sum()) == pytest.approx(1.0, rel=1e-4)


def test_a_trie_of_one_item_is_found_by_one_beam():
    model = tiny_model([[2, 1, 3]], n_codes=K)
    found = search(
        model, [history(), history((0, 3))], build_trie(np.array([[2, 1, 3]]), np.zeros(1), n_codes=K), "sum", beams=1, lambdas=1
    )
    assert found.codes_BWM.tolist() == [[[2, 1, 3]], [[2, 1, 3]]]
    assert found.leaves_BW.tolist() == [[0], [0]]


@given(worlds(), st.sampled_from(SCORES), st.data())
@settings(max_examples=50, deadline=None)
def test_excluded_leaves_make_room_for_others(world, score, data):
    model, trie, histories = world
    without = [sorted(data.draw(st.sets(st.integers(0, trie.n_leaves - 1), max_size=trie.n_leaves))) for _ in histories]
    width = max(1, *map(len, without))
    padded = torch.tensor([leaves + [trie.n_leaves] * (width - len(leaves)) for leaves in without])
    wide = [EVERYTHING] * model.n_levels
    found = beam_search(model, histories, trie, beams=wide, lambdas=wide, score=score, excluded_BX=padded)
    for row, excluded in enumerate(without):
        leaves = found.leaves_BW[row]
        assert set(leaves[leaves >= 0].tolist()) == set(range(trie.n_leaves)) - set(excluded)


def test_in_half_precision_the_scores_are_the_same_to_its_rounding():
    model, trie = greedy_world()
    pasts = [history((0, 3), (4, 2)), history()]
    exact = search(model, pasts, trie, "sum")
    rounded = search(model.to(torch.bfloat16), pasts, trie, "sum")
    by_leaf = exact.scores_BW.gather(1, exact.leaves_BW.argsort(1))
    torch.testing.assert_close(rounded.scores_BW.gather(1, rounded.leaves_BW.argsort(1)), by_leaf, rtol=0.05, atol=0.1)


@given(
    st.integers(1, 3),
    st.integers(1, 400),
    st.integers(1, 12),
    st.integers(0, 99),
    st.sampled_from([1.0, 0.0]),
    st.sampled_from([0.3, 0.99]),
)
@settings(max_examples=300, deadline=None)
def test_the_best_values_are_found_by_way_of_the_best_blocks(rows, n, k, seed, spread, missing):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, n, generator=generator) * spread  # without spread all are equal
    values[torch.rand(rows, n, generator=generator) < missing] = float("-inf")
    found, places = top_k(values, k)
    assert torch.equal(found, values.topk(min(k, n), dim=1).values)
    assert torch.equal(values.gather(1, places), found)
    for row, kept in zip(places, found > float("-inf"), strict=True):
        assert len(set(row[kept].tolist())) == int(kept.sum())


def test_beams_wider_than_a_large_trie_return_all_of_it():
    sids = [[0, c] for c in range(101)] + [[a, 0] for a in range(1, 101)]
    model = tiny_model(sids, n_codes=101)
    trie = build_trie(np.array(sids), np.zeros(len(sids)), n_codes=101)
    found = search(model, [history((i, 3)) for i in range(8)], trie, "iap", beams=[101, 235], lambdas=101)
    for leaves in found.leaves_BW:
        assert sorted(leaves[leaves >= 0].tolist()) == list(range(201))


def test_no_histories_have_no_beams():
    model, trie = greedy_world()
    found = search(model, [], trie, "iap", beams=[2, 3], lambdas=4)
    assert (found.codes_BWM.shape, found.leaves_BW.shape, found.scores_BW.shape) == ((0, 3, 2), (0, 3), (0, 3))
