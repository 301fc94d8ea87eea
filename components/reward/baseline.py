"""The baseline: for each objective a logistic regression on the rates of user and item in the training phase.

Shapes: E events, O objectives.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Final

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression

from components.reward.data import FOLDS, Floats, Ints, Sessions
from components.reward.metrics import auc
from components.reward.rates import log_odds_beside_events
from infra.records import Phase

_PRIORS: Final = tuple(product((2.0, 5.0, 10.0, 20.0), (5.0, 20.0, 50.0)))  # of users, of items
Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Baseline:
    """A fitted regression.

    Attributes:
        scores_E: log odds of all events.
        params: priors of the rates, of user and item, chosen on the validation phase.
    """

    scores_E: Scores
    params: dict[str, float]


def fit_baseline(data: Sessions, objective: int) -> Baseline:
    """Fit on the training phase, where each event meets rates that its own label is not in; priors that suit VALID best win."""
    train, valid = (data.events_of(data.of_phase(phase)) for phase in (Phase.TRAIN, Phase.VALID))
    labels_EO = data.labels_EO[:, [objective]]
    best: tuple[float, Baseline] | None = None
    for user_prior, item_prior in _PRIORS:
        features = _rates(data, labels_EO, train, user_prior, item_prior)
        scores = _regress(features, labels_EO[:, 0], train)
        found = auc(labels_EO[valid, 0], scores[valid])
        if best is None or (found or 0.0) > best[0]:
            best = found or 0.0, Baseline(scores, {"user_prior": user_prior, "item_prior": item_prior})
    assert best is not None
    return best[1]


def fit_current_rates(data: Sessions, objective: int) -> Scores:
    """The same with what the reward model has of rates: those of all objectives, and those of the user up to the request.

    Rates of the training phase grow old within days, which says nothing about models; this is the harder comparison.
    """
    session_of_E = np.repeat(np.arange(len(data.starts_S)), data.ends_S - data.starts_S)
    features = np.concatenate([data.habits_SO[session_of_E], data.rates_EO], axis=1)
    return _regress(features, data.labels_EO[:, objective], data.events_of(data.of_phase(Phase.TRAIN)))


def _rates(data: Sessions, labels_EO: Floats, train: Ints, user_prior: float, item_prior: float) -> Floats:
    is_train_E = np.zeros(len(data.items_E), dtype=bool)
    is_train_E[train] = True
    folds_E = np.arange(len(data.items_E)) % FOLDS  # by events: a user's other events are what the rate is made of
    of_users = log_odds_beside_events(data.users_E, labels_EO, is_train_E, folds_E, prior=user_prior)
    of_items = log_odds_beside_events(data.items_E, labels_EO, is_train_E, folds_E, prior=item_prior)
    return np.concatenate([of_users, of_items], axis=1)


def _regress(features: Floats, labels_E: Floats, train: Ints) -> Scores:
    known = train[~np.isnan(labels_E[train])]
    model = LogisticRegression(max_iter=1000).fit(features[known], labels_E[known])
    scores: Scores = model.decision_function(features)
    return scores
