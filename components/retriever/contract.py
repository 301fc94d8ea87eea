"""What every recommender offers, the retriever and the baselines alike; numpy only, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class History:
    """What a user did before the moment of recommendation, in time order.

    Attributes:
        items: catalogue indices, one an event.
        levels: feedback level of each event.
    """

    items: Ints
    levels: Ints


class Ranked(NamedTuple):
    """Items in falling order of score, without repetition; shorter than k only if the catalogue is exhausted."""

    items: Ints
    scores: Floats


class Recommender(Protocol):
    """A method that ranks the whole catalogue for a history."""

    @property
    def name(self) -> str:
        """Key of the method in reports."""
        ...

    def recommend(self, histories: Sequence[History], k: int, *, exclude_seen: bool) -> list[Ranked]:
        """The best k items for each history.

        Args:
            histories: possibly empty ones (cold start), which are answered too.
            k: how many items.
            exclude_seen: leave out items that occur in the history.
        """
        ...
