"""Model replicas that compute a fresh slate when a user is about to ask for one: the early trigger (RankGR 3.4)."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import numpy as np
from ray import serve

from components.precompute.job import Loader, history_of, slates_of
from infra.activity import UserActivity
from infra.config import Config
from infra.logs import get_logger
from infra.slate_store import AsyncSlateReader, UserHistory

class Precompute:
    """One replica: a bundle in memory and a connection to the slate store.

    Args:
        config_json: `Config.to_json`.
        bundle_uri: the bundle to load.
        redis_url: where histories come from and slates go.
        loader: how the bundle is loaded.
    """

    def __init__(self, config_json: str, bundle_uri: str, redis_url: str, loader: Loader) -> None:
        self.config = Config.from_json(config_json)
        self.bundle = loader(bundle_uri)
        self.recommender = self.bundle.recommender()
        self.index = {item_id: index for index, item_id in enumerate(self.bundle.item_ids)}
        self.reader = AsyncSlateReader.of(self.config.slate_store, redis_url)
        self.activity = UserActivity(self.reader)
        self.log = get_logger("precompute")
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(1)  # replicas share the cores; more of them come by autoscaling
        batching: Any = self.compute
        batching.set_max_batch_size(self.config.decoding.users_per_batch)
        batching.set_batch_wait_timeout_s(self.config.serving.batch_wait_ms / 1000)

    @serve.batch  # type: ignore[untyped-decorator]
    async def compute(self, user_ids: list[str]) -> list[bool]:
        """Compute and store slates; returns for each request whether it was stored.

        It is not where another version than this replica's bundle is active.
        """
        users = list(dict.fromkeys(user_ids))
        histories = await asyncio.gather(*map(self.activity.history, users))
        decoding = self.config.decoding
        slates = await asyncio.to_thread(
            slates_of,
            self.bundle,
            users,
            [history_of(*self._indices(history), self.config.retriever.history_min_level) for history in histories],
            k=decoding.slate_size,
            exclude_seen=decoding.exclude_seen,
            recommender=self.recommender,
            fresh=True,
        )
        stored = dict(zip(users, await asyncio.gather(*map(self.reader.put, slates)), strict=True))
        if not all(stored.values()):
            self.log.warning("slates were not stored: another version is active", own=self.bundle.version)
        return [stored[user_id] for user_id in user_ids]

    def _indices(self, history: UserHistory) -> tuple[list[int], list[int]]:
        """Catalogue indices and levels of the events whose items this bundle knows."""
        pairs = [(self.index[item], level) for item, level in zip(history.item_ids, history.levels, strict=True) if item in self.index]
        indices, levels = np.array(pairs, np.int64).reshape(-1, 2).T.tolist()
        return indices, levels
