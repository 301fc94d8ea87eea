"""How well scores tell ones from zeros: AUC, ROC curve, calibration; nothing where there is only one class."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score, roc_curve

Array = npt.NDArray[np.floating[Any]]
_POINTS, _BINS = 100, 10


def auc(labels: Array, scores: Array) -> float | None:
    """Area under the ROC curve over the labels that are known; None with one class only, or scores that are not finite."""
    labels, scores = _known(labels, scores)
    return float(roc_auc_score(labels, scores)) if _is_judgeable(labels, scores) else None


def roc(labels: Array, scores: Array) -> dict[str, list[float]]:
    """False and true positive rates and thresholds of the ROC curve, at most some 100 points; empty lists where `auc` is None."""
    labels, scores = _known(labels, scores)
    if not _is_judgeable(labels, scores):
        return {"fpr": [], "tpr": [], "threshold": []}
    fpr, tpr, threshold = roc_curve(labels, scores)
    threshold[0] = scores.max() + 1  # scikit-learn says infinity, which is no JSON
    kept = np.unique(np.linspace(0, len(fpr) - 1, _POINTS).round().astype(int))
    return {"fpr": fpr[kept].tolist(), "tpr": tpr[kept].tolist(), "threshold": threshold[kept].tolist()}


def calibration(labels: Array, probabilities: Array) -> dict[str, list[float]]:
    """Mean prediction and share of ones in ten groups of equal size, by rising prediction."""
    labels, probabilities = _known(labels, probabilities)
    order = np.argsort(probabilities, kind="stable")
    parts = [part for part in np.array_split(order, _BINS) if len(part)]
    return {
        "predicted": [float(probabilities[part].mean()) for part in parts],
        "observed": [float(labels[part].mean()) for part in parts],
    }


def _known(labels: Array, scores: Array) -> tuple[Array, Array]:
    known = ~np.isnan(labels)
    return labels[known], scores[known]


def _is_judgeable(labels: Array, scores: Array) -> bool:
    return len(np.unique(labels)) == 2 and bool(np.isfinite(scores).all())
