"""AUC, ROC curve and calibration by hand; one class only gives none of them."""

from __future__ import annotations

import numpy as np
import pytest

from components.reward.metrics import auc, calibration, roc

LABELS = np.array([0, 1, np.nan, 0, 1], np.float32)
SCORES = np.array([0.1, 0.3, 9.0, 0.4, 0.8], np.float32)


def test_auc_is_the_share_of_pairs_in_the_right_order_over_known_labels():
    assert auc(LABELS, SCORES) == 3 / 4  # of (0.3, 0.8) x (0.1, 0.4), one pair is the wrong way round


@pytest.mark.parametrize(
    ("labels", "scores"), [([1, 1], [0.1, 0.2]), ([0, np.nan], [0.1, 0.2]), ([], []), ([0, 1], [0.1, np.nan]), ([0, 1], [np.inf, 0.2])]
)
def test_without_both_classes_or_finite_scores_there_is_none(labels, scores):
    arrays = np.array(labels, np.float32), np.array(scores, np.float32)
    assert auc(*arrays) is None
    assert roc(*arrays) == {"fpr": [], "tpr": [], "threshold": []}


def test_the_curve_goes_from_corner_to_corner_with_finite_thresholds():
    curve = roc(LABELS, SCORES)
    assert (curve["fpr"], curve["tpr"]) == ([0, 0, 0.5, 0.5, 1], [0, 0.5, 0.5, 1, 1])
    assert np.isfinite(curve["threshold"]).all()


def test_a_long_curve_is_thinned():
    rng = np.random.default_rng(0)
    curve = roc(rng.integers(0, 2, 5000).astype(np.float32), rng.random(5000))
    assert len(curve["fpr"]) <= 100
    assert (curve["fpr"][0], curve["fpr"][-1]) == (0, 1)


def test_calibration_groups_by_rising_prediction():
    labels, predicted = np.array([1.0, 0, 1, 1] * 5), np.array([0.9, 0.1, 0.8, 0.2] * 5)
    found = calibration(labels, predicted)
    assert found["predicted"] == sorted(found["predicted"])
    assert (found["observed"][0], found["observed"][-1]) == (0, 1)
