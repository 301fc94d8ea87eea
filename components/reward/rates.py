"""Rates of users and items: how often each earned an objective in the training phase, smoothed, as log odds
relative to the mean: 0 is what is thought of who or what has not been seen.

The rate that stands beside an event of the training phase comes from events of other folds: its own label is not in it, so
that what is fitted on it weighs it as it will be met later. Shapes: E events, S sessions, K keys (users or items), O objectives.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


def smoothed_log_odds(keys_E: Ints, labels_EO: Floats, n_keys: int, *, prior: float) -> Floats:
    """Log odds of each key [K, O]; NaN labels are left out.

    Args:
        keys_E: in [0, K).
        labels_EO: 1, 0 or NaN.
        n_keys: K.
        prior: events with the mean rate that are added to those of each key.
    """
    known = ~np.isnan(labels_EO)
    ones = np.where(known, labels_EO, 0)
    mean_O = mean_rates(labels_EO)
    found = np.empty((n_keys, labels_EO.shape[1]), np.float32)
    for o, mean in enumerate(mean_O):
        count = np.bincount(keys_E, known[:, o], n_keys)
        rate = (np.bincount(keys_E, ones[:, o], n_keys) + prior * mean) / (count + prior)
        found[:, o] = _log_odds(rate) - _log_odds(mean)
    return found


def mean_rates(labels_EO: Floats) -> npt.NDArray[np.float64]:
    """Share of ones of each objective; where all events have earned it, or none, half an event away from that."""
    known = ~np.isnan(labels_EO)
    found: npt.NDArray[np.float64] = (np.where(known, labels_EO, 0).sum(axis=0) + 0.5) / (known.sum(axis=0) + 1)
    return found


def log_odds_before(labels_EO: Floats, firsts_S: Ints, starts_S: Ints, mean_O: npt.NDArray[np.float64], *, prior: float) -> Floats:
    """Log odds of the user of each session from what came before it [S, O], relative to the mean.

    Args:
        labels_EO: of all events, user after user.
        firsts_S: first event of the session's user.
        starts_S: first event of the session.
        mean_O: of the training phase.
        prior: events with that mean that are added.
    """
    known = ~np.isnan(labels_EO)
    ones_EO = np.cumsum(np.where(known, labels_EO, 0), axis=0, dtype=np.float64)
    count_EO = np.cumsum(known, axis=0, dtype=np.float64)
    ones_EO, count_EO = (np.concatenate([np.zeros((1, labels_EO.shape[1])), sums]) for sums in (ones_EO, count_EO))
    ones_SO, count_SO = ones_EO[starts_S] - ones_EO[firsts_S], count_EO[starts_S] - count_EO[firsts_S]
    return (_log_odds((ones_SO + prior * mean_O) / (count_SO + prior)) - _log_odds(mean_O)).astype(np.float32)


def _log_odds(rate: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.log(rate) - np.log1p(-rate)


def log_odds_beside_events(keys_E: Ints, labels_EO: Floats, is_train_E: npt.NDArray[np.bool_], folds_E: Ints, *, prior: float) -> Floats:
    """Log odds of the key of each event [E, O], made of training events of other folds; for later events of all training events.

    Args:
        keys_E: user or item of each event.
        labels_EO: 1, 0 or NaN.
        is_train_E: which events rates may be made of.
        folds_E: fold of each event.
        prior: as for `smoothed_log_odds`.
    """
    n_keys = int(keys_E.max(initial=0)) + 1
    found = np.empty(labels_EO.shape, np.float32)
    for fold in (-1, *np.unique(folds_E[is_train_E])):
        used = is_train_E & (folds_E != fold)
        rates_KO = smoothed_log_odds(keys_E[used], labels_EO[used], n_keys, prior=prior)
        wanted = ~is_train_E if fold == -1 else is_train_E & (folds_E == fold)
        found[wanted] = rates_KO[keys_E[wanted]]
    return found
