"""The Ray Serve deployment that answers over HTTP: reads slates, hands early triggers on to the model replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI

from infra.catalogue import Catalogue
from infra.config import Config
from infra.event_stream import AsyncEventWriter
from infra.logs import get_logger
from infra.redis_client import access_of
from infra.slate_store import AsyncSlateReader
from serving.api import create_api
from serving.intake import EventIntake, Overloaded
from serving.retrieval import Retrieval

_MAX_PENDING = 1000  # early triggers under way in one replica; more are refused


class Ingress:
    """Ray Serve's replica of the application: opens the store, reads the catalogue, counts what it answers."""

    def __init__(
        self, config_json: str, bundle_uri: str | None, redis_url: str, version: str, precompute: Any, token_digests: Sequence[str]
    ) -> None:
        from ray.util.metrics import Counter, Histogram

        self.config = Config.from_json(config_json)
        self.token_digests = token_digests
        store = self.config.slate_store
        reader = AsyncSlateReader.of(store, redis_url)
        catalogue = Catalogue(bundle_uri) if bundle_uri else None
        self.retrieval = Retrieval(reader, catalogue, slate_size=self.config.decoding.slate_size, version=version)
        writer = AsyncEventWriter(redis_url, prefix=store.prefix, access=access_of(store, redis_url))
        self.intake = EventIntake(writer, self.retrieval.activity)
        self.precompute = precompute
        self.pending: set[asyncio.Task[None]] = set()
        self.log = get_logger("ingress")
        self.slates_total = Counter("rankgr_slates", description="Slates answered.", tag_keys=("source",))
        self.seconds = Histogram(
            "rankgr_slate_seconds", description="Time to look a slate up.", boundaries=[0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve after the constructor."""
        trigger = self._trigger if self.precompute is not None else None
        return create_api(
            self.retrieval,
            slate_size=self.config.decoding.slate_size,
            intake=self.intake,
            trigger=trigger,
            observe=self._observe,
            token_digests=self.token_digests,
        )

    def _observe(self, source: str, seconds: float) -> None:
        self.slates_total.inc(1, {"source": source})
        self.seconds.observe(seconds)

    async def _trigger(self, user_id: str, _version: str) -> None:
        if len(self.pending) >= _MAX_PENDING:
            raise Overloaded("too many slates are being computed")
        task = asyncio.create_task(self._compute(user_id))
        self.pending.add(task)  # a task that nobody holds may be collected before it ends
        task.add_done_callback(self.pending.discard)

    async def _compute(self, user_id: str) -> None:
        try:
            await self.precompute.compute.remote(user_id)
        except Exception as error:
            # Nobody waits for the result; the user keeps the slate of before.
            self.log.warning("a fresh slate could not be computed", reason=str(error).splitlines()[0])
