"""The Ray Serve deployment that answers over HTTP: reads slates, hands early triggers on to the model replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from fastapi import FastAPI
from ray.exceptions import RayActorError

from infra.catalogue import Catalogue
from infra.config import Config
from infra.errors import RankGRError
from infra.event_stream import AsyncEventWriter
from infra.logs import get_logger
from infra.metrics import INGRESS, Meter
from infra.redis_client import access_of
from infra.slate_store import AsyncSlateReader
from serving.api import create_api
from serving.flights import FreshSlates, Outcome, SlateRequest
from serving.intake import EventIntake
from serving.retrieval import Retrieval
from serving.stats import Report, Reports, Stats, ask_all, replica_name

_ATTEMPTS = 3


class Ingress:
    """One replica: connections to the store, the catalogue, counts of what it answers.

    Args:
        config_json: `Config.to_json`.
        redis_url: the slate store.
        precompute: handle of the model replicas; None: there are none.
        token_digests: see `serving.api.create_api`.
        bundle_uri: whose items are shown until `show` names another; empty: none.
        version: of it.
    """

    def __init__(
        self, config_json: str, redis_url: str, precompute: Any, token_digests: Sequence[str], bundle_uri: str = "", version: str = ""
    ) -> None:
        self.config, self.precompute, self.token_digests = Config.from_json(config_json), precompute, token_digests
        settings, store, meter = self.config.serving, self.config.slate_store, Meter(INGRESS, to_ray=True)
        reader = AsyncSlateReader.of(store, redis_url)
        self.log = get_logger("ingress")
        self.retrieval = Retrieval(
            reader,
            None,
            slate_size=self.config.decoding.slate_size,
            fresh_s=settings.fresh_minutes * 60,
            stale_s=settings.stale_hours * 3600,
            meter=meter,
        )
        writer = AsyncEventWriter(
            redis_url, prefix=store.prefix, max_length=self.config.streaming.max_length, access=access_of(store, redis_url)
        )
        self.intake = EventIntake(writer, self.retrieval.activity)
        self.stats, self.shown = Stats(meter, replica_name()), ""
        self.peers: Any = None
        self.fresh = FreshSlates(
            self._ask, self.retrieval.activity, max_pending=settings.max_pending, deadline_s=settings.deadline_s, meter=meter
        )
        if precompute is not None:
            self.retrieval.revalidate = self.fresh.revalidate
        if bundle_uri:
            self._take(self._read(bundle_uri), bundle_uri, version)

    async def show(self, bundle_uri: str, version: str) -> None:
        """Show the items of a bundle from now on; called at a swap, and now and then for replicas that came later.

        One that cannot be read is refused, and the old one stays.
        """
        if bundle_uri != self.shown:
            self._take(await asyncio.to_thread(self._read, bundle_uri), bundle_uri, version)

    def _read(self, bundle_uri: str) -> Catalogue | None:
        try:
            return Catalogue(bundle_uri)
        except RankGRError as error:
            self.log.warning("a catalogue was refused, what was shown before stays", reason=error.what, where=error.where)
            return None

    def _take(self, catalogue: Catalogue | None, bundle_uri: str, version: str) -> None:
        if catalogue is not None:
            self.retrieval.take(catalogue, version)
            self.shown = bundle_uri

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve after the constructor."""
        return create_api(
            self.retrieval,
            slate_size=self.config.decoding.slate_size,
            intake=self.intake,
            trigger=self.fresh if self.precompute is not None else None,
            reports=Reports(self.stats, self._reports),
            token_digests=self.token_digests,
            echo_request_id=False,
        )

    async def report(self) -> Report:
        """What this replica has counted."""
        return self.stats.report()

    async def _reports(self) -> list[Report]:
        from ray import serve
        from ray.serve.handle import DeploymentHandle

        if self.peers is None:  # made without asking Serve's controller, which may be away
            here = serve.get_replica_context()
            self.peers = DeploymentHandle(here.deployment, here.app_name)
        handles = [self.peers] if self.precompute is None else [self.peers, self.precompute]
        return [report for reports in await asyncio.gather(*map(ask_all, handles)) for report in reports]

    async def _ask(self, request: SlateRequest) -> Outcome:
        for _ in range(_ATTEMPTS - 1):
            with suppress(RayActorError):  # the replica died; a slate that is computed twice is the same
                outcome: Outcome = await self.precompute.compute.remote(request)
                return outcome
        outcome = await self.precompute.compute.remote(request)
        return outcome
