"""Baselines at their best: settings chosen on the validation phase, so that beating them means something.

The grids are searched one setting at a time, each from the best found so far: a dozen rankings instead of a hundred.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Generic, TypeVar

import pyarrow as pa
import scipy.sparse as sp

from components.evaluation.baselines import ItemKNN, Popularity, count_cooccurrence
from components.evaluation.metrics import measure
from components.evaluation.protocol import Cases, build_cases, train_events
from components.retriever.contract import Recommender
from infra.logs import ProgressMeter
from infra.records import Level, Phase

R = TypeVar("R", bound=Recommender)

# The first value of each setting is where the search starts and what is taken where there is nothing to tune on.
HALF_LIVES_DAYS: Final = (None, 30.0, 7.0, 3.0, 1.0)
DECAYS: Final = (0.9, 0.6, 0.8, 0.95, 1.0)
SHRINKAGES: Final = (5.0, 0.0, 20.0, 100.0)
ALPHAS: Final = (0.5, 0.7)
MAX_USERS: Final = 2000
"""Validation users; the standard error of a hit rate is then at most 0.011."""


@dataclass(frozen=True)
class Tuned(Generic[R]):
    """A baseline with the settings that did best.

    Attributes:
        recommender: fitted on the training phase.
        params: the chosen settings.
        metric: what they were chosen by.
        value: that figure on the validation users; None where there were none.
    """

    recommender: R
    params: dict[str, Any]
    metric: str
    value: float | None


def tune_baselines(
    timelines: pa.Table,
    n_items: int,
    truths: Mapping[str, int],
    ks: Sequence[int],
    *,
    positive_level: int,
    exclude_seen: bool,
    min_level: int = 1,
    max_users: int = MAX_USERS,
    seed: int = 0,
) -> tuple[Tuned[Popularity], Tuned[ItemKNN]]:
    """Fit popularity and item-kNN on TRAIN and choose their settings on VALID.

    Args:
        timelines: table in the `infra.records.TIMELINES` schema.
        n_items: size of the catalogue.
        truths: as in `EvaluationConfig`; the first one is tuned for.
        ks: cut-offs of the report, of which `tuning_cutoff` takes one.
        positive_level: lowest level of a positive; the baselines try these events against all events.
        exclude_seen: as in the test cases.
        min_level: as in the test cases.
        max_users: size of the sample of validation users.
        seed: of the sample.
    """
    primary = dict(itertools.islice(truths.items(), 1))
    cases = build_cases(timelines, Phase.VALID, primary, exclude_seen=exclude_seen, min_level=min_level, max_users=max_users, seed=seed)
    events = train_events(timelines)
    k = tuning_cutoff(ks)
    levels = (positive_level, int(Level.PSEUDO_EXPOSURE))

    @cache
    def counts(level: int) -> sp.csr_matrix:
        return count_cooccurrence(events, n_items, level)

    def popularity(params: Mapping[str, Any]) -> Popularity:
        return Popularity.fit(events, n_items, **params)

    def item_knn(params: Mapping[str, Any]) -> ItemKNN:
        return ItemKNN(counts(params["min_level"]), best_popularity.recommender.weights, **params)

    best_popularity = search({"min_level": levels, "half_life_days": HALF_LIVES_DAYS}, popularity, cases, k)
    grid = {"min_level": levels, "decay": DECAYS, "shrinkage": SHRINKAGES, "alpha": ALPHAS}
    return best_popularity, search(grid, item_knn, cases, k)


def tuning_cutoff(ks: Sequence[int]) -> int:
    """The k whose HR@k baselines are tuned by: 10, or the smallest cut-off where 10 is none."""
    return 10 if 10 in ks else min(ks)


def search(grid: Mapping[str, Sequence[Any]], build: Callable[[Mapping[str, Any]], R], cases: Cases, k: int) -> Tuned[R]:
    """Coordinate search for the highest HR@k of the first truth; of equal settings the earlier one stays.

    Args:
        grid: setting -> its values; the first ones are the start.
        build: settings -> fitted method.
        cases: validation users.
        k: cut-off.
    """
    metric = f"hr@{k}"

    def judge(params: dict[str, Any]) -> Tuned[R]:
        recommender = build(params)
        slates = recommender.recommend(cases.histories, k, exclude_seen=cases.exclude_seen)
        value = measure([items for items, _ in slates], cases, [k]).get(metric)
        meter.advance(method=recommender.name)
        return Tuned(recommender, params, metric, value)

    meter = ProgressMeter(1 + sum(len(values) - 1 for values in grid.values()), step="tuning", unit="settings")
    try:
        best = judge({name: values[0] for name, values in grid.items()})
        for name, values in grid.items():
            for value in values[1:]:
                candidate = judge(best.params | {name: value})
                best = max(best, candidate, key=lambda tuned: tuned.value or 0.0)
    finally:
        meter.close()
    return best
