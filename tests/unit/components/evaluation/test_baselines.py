import math

import numpy as np
import pytest

from components.evaluation.baselines import ItemKNN, Popularity, count_cooccurrence
from components.evaluation.protocol import TrainEvents
from components.retriever.contract import History

DAY_MS = 86_400_000
CLICK, EXPOSURE = 3, 2


def events_of(*rows):
    """Rows are (user, item, level, day)."""
    users, items, levels, days = (np.array(column) for column in zip(*rows, strict=True))
    return TrainEvents(users, items, levels, days * DAY_MS)


def history(*items, level=CLICK):
    return History(np.array(items, np.int32), np.full(len(items), level))


# Users 0 and 1 have items 0 and 1, user 1 has item 2 as well, user 2 has items 2 and 3.
EVENTS = events_of(
    (0, 0, CLICK, 0), (0, 1, CLICK, 0), (1, 0, CLICK, 0), (1, 1, CLICK, 0), (1, 2, CLICK, 0), (2, 2, CLICK, 0), (2, 3, CLICK, 0)
)


def knn(events=EVENTS, **settings):
    return ItemKNN.fit(events, 5, **({"min_level": 1, "shrinkage": 0.0, "decay": 1.0} | settings))


def test_popularity_counts_positive_events_and_breaks_ties_by_the_lower_index():
    events = events_of((0, 2, CLICK, 0), (1, 2, CLICK, 0), (0, 3, CLICK, 0), (0, 1, CLICK, 0), (1, 0, EXPOSURE, 0))
    (slate,) = Popularity.fit(events, 5, min_level=CLICK).recommend([history()], 5, exclude_seen=True)
    assert slate.items.tolist() == [2, 1, 3, 0, 4]
    assert slate.scores.tolist() == [2, 1, 1, 0, 0]


def test_a_half_life_lets_a_recent_event_outweigh_two_old_ones():
    events = events_of((0, 0, CLICK, 0), (1, 0, CLICK, 0), (2, 1, CLICK, 4))
    (slate,) = Popularity.fit(events, 2, min_level=CLICK, half_life_days=2.0).recommend([history()], 2, exclude_seen=True)
    assert slate.items.tolist() == [1, 0]
    assert slate.scores.tolist() == [1.0, 0.5]  # two events, two half-lives old


def test_cooccurrence_counts_users_and_an_item_once_a_user():
    events = events_of((0, 0, CLICK, 0), (0, 0, CLICK, 1), (0, 1, CLICK, 1), (1, 0, EXPOSURE, 0), (1, 1, CLICK, 0))
    assert count_cooccurrence(events, 2, 1).toarray().tolist() == [[2, 2], [2, 2]]
    assert count_cooccurrence(events, 2, CLICK).toarray().tolist() == [[1, 1], [1, 2]]


def test_knn_scores_are_cosines_of_the_user_sets():
    (slate,) = knn().recommend([history(0)], 2, exclude_seen=True)
    assert slate.items.tolist() == [1, 2]
    assert slate.scores.tolist() == pytest.approx([2 / 2, 1 / 2])


def test_shrinkage_adds_to_the_denominator():
    (slate,) = knn(shrinkage=2.0).recommend([history(0)], 1, exclude_seen=True)
    assert slate.scores.tolist() == pytest.approx([2 / (2 + 2)])


def test_alpha_moves_the_normalisation_to_the_candidate():
    (slate,) = knn(alpha=1.0).recommend([history(3)], 1, exclude_seen=True)
    assert slate.scores.tolist() == pytest.approx([1 / 2])
    (slate,) = knn(alpha=0.5).recommend([history(3)], 1, exclude_seen=True)
    assert slate.scores.tolist() == pytest.approx([1 / math.sqrt(2)])


def test_decay_weighs_the_last_item_of_the_history_most():
    forwards, backwards = knn(decay=0.1).recommend([history(0, 3), history(3, 0)], 1, exclude_seen=True)
    assert forwards.items.tolist() == [2]
    assert forwards.scores.tolist() == pytest.approx([1 / math.sqrt(2) + 0.1 / 2])
    assert backwards.items.tolist() == [1]
    assert backwards.scores.tolist() == pytest.approx([1.0])


def test_an_item_does_not_recommend_itself():
    (slate,) = knn().recommend([history(0)], 5, exclude_seen=False)
    assert slate.scores[slate.items.tolist().index(0)] == 0


@pytest.mark.parametrize("past", [history(), history(4), history(0, level=EXPOSURE)], ids=["empty", "unknown item", "below the level"])
def test_a_history_that_says_nothing_is_answered_by_popularity(past):
    (slate,) = knn(min_level=CLICK).recommend([past], 3, exclude_seen=False)
    assert slate.items.tolist() == [0, 1, 2]  # two users each, the lower index first
    assert slate.scores.tolist() == [0, 0, 0]


def test_sparse_and_dense_similarities_rank_alike():
    generator = np.random.default_rng(0)
    rows = [(user, item, CLICK, 0) for user in range(40) for item in generator.choice(200, 4, replace=False)]
    sparse = ItemKNN.fit(events_of(*rows), 200, min_level=1, shrinkage=1.0, decay=0.9)
    dense = ItemKNN.fit(events_of(*rows), 200, min_level=1, shrinkage=1.0, decay=0.9)
    dense._similarity = sparse._similarity.toarray()
    past = [history(*generator.choice(200, 6)) for _ in range(20)]
    for one, other in zip(sparse.recommend(past, 50, exclude_seen=True), dense.recommend(past, 50, exclude_seen=True), strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-6)
