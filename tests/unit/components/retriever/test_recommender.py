import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.retriever.beam_search import beam_search
from components.retriever.contract import History
from components.retriever.filters import ItemFilter
from components.retriever.prefix import PrefixCache
from components.retriever.recommender import RetrieverRecommender, prompt, unconstrained_invalid_rate
from components.semantic_ids.trie import build_trie
from infra.errors import ConfigError, IntegrityError
from infra.sections import DecodingConfig
from tests.unit.components.retriever import slow
from tests.unit.components.retriever.slow import tiny_model

K = 4
GRID = [[i, j] for i in range(K) for j in range(K)]
SHARED = [[0, 0], [0, 0], [0, 1], [0, 0], [2, 3], [0, 1]]


def recommender(sids, *, popularity=None, model=None, **decoding):
    chosen = DecodingConfig(**{"beams": [K * K, K * K], "lambdas": [K, K], **decoding})
    trie = build_trie(np.array(sids), np.zeros(len(sids)) if popularity is None else popularity, n_codes=K)
    return RetrieverRecommender(model or tiny_model(sids, n_codes=K), trie, chosen)


def history(*items, level=3):
    return History(np.array(items, dtype=np.int64), np.full(len(items), level, dtype=np.int64))


@torch.no_grad()
def best_first(model, sids, past):
    scores = [slow.sid_score(model, past.items, past.levels, sid, "sum") for sid in sids]
    return sorted(range(len(sids)), key=lambda item: -scores[item])


@given(st.lists(st.integers(0, 15), max_size=20))
@settings(max_examples=20, deadline=None)
def test_the_catalogue_is_ranked_by_the_latest_max_history_items(items):
    model = tiny_model(GRID, n_codes=K, max_history=6)
    past = history(*items)
    (ranked,) = recommender(GRID, model=model).recommend([past], 16, exclude_seen=False)
    seen = history(*items[-6:])
    with torch.no_grad():
        expected = [slow.sid_score(model, seen.items, seen.levels, GRID[item], "sum") for item in ranked.items]
    assert sorted(ranked.items.tolist()) == list(range(16))
    np.testing.assert_allclose(ranked.scores, expected, rtol=1e-4, atol=1e-4)
    assert (np.diff(ranked.scores) <= 0).all()


def test_a_prompt_holds_the_latest_events_from_the_minimum_level_on():
    model = tiny_model(GRID, n_codes=K, max_history=2, history_min_level=2)
    cut = prompt(History(np.array([5, 6, 7, 8]), np.array([4, 2, 1, 3])), model.config)
    assert (cut.items.tolist(), cut.levels.tolist()) == ([6, 8], [2, 3])
    assert len(prompt(History(np.array([5]), np.array([1])), model.config).items) == 0


def test_events_that_are_no_history_are_excluded_as_seen_all_the_same():
    model = tiny_model(GRID, n_codes=K, max_history=2, history_min_level=3)
    past = history(0, 1, 2, 3, level=2)
    (ranked,) = recommender(GRID, model=model).recommend([past], 16, exclude_seen=True)
    assert ranked.items.tolist() == [item for item in best_first(model, GRID, history()) if item > 3]


def test_a_shared_leaf_gives_its_most_popular_item_first_at_one_score():
    (ranked,) = recommender(SHARED, popularity=np.array([1, 5, 2, 3, 9, 2])).recommend([history(4)], 6, exclude_seen=False)
    order = ranked.items.tolist()
    assert [item for item in order if SHARED[item] == [0, 0]] == [1, 3, 0]
    assert [item for item in order if SHARED[item] == [0, 1]] == [2, 5]
    places = [order.index(item) for item in (1, 3, 0)]
    assert places == list(range(places[0], places[0] + 3))
    assert len({float(ranked.scores[place]) for place in places}) == 1


sids_of_items = st.lists(st.sampled_from(GRID), min_size=1, max_size=20)


