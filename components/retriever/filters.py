"""Which items may be recommended: allow and deny lists, and how old an item may be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from components.retriever.contract import Ints
from infra.errors import ConfigError


@dataclass(frozen=True)
class ItemFilter:
    """Conditions on items; all given ones must hold.

    Attributes:
        allow: catalogue indices of the only items to recommend.
        deny: catalogue indices of items never to recommend.
        newer_than_ms: earliest time (ms, UTC) at which an item may have appeared.
    """

    allow: Ints | None = None
    deny: Ints | None = None
    newer_than_ms: int | None = None

    def mask(self, n_items: int, appeared_ms_N: Ints | None = None) -> npt.NDArray[np.bool_]:
        """allowed_N of a catalogue.

        Args:
            n_items: N.
            appeared_ms_N: when each item appeared; needed for `newer_than_ms`.

        Raises:
            ConfigError: an index outside the catalogue, or freshness without times.
        """
        allowed = np.ones(n_items, dtype=bool) if self.allow is None else np.zeros(n_items, dtype=bool)
        for name, items, value in (("allow", self.allow, True), ("deny", self.deny, False)):
            if items is None:
                continue
            outside = np.asarray(items)[(np.asarray(items) < 0) | (np.asarray(items) >= n_items)]
            if len(outside):
                raise ConfigError(
                    f"item {outside[0]} is not one of the catalogue's {n_items}", where=f"filter, {name}", mend="use catalogue indices"
                )
            allowed[items] = value
        if self.newer_than_ms is not None:
            if appeared_ms_N is None:
                raise ConfigError("freshness needs to know when items appeared", where="filter, newer_than_ms", mend="give their times")
            allowed &= appeared_ms_N >= self.newer_than_ms
        return allowed
