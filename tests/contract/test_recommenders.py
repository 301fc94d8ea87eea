"""One suite that every recommender passes; add a factory to `FACTORIES` to put another one through it."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from components.evaluation.baselines import ItemKNN, Popularity
from components.evaluation.protocol import TrainEvents
from components.retriever.contract import History, Recommender
from components.retriever.model import Retriever
from components.retriever.packing import collate, rows_of_timeline
from components.retriever.recommender import RetrieverRecommender
from components.semantic_ids.trie import build_trie
from infra.records import Level
from infra.sections import DecodingConfig, LossConfig, RetrieverConfig

N_ITEMS, N_USERS = 12, 60
FAVOURITE, UNKNOWN = 4, 11
"""Everybody ends with the favourite; nobody ever met the unknown item."""

Factory = Callable[[TrainEvents, int], Recommender]


def popularity(events: TrainEvents, n_items: int) -> Recommender:
    return Popularity.fit(events, n_items, min_level=Level.CLICK)


def item_knn(events: TrainEvents, n_items: int) -> Recommender:
    return ItemKNN.fit(events, n_items, min_level=1, shrinkage=1.0, decay=0.9)


def retriever(events: TrainEvents, n_items: int) -> Recommender:
    """A tiny retriever; each user's events are learned as two requests (history) and as one (cold start)."""
    codes = np.array([[item % 4, item // 4] for item in range(n_items)])
    config = RetrieverConfig(hidden_size=16, layers=1, heads=2, kv_heads=1, ff_size=32, dropout=0.0, rank_heads=1, rank_mlp=16)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Retriever(config, codes, n_codes=4)
    rows = []
    for user in np.unique(events.users):
        items, levels = (column[events.users == user].astype(np.int64) for column in (events.items, events.levels))
        for requests in (np.arange(len(items)), np.zeros(len(items), dtype=np.int64)):
            rows += rows_of_timeline(items, levels, requests, history_min_level=1, target_min_level=1, max_history=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for start in range(0, 10 * len(rows), 20):
        batch = collate([rows[i % len(rows)] for i in range(start, start + 20)])
        optimizer.zero_grad()
        model(batch, LossConfig(train_lambdas=[4, 4]))["loss"].backward()
        optimizer.step()
    trie = build_trie(codes, np.bincount(events.items, minlength=n_items), n_codes=4)
    return RetrieverRecommender(model, trie, DecodingConfig(beams=[4, n_items], lambdas=[4, 4], users_per_batch=4))


FACTORIES: list[Factory] = [popularity, item_knn, retriever]


def world() -> TrainEvents:
    """Each user clicks one of the other items and then the favourite, a minute apart."""
    others = [item for item in range(N_ITEMS) if item not in (FAVOURITE, UNKNOWN)]
    items = np.array([[others[user % len(others)], FAVOURITE] for user in range(N_USERS)], np.int32)
    times = np.tile(np.array([0, 60_000]), N_USERS)
    return TrainEvents(np.repeat(np.arange(N_USERS), 2), items.ravel(), np.full(2 * N_USERS, Level.CLICK, np.int8), times)


def history(*items: int) -> History:
    return History(np.array(items, np.int32), np.full(len(items), Level.CLICK, np.int8))


HISTORIES = [history(0), history(3, 1), history(), history(UNKNOWN), history(2, 2, FAVOURITE), history(*range(10))]


@pytest.fixture(scope="module", params=FACTORIES, ids=lambda factory: factory.__name__)
def recommender(request):
    return request.param(world(), N_ITEMS)


def test_it_has_a_name_for_reports(recommender):
    assert recommender.name


def test_no_histories_give_no_slates(recommender):
    assert recommender.recommend([], 3, exclude_seen=True) == []


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("k", [1, 5, N_ITEMS, 100])
def test_each_history_gets_k_distinct_items_of_the_catalogue_best_first(recommender, k, exclude_seen):
    slates = recommender.recommend(HISTORIES, k, exclude_seen=exclude_seen)
    assert len(slates) == len(HISTORIES)
    for past, slate in zip(HISTORIES, slates, strict=True):
        available = N_ITEMS - (len(set(past.items.tolist())) if exclude_seen else 0)
        assert len(slate.items) == len(slate.scores) == min(k, available)
        assert len(set(slate.items.tolist())) == len(slate.items)
        assert set(slate.items.tolist()) <= set(range(N_ITEMS))
        assert np.isfinite(slate.scores).all()
        assert (np.diff(slate.scores) <= 0).all()


def test_items_are_integers_and_scores_single_floats(recommender):
    (slate,) = recommender.recommend([history(0)], 3, exclude_seen=True)
    assert np.issubdtype(slate.items.dtype, np.integer)
    assert slate.scores.dtype == np.float32


def test_seen_items_are_left_out_only_when_asked(recommender):
    for past, slate in zip(HISTORIES, recommender.recommend(HISTORIES, N_ITEMS, exclude_seen=True), strict=True):
        assert not set(past.items.tolist()) & set(slate.items.tolist())
    for slate in recommender.recommend(HISTORIES, N_ITEMS, exclude_seen=False):
        assert set(slate.items.tolist()) == set(range(N_ITEMS))


def test_a_shorter_slate_is_the_head_of_a_longer_one(recommender):
    short, long = (recommender.recommend(HISTORIES, k, exclude_seen=True) for k in (2, 6))
    for few, many in zip(short, long, strict=True):
        assert few.items.tolist() == many.items[: len(few.items)].tolist()


def test_the_answer_depends_neither_on_the_call_nor_on_the_company(recommender):
    together = recommender.recommend(HISTORIES, 3, exclude_seen=True)
    for past, slate in zip(HISTORIES, together, strict=True):
        (alone,) = recommender.recommend([past], 3, exclude_seen=True)
        assert alone.items.tolist() == slate.items.tolist()
        assert alone.scores == pytest.approx(slate.scores, abs=1e-4)


def test_a_history_is_not_changed(recommender):
    past = history(3, 1)
    recommender.recommend([past], 3, exclude_seen=True)
    assert past.items.tolist() == [3, 1]
    assert past.levels.tolist() == [Level.CLICK] * 2


@pytest.mark.parametrize("past", [history(0), history(7), history()], ids=["after 0", "after 7", "cold start"])
def test_known_answer_what_everybody_takes_next_comes_first(recommender, past):
    (slate,) = recommender.recommend([past], 1, exclude_seen=True)
    assert slate.items.tolist() == [FAVOURITE]