@given(
    sids_of_items,
    st.lists(st.lists(st.integers(0, 19), max_size=10), min_size=1, max_size=3),
    st.integers(1, 25),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_exactly_k_distinct_unseen_items_whenever_there_are_k(sids, pasts, k, beams, lambdas, exclude_seen):
    pasts = [[item % len(sids) for item in past] for past in pasts]
    engine = recommender(sids, beams=list(beams), lambdas=list(lambdas), users_per_batch=2)
    slates = engine.recommend([history(*past) for past in pasts], k, exclude_seen=exclude_seen)
    assert len(slates) == len(pasts)
    for past, slate in zip(pasts, slates, strict=True):
        excluded = set(past) if exclude_seen else set()
        assert len(slate.items) == len(slate.scores) == min(k, len(sids) - len(excluded))
        assert len(set(slate.items.tolist())) == len(slate.items)
        assert not set(slate.items.tolist()) & excluded
        assert np.isfinite(slate.scores).all()


def test_wide_beams_do_not_hide_that_lambda_left_something_out():
    engine = recommender(GRID, beams=[64, 64], lambdas=[1, 1])
    (ranked,) = engine.recommend([history()], 16, exclude_seen=False)
    assert sorted(ranked.items.tolist()) == list(range(16))


def test_more_than_the_catalogue_returns_all_of_it():
    (ranked,) = recommender(GRID, beams=[1, 1], lambdas=[1, 1]).recommend([history(3)], 1000, exclude_seen=True)
    assert sorted(ranked.items.tolist()) == [item for item in range(16) if item != 3]


def test_everything_seen_leaves_nothing():
    (ranked,) = recommender(GRID).recommend([history(*range(16))], 3, exclude_seen=True)
    assert len(ranked.items) == len(ranked.scores) == 0


@pytest.mark.parametrize("softmax", ["level", "children"])
def test_filtered_items_do_not_take_the_place_of_allowed_ones(softmax):
    model = tiny_model(GRID, n_codes=K, codeword_softmax=softmax)
    allowed = ItemFilter(deny=np.arange(0, 16, 2)).mask(16)
    engine = recommender(GRID, model=model, beams=[4, 4]).restricted(allowed)
    (ranked,) = engine.recommend([history(5)], 4, exclude_seen=False)
    assert set(ranked.items.tolist()) <= set(range(1, 16, 2))
    everything = recommender(GRID, model=model).restricted(allowed).recommend([history(5)], 100, exclude_seen=False)[0]
    assert everything.items.tolist() == [item for item in best_first(model, GRID, history(5)) if item % 2]


@pytest.mark.parametrize("score", ["iap", "rsp", "sum"])
def test_a_filter_of_a_filter_changes_no_score_of_what_is_left(score):
    sids = [[i, j] for i in range(4) for j in range(4) if (i + j) % 3]
    model = tiny_model(sids, n_codes=K, codeword_softmax="children")
    engine = recommender(sids, model=model, score=score)
    (free,) = engine.recommend([history(1, 3)], len(sids), exclude_seen=False)
    some = engine.restricted(np.arange(len(sids)) % 4 > 0).restricted(np.arange(len(sids)) % 5 > 0)
    (left,) = some.recommend([history(1, 3)], len(sids), exclude_seen=False)
    expected = [(item, value) for item, value in zip(free.items.tolist(), free.scores.tolist(), strict=True) if item % 4 and item % 5]
    assert left.items.tolist() == [item for item, _ in expected]
    np.testing.assert_allclose(left.scores, [value for _, value in expected], rtol=1e-4)


def test_a_filter_that_allows_nothing_gives_empty_slates():
    engine = recommender(GRID).restricted(np.zeros(16, dtype=bool))
    assert [len(slate.items) for slate in engine.recommend([history(5), history()], 4, exclude_seen=True)] == [0, 0]
    assert engine.generate([history(5)]).shape == (0, 2)


def test_items_that_the_sid_table_does_not_know_are_left_out_of_the_history_and_counted():
    engine = recommender(GRID)
    (mixed,) = engine.recommend([history(3, 99, 5, -1)], 16, exclude_seen=True)
    (known,) = recommender(GRID).recommend([history(3, 5)], 16, exclude_seen=True)
    assert mixed.items.tolist() == known.items.tolist()
    assert engine.unknown_events == 2
    engine.restricted(np.ones(16, dtype=bool)).recommend([history(99)], 1, exclude_seen=False)
    assert engine.unknown_events == 3


def test_a_trie_with_other_sids_than_the_model_was_trained_with_is_refused():
    model = tiny_model(GRID, n_codes=K)
    with pytest.raises(IntegrityError, match="not those that the model was trained with"):
        recommender(GRID[::-1], model=model)


def test_a_model_whose_weights_are_not_numbers_is_refused():
    model = tiny_model(GRID, n_codes=K)
    with torch.no_grad():
        model.embedding.weight.fill_(float("nan"))
    with pytest.raises(IntegrityError, match="not numbers"):
        recommender(GRID, model=model).recommend([history(1)], 4, exclude_seen=False)
    with pytest.raises(IntegrityError, match="not numbers"):
        recommender(GRID, model=model).generate([history(1)])


def test_beams_of_another_number_of_levels_are_refused():
    with pytest.raises(ConfigError, match="1 beams and 2 lambdas for SIDs of 2 levels"):
        recommender(GRID, beams=[4])


@pytest.mark.parametrize("k", [0, -1])
def test_fewer_than_one_item_cannot_be_asked_for(k):
    with pytest.raises(ConfigError, match="at least one"):
        recommender(GRID).recommend([history(1)], k, exclude_seen=False)


def test_a_history_that_only_grew_gives_the_slate_of_the_whole_history():
    model = tiny_model(GRID, n_codes=K)
    trie = build_trie(np.array(GRID), np.zeros(16), n_codes=K)
    engine = RetrieverRecommender(model, trie, DecodingConfig(beams=[16, 16], lambdas=[K, K]), cache=PrefixCache(8))
    engine.recommend([history(1, 2)], 4, exclude_seen=True, users=["u"])
    (grown,) = engine.recommend([history(1, 2, 7)], 4, exclude_seen=True, users=["u"])
    (whole,) = recommender(GRID, model=model).recommend([history(1, 2, 7)], 4, exclude_seen=True)
    assert grown.items.tolist() == whole.items.tolist()


def test_generate_returns_the_sids_of_all_beams():
    engine = recommender(SHARED, users_per_batch=2)
    found = engine.generate([history(), history(1), history(2, 4)])
    assert sorted(map(tuple, found)) == sorted([(0, 0), (0, 1), (2, 3)] * 3)
    assert engine.generate([]).shape == (0, 2)


def test_unconstrained_rate_is_0_where_every_combination_is_an_item():
    model = tiny_model(GRID, n_codes=K)
    assert unconstrained_invalid_rate(model, [history(), history(1, 2), history(15)], users_per_batch=2) == 0


def test_unconstrained_rate_is_1_where_the_greedy_code_is_no_item():
    model = tiny_model(GRID, n_codes=K)
    greedy = beam_search(model, [history()], None, beams=[1, 1], lambdas=[1, 1], score="iap").codes_BWM[0, 0].tolist()
    others = torch.tensor([sid for sid in GRID if sid != greedy])
    model.sid_codes = others
    assert unconstrained_invalid_rate(model, [history(), history()]) == 1
    model.sid_codes = torch.tensor([greedy])
    assert unconstrained_invalid_rate(model, [history(), history()]) == 0


def test_unconstrained_rate_counts_the_share_of_histories():
    model = tiny_model(GRID, n_codes=K, seed=1)
    pasts = [history(item, (item * 3) % 8) for item in range(8)]
    greedy = beam_search(model, pasts, None, beams=[1, 1], lambdas=[1, 1], score="iap").codes_BWM[:, 0].tolist()
    model.sid_codes = model.sid_codes[:8]  # the histories read no further
    misses = sum(codes not in GRID[:8] for codes in greedy)
    assert 0 < misses < 8
    assert unconstrained_invalid_rate(model, pasts, users_per_batch=3) == misses / 8


def test_unknown_items_of_a_history_do_not_disturb_the_unconstrained_rate():
    model = tiny_model(GRID, n_codes=K)
    assert unconstrained_invalid_rate(model, [history(10**6, -1, 3)]) == 0


def test_no_histories_have_no_invalid_codes():
    assert unconstrained_invalid_rate(tiny_model(GRID, n_codes=K), []) == 0
