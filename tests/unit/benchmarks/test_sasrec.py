"""SASRec learns a walk, sees no future, and answers as every recommender does."""

import numpy as np
import pytest
import torch

from components.retriever.contract import History
from tests.benchmarks.sasrec import _NO_TARGET, SASRec, SASRecRecommender, SASRecSettings, _rows, fit_sasrec

RING = 10
SETTINGS = SASRecSettings(
    hidden_size=16, layers=1, dropout=0.0, max_history=6, epochs=20, rows_per_batch=8, learning_rate=0.01, ema_decay=0.9
)


def history(*items: int, level: int = 3) -> History:
    return History(np.array(items, dtype=np.int64), np.full(len(items), level))


@pytest.fixture(scope="module")
def walker() -> SASRecRecommender:
    """Trained on users who walk round a ring."""
    torch.manual_seed(0)
    return fit_sasrec([(np.arange(9) + start) % RING for start in range(RING)], RING, SETTINGS, seed=0)


def test_the_next_step_of_a_walk_comes_first(walker: SASRecRecommender) -> None:
    slates = walker.recommend([history(3, 4, 5), history(8, 9)], 3, exclude_seen=False)
    assert [slate.items[0] for slate in slates] == [6, 0]


def test_seen_items_are_left_out_when_asked(walker: SASRecRecommender) -> None:
    (slate,) = walker.recommend([history(3, 4, 5)], RING, exclude_seen=True)
    assert sorted(slate.items.tolist()) == [0, 1, 2, 6, 7, 8, 9]
    assert (np.diff(slate.scores) <= 0).all()


def test_events_below_the_level_are_not_read(walker: SASRecRecommender) -> None:
    noisy = History(np.array([3, 9, 4, 5]), np.array([3, 2, 3, 3]))
    expected, found = (walker.recommend([h], 4, exclude_seen=False)[0] for h in (history(3, 4, 5), noisy))
    np.testing.assert_array_equal(found.items, expected.items)


def test_an_empty_history_and_a_full_catalogue_are_answered(walker: SASRecRecommender) -> None:
    (slate,) = walker.recommend([history()], 2 * RING, exclude_seen=False)
    assert sorted(slate.items.tolist()) == list(range(RING))


def test_a_state_knows_nothing_of_later_items() -> None:
    model = SASRec(RING, SETTINGS).eval()
    one, other = torch.tensor([[RING, 1, 2, 3]]), torch.tensor([[RING, 1, 7, 8]])
    torch.testing.assert_close(model(one)[:, :2], model(other)[:, :2])


def test_what_comes_before_the_first_target_is_read_and_not_predicted() -> None:
    """Users jump to the item opposite at the end: with the jump as the only target, nothing else is learned."""
    walks = [np.append((np.arange(5) + start) % RING, (start + 9) % RING) for start in range(RING)]
    jumper = fit_sasrec(walks, RING, SETTINGS, seed=0, first_targets=[5] * RING)
    (slate,) = jumper.recommend([history(3, 4, 5, 6, 7)], 1, exclude_seen=False)
    assert slate.items[0] == 2
    (middle,) = jumper.recommend([history(3, 4)], RING, exclude_seen=False)
    assert middle.scores[middle.items.tolist().index(5)] < middle.scores[0]


def test_pieces_are_cut_from_the_end_and_those_without_a_target_are_left_out() -> None:
    pieces = [(items.tolist(), targets.tolist()) for items, targets in _rows(np.arange(10, 20), 4, 3)]
    assert pieces == [([17, 18, 19], [17, 18, 19]), ([14, 15, 16], [14, 15, 16])]
    ((_, targets),) = _rows(np.arange(10, 13), 2, 6)
    assert targets.tolist() == [_NO_TARGET, _NO_TARGET, 12]
    assert list(_rows(np.arange(4), 4, 6)) == []
