"""Model replicas that compute a fresh slate when a user is about to ask for one: the early trigger (RankGR 3.4).

A replica holds one bundle, and two while one replaces the other. Each request names the version it wants, so that no
slate is ever stored under a version other than that of the weights which computed it.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from ray import serve

from components.precompute.job import Loader, history_of, slates_of
from infra.activity import UserActivity
from infra.config import Config
from infra.errors import IntegrityError
from infra.logs import get_logger
from infra.metrics import MODEL, Meter
from infra.slate_store import AsyncSlateReader, UserHistory
from serving.flights import Outcome, SlateRequest
from serving.stats import Report, replica_name

_NICEST = 19


@dataclass(frozen=True)
class Loaded:
    """A bundle ready to rank: where it came from, its recommender, the index of each item id."""

    uri: str
    bundle: Any
    recommender: Any
    index: Mapping[str, int]


class Precompute:
    """One replica: bundles in memory and a connection to the slate store.

    Args:
        config_json: `Config.to_json`.
        redis_url: where histories come from and slates go.
        loader: how a bundle is loaded.
        to_ray: report metrics to Ray.
    """

    def __init__(self, config_json: str, redis_url: str, loader: Loader, *, to_ray: bool = True) -> None:
        self.config, self.loader = Config.from_json(config_json), loader
        self.models: Mapping[str, Loaded] = {}
        self.reader = AsyncSlateReader.of(self.config.slate_store, redis_url)
        self.activity, self.meter = UserActivity(self.reader), Meter(MODEL, to_ray=to_ray)
        self.log = get_logger("precompute")
        self._behind = ThreadPoolExecutor(1, "behind", initializer=give_way)  # for what nobody waits for
        batching: Any = self.compute
        batching.set_max_batch_size(self.config.decoding.users_per_batch)
        batching.set_batch_wait_timeout_s(self.config.serving.batch_wait_ms / 1000)

    async def reconfigure(self, wanted: Mapping[str, str]) -> None:
        """Hold exactly these bundles; called by Serve at the start and, without a restart, whenever they change.

        New ones are loaded aside while requests go on, then one reference is replaced. A batch under way ends with the
        model that it began with. Where one is damaged, it is refused and all that were there stay.

        Args:
            wanted: version (empty: whatever it is) of the bundle at each URI.

        Raises:
            Exception: nothing was there, and a bundle cannot be loaded.
        """
        held = {model.uri: model for model in self.models.values()}
        start = time.monotonic()
        try:
            models = [held[uri] if uri in held else await self._loaded(uri, version) for uri, version in wanted.items()]
        except Exception as error:
            self.meter.count("rankgr_swaps", outcome="refused")
            if not self.models:
                raise
            self.log.exception("a bundle was refused, the old one keeps serving", reason=(str(error).splitlines() or [repr(error)])[0])
            return
        before, self.models = self.models, {model.bundle.version: model for model in models}
        for version in before.keys() | self.models.keys():
            self.meter.set("rankgr_model_loaded", version in self.models, version=version)
        if any(uri not in held for uri in wanted):
            self.meter.count("rankgr_swaps", outcome="done")
            self.meter.observe("rankgr_swap_seconds", time.monotonic() - start)

    async def _loaded(self, uri: str, version: str) -> Loaded:
        """A bundle, in no haste where others serve meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._behind if self.models else None, self._load, uri, version)

    def _load(self, uri: str, version: str) -> Loaded:
        bundle = self.loader(uri)
        if version and bundle.version != version:
            raise IntegrityError(f"the bundle has version {bundle.version}, not {version}", where=uri, mend="release the model again")
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(1)  # replicas share the cores; more of them come by autoscaling
        return Loaded(uri, bundle, bundle.recommender(), {item_id: index for index, item_id in enumerate(bundle.item_ids)})

    async def report(self) -> Report:
        """What this replica has counted."""
        return Report(replica_name(), self.meter.families())

    @serve.batch  # type: ignore[untyped-decorator]
    async def compute(self, requests: list[SlateRequest]) -> list[Outcome]:
        """Called with one request at a time, batched by Serve."""
        return await self.answer(requests)

    async def refresh(self, requests: Sequence[SlateRequest]) -> list[Outcome]:
        """Slates that nobody waits for: as `compute`, some at once, behind everything else."""
        return await self.answer(requests)

    async def answer(self, requests: Sequence[SlateRequest]) -> list[Outcome]:
        """Compute and store slates; returns for each request what became of it."""
        models, now = self.models, time.time()
        outcomes: dict[tuple[str, str], Outcome] = {}
        for version in {request.version for request in requests}:
            asked = [request for request in requests if request.version == version]
            in_time = dict.fromkeys(request.user_id for request in asked if request.deadline > now)
            outcomes |= {(request.user_id, version): "late" for request in asked}
            if version not in models:
                outcomes |= {(user_id, version): "unknown version" for user_id in in_time}
            elif in_time:
                on_request = {request.user_id for request in asked if request.fresh}
                stored = await self._slates(models[version], list(in_time), on_request)
                outcomes |= {(u, version): "stored" if done else "dropped version" for u, done in zip(in_time, stored, strict=True)}
        if request_ids := list(dict.fromkeys(request.request_id for request in requests if request.request_id)):  # none: a refresh
            counts = Counter(outcomes.values())
            self.log.info("slates computed", request_ids=request_ids, seconds=round(time.time() - now, 3), outcomes=dict(counts))
        return [outcomes[request.user_id, request.version] for request in requests]

    async def _slates(self, model: Loaded, users: Sequence[str], on_request: Collection[str]) -> list[bool]:
        """Compute and store the slates of some users, of which some were asked for; returns for each whether it was stored."""
        histories = await self.activity.histories(users)
        decoding, start = self.config.decoding, time.monotonic()
        work = partial(
            slates_of,
            model.bundle,
            users,
            [history_of(*_indices(history, model.index), self.config.retriever.history_min_level) for history in histories],
            k=decoding.slate_size,
            exclude_seen=decoding.exclude_seen,
            recommender=model.recommender,
            fresh=on_request,
        )
        pool = None if on_request else self._behind
        slates = await asyncio.get_running_loop().run_in_executor(pool, contextvars.copy_context().run, work)
        self.meter.observe("rankgr_batch_users", len(users))
        self.meter.observe("rankgr_batch_seconds", time.monotonic() - start)
        return await self.reader.put(slates)


def give_way() -> None:
    """Have this thread yield to others of the machine, on Linux, where threads have a niceness of their own.

    After a swap the slates of all users are computed anew, and readers on the same processors come first. Not SCHED_IDLE: a thread
    that waits for an idle machine, Python's lock in its hands, would hold up its whole replica.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICEST)


def _indices(history: UserHistory, index: Mapping[str, int]) -> tuple[list[int], list[int]]:
    """Catalogue indices and levels of the events whose items a bundle knows."""
    pairs = [(index[item], level) for item, level in zip(history.item_ids, history.levels, strict=True) if item in index]
    indices, levels = np.array(pairs, np.int64).reshape(-1, 2).T.tolist()
    return indices, levels
