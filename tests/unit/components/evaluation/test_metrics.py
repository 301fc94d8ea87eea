import math

import numpy as np
import pytest

from components.evaluation.metrics import evaluate, hit_matrix, hit_rate, invalid_rate, measure, ndcg
from components.evaluation.protocol import Cases
from components.retriever.contract import History, Ranked

A, B, C = np.array([1, 2, 3, 4]), np.array([9, 8, 7, 6]), np.array([5])
SECOND_PLACE = 1 / math.log2(3)


def cases_of(exclude_seen=True, **truths):
    users = len(next(iter(truths.values())))
    histories = [History(np.array([user]), np.array([3])) for user in range(users)]
    arrays = {name: [np.array(items, int) for items in sets] for name, sets in truths.items()}
    return Cases([f"u{user}" for user in range(users)], histories, arrays, exclude_seen, 0)


def test_hits_mark_the_places_of_true_items_and_short_rankings_end_in_misses():
    hits = hit_matrix([A, C], [np.array([2, 4]), np.array([5])], 3)
    assert hits.tolist() == [[False, True, False], [True, False, False]]


@pytest.mark.parametrize(("k", "expected"), [(1, 0.0), (2, 0.5), (4, 1.0)])
def test_hit_rate_is_the_share_of_the_truth_that_was_found(k, expected):
    hits = hit_matrix([A], [np.array([2, 4])], 4)
    assert hit_rate(hits, np.array([2]), k).tolist() == [expected]


def test_hit_rate_divides_by_the_whole_truth_even_where_k_is_smaller():
    hits = hit_matrix([A], [np.array([1, 2, 3])], 4)
    assert hit_rate(hits, np.array([3]), 2).tolist() == pytest.approx([2 / 3])


def test_ndcg_of_one_true_item_falls_with_its_place():
    hits = hit_matrix([A, A], [np.array([1]), np.array([2])], 4)
    assert ndcg(hits, np.array([1, 1]), 4).tolist() == pytest.approx([1.0, SECOND_PLACE])


def test_ndcg_is_measured_against_the_best_that_k_places_allow():
    hits = hit_matrix([A], [np.array([1, 4, 7])], 4)
    best = 1 + SECOND_PLACE + 1 / 2
    assert ndcg(hits, np.array([3]), 4).tolist() == pytest.approx([(1 + 1 / math.log2(5)) / best])
    assert ndcg(hits, np.array([3]), 1).tolist() == [1.0]


def test_measure_names_the_first_truth_plainly_and_averages_over_users_who_have_it():
    cases = cases_of(click=[[2], []], pv=[[1, 2], [6]])
    figures = measure([A, B], cases, [2, 4])
    assert figures["hr@2"] == 1.0
    assert figures["ndcg@2"] == pytest.approx(SECOND_PLACE)
    assert figures["pv/hr@2"] == 0.5
    assert figures["pv/hr@4"] == 1.0
    assert figures["pv/hr@2_se"] == pytest.approx(0.5)  # values 1 and 0: deviation sqrt(1/2), over sqrt(2)
    assert "hr@2_se" not in figures  # one user has no spread


def test_a_truth_that_nobody_has_gives_no_figures():
    assert measure([A], cases_of(click=[[]], pv=[[1]]), [1]).keys() == {"pv/hr@1", "pv/ndcg@1"}
    assert measure([], cases_of(click=[]), [1]) == {}


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_evaluate_asks_in_batches_for_the_deepest_cutoff_and_passes_the_protocol_on(batch):
    asked = []

    class Counting:
        name = "counting"

        def recommend(self, histories, k, *, exclude_seen):
            asked.append((len(histories), k, exclude_seen))
            return [Ranked(history.items + np.arange(k), np.zeros(k, np.float32)) for history in histories]

    figures = evaluate(Counting(), cases_of(exclude_seen=False, click=[[0], [2], [7]]), [1, 2], batch=batch)
    assert figures["hr@1"] == pytest.approx(1 / 3)
    assert figures["hr@2"] == pytest.approx(2 / 3)
    assert sum(users for users, _, _ in asked) == 3
    assert {(k, exclude_seen) for _, k, exclude_seen in asked} == {(2, False)}


def test_invalid_rate_is_the_share_of_generated_ids_outside_the_table():
    table = np.array([[0, 1], [1, 0]])
    assert invalid_rate(np.array([[0, 1], [1, 1], [0, 0], [1, 0]]), table) == 0.5
    with pytest.raises(ValueError, match="no semantic ID"):
        invalid_rate(np.empty((0, 2), int), table)
