"""A click model over a real catalogue: users with tastes for groups of items, which change at a given hour.

The tastes come from what users did: items are grouped by whom they have in common, a user's taste for a group is the share of
the user's positives in it, and the most popular items of a group have the most appeal. Within a slate, an item comes into view
with a chance that falls with its rank, and is then clicked with a chance that is the product of taste and appeal: the
position-based model of Craswell et al. (WSDM 2008). At the shift, all who liked a group turn to the next one, and within groups
other items come into fashion.

U users, N items, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from components.retriever.contract import History
from components.semantic_ids.collaborative import pmi_features, unit
from infra.records import Level
from infra.service_sections import SimulationConfig

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_DIM = 32
_PRIOR = 3.0  # positives that everybody has, spread as everybody's
_LEAST_APPEAL = 0.05
_FOUND_POWER = 2.0  # who looks for something takes the best more often than the click of a passer-by would say


@dataclass(frozen=True)
class Visit:
    """What a user did with a slate.

    Attributes:
        views: item index and level of what came into view, best rank first.
        found: item indices that the user came upon elsewhere.
    """

    views: list[tuple[int, Level]]
    found: list[int]

    @property
    def clicks(self) -> int:
        """Items of the slate that were clicked, bought ones among them."""
        return sum(level >= Level.CLICK for _, level in self.views)


class World:
    """Users and what they like; the same seed gives the same users the same luck, whatever they are shown.

    Args:
        groups_N: of each item.
        tastes_UG: at most 1, which is the group that a user likes best.
        appeal_N: at most 1.
        settings: the click model and the shift.
        seed: of everything that is drawn.
    """

    def __init__(self, groups_N: Ints, tastes_UG: Floats, appeal_N: Floats, settings: SimulationConfig, *, seed: int) -> None:
        self._groups, self._tastes, self._appeal = groups_N, tastes_UG, appeal_N
        self._settings, self._seed = settings, seed

    @property
    def users(self) -> int:
        """How many there are."""
        return len(self._tastes)

    @cached_property
    def _changed(self) -> tuple[Floats, Floats]:
        """Tastes and appeal after the shift."""
        share, rng = self._settings.shift_share, np.random.default_rng((self._seed, 0))
        tastes = (1 - share) * self._tastes + share * np.roll(self._tastes, 1, axis=1)
        appeal = self._appeal.copy()
        for group in range(self._tastes.shape[1]):
            moved = np.flatnonzero((self._groups == group) & (rng.random(len(appeal)) < share))
            appeal[moved] = appeal[rng.permutation(moved)]
        return tastes / tastes.max(axis=1, keepdims=True), appeal

    def attraction(self, user: int, hour: int) -> Floats:
        """How much each item suits a user in an hour, 0 to 1, [N]."""
        tastes, appeal = self._changed if hour >= self._settings.shift_hour else (self._tastes, self._appeal)
        found: Floats = tastes[user, self._groups] * appeal
        return found

    def visitors(self, hour: int) -> Ints:
        """Users who come in an hour, in the order in which they do."""
        rng = np.random.default_rng((self._seed, 1, hour))
        return rng.permutation(self.users)[: self._settings.visits_per_hour]

    def visit(self, user: int, hour: int, slate: Sequence[int]) -> Visit:
        """What a user does with a slate of item indices."""
        settings, rng = self._settings, np.random.default_rng((self._seed, 2, hour, user))
        luck, attraction = rng.random((3, settings.slate_size)), self.attraction(user, hour)
        views = []
        for rank, item in enumerate(slate[: settings.slate_size]):
            if luck[0, rank] >= (rank + 1) ** -settings.position_bias:
                continue
            clicked = luck[1, rank] < settings.click_rate * attraction[item]
            bought = clicked and luck[2, rank] < settings.purchase_rate * attraction[item]
            views.append((item, Level.PURCHASE if bought else Level.CLICK if clicked else Level.EXPOSURE))
        weights = attraction**_FOUND_POWER
        count = min(int(rng.poisson(settings.found_per_visit)), int(np.count_nonzero(weights)))
        found = rng.choice(len(weights), count, replace=False, p=weights / weights.sum()).tolist() if count else []
        return Visit(views, found)


def world_of(
    histories: Sequence[History], popularity_N: Ints, settings: SimulationConfig, *, positive_level: int, window: int, seed: int
) -> World:
    """The world of a catalogue and its users.

    Args:
        histories: of each user; the order is that of `World`'s users.
        popularity_N: of each item.
        settings: of the simulation.
        positive_level: events of this level and above say what a user likes.
        window: of co-occurrence, see `pmi_features`.
        seed: of the groups and of all that happens.
    """
    from sklearn.cluster import KMeans

    timelines = [history.items for history in histories]
    count = min(settings.groups, len(popularity_N))
    vectors_ND = unit(pmi_features(timelines, len(popularity_N), dim=_DIM, window=window, seed=seed))
    groups_N = KMeans(count, n_init=1, random_state=seed).fit_predict(vectors_ND).astype(np.int64)
    liked_UG = np.array([np.bincount(groups_N[one.items[one.levels >= positive_level]], minlength=count) for one in histories], np.float64)
    share_G = (liked_UG.sum(axis=0) + 1) / (liked_UG.sum() + count)
    tastes_UG = (liked_UG + _PRIOR * share_G) / share_G**0.5  # a small group may be liked best, though most have more of a large one
    tastes_UG /= tastes_UG.max(axis=1, keepdims=True)
    return World(groups_N, tastes_UG, _appeal(groups_N, popularity_N), settings, seed=seed)


def _appeal(groups_N: Ints, popularity_N: Ints) -> Floats:
    """Place by popularity within the group, from `_LEAST_APPEAL` to 1."""
    appeal = np.zeros(len(groups_N))
    for group in np.unique(groups_N):
        members = np.flatnonzero(groups_N == group)
        order = np.argsort(popularity_N[members], kind="stable")
        appeal[members[order]] = np.linspace(0, 1, len(members)) if len(members) > 1 else 1.0
    return np.maximum(appeal**2, _LEAST_APPEAL)
