"""Rates beside events: smoothed, and never made of the label that they stand beside."""

from __future__ import annotations

import math

import numpy as np

from components.reward.rates import log_odds_before, log_odds_beside_events, mean_rates, smoothed_log_odds


def log_odds(rate: float) -> float:
    return math.log(rate / (1 - rate))


def labels(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


def test_a_key_is_pulled_to_the_mean_by_so_many_events():
    found = smoothed_log_odds(np.array([0, 0, 1, 1]), labels(1, 1, 0, np.nan), 3, prior=2)
    mean = (2 + 0.5) / (3 + 1)
    expected = [log_odds(4 * rate / 4) - log_odds(mean) for rate in ((2 + 2 * mean) / 4, (0 + 2 * mean) / 3)]
    np.testing.assert_allclose(found[:, 0], [*expected, 0], rtol=1e-6)  # a key that was never met is as good as the mean


def test_the_mean_is_finite_where_all_events_have_one_label():
    assert mean_rates(labels(1, 1, 1)).tolist() == [3.5 / 4]
    assert np.isfinite(smoothed_log_odds(np.array([0]), labels(1), 1, prior=1)).all()


def test_the_rate_beside_an_event_does_not_know_its_label():
    keys, folds = np.array([0, 0, 0, 0]), np.array([0, 1, 0, 1])
    train = np.array([True, True, True, False])
    found = [log_odds_beside_events(keys, labels(first, 1, 0, 1), train, folds, prior=1) for first in (0, 1)]
    assert found[0][0] == found[1][0]
    assert found[0][2] == found[1][2]  # of the same fold
    assert found[0][1] != found[1][1]


def test_rates_beside_later_events_are_made_of_the_whole_training_phase_and_of_nothing_later():
    keys, folds = np.array([0, 0, 0]), np.array([0, 1, 0])
    train = np.array([True, True, False])
    found = [log_odds_beside_events(keys, labels(1, 0, last), train, folds, prior=1) for last in (0, 1)]
    np.testing.assert_array_equal(*found)
    np.testing.assert_allclose(found[0][2], smoothed_log_odds(keys[:2], labels(1, 0), 1, prior=1)[0])


def test_habits_count_what_the_user_did_before_the_session():
    values = labels(1, 0, np.nan, 1, 1)  # two users: events 0 to 2, and 3 to 4
    found = log_odds_before(values, np.array([0, 0, 3]), np.array([0, 2, 4]), np.array([0.5]), prior=2)
    np.testing.assert_allclose(found[:, 0], [0, log_odds((1 + 1) / 4), log_odds((1 + 1) / 3)], rtol=1e-6)
