"""The real service as simulated users meet it: HTTP on one side, the streaming trainer and the sync loop on the other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from infra.errors import ServiceError
from infra.event_stream import Event
from serving.models import MAX_EVENTS
from serving.simulation.loop import Shown
from serving.sync import Sync
from serving.trainer import StreamTrainer

_CALLERS = 8
_LOOK_AGAIN_S = 0.03
_LOST_S = 60.0  # entries of the stream that are not there after so long never come


class LivePlatform:
    """One running service.

    Args:
        client: of the service.
        slate_size: items of a slate.
        patience_s: how long a user waits for a fresh slate before taking what is there.
        trainer: learns from the stream; None: the model is frozen.
        sync: takes over what the trainer releases.
    """

    def __init__(
        self, client: httpx.Client, *, slate_size: int, patience_s: float, trainer: StreamTrainer | None = None, sync: Sync | None = None
    ) -> None:
        self._client, self._slate_size, self._patience_s = client, slate_size, patience_s
        self._trainer, self._sync = trainer, sync
        self._told = 0

    def slates(self, user_ids: Sequence[str]) -> list[Shown]:
        """Tell the service that users are about to come, then ask for their slates until they are fresh."""
        asked_ms, deadline = time.time_ns() // 1_000_000, time.monotonic() + self._patience_s
        with ThreadPoolExecutor(_CALLERS) as callers:
            list(callers.map(lambda user_id: self._post("/v1/requests", {"user_id": user_id}), user_ids))
        while True:
            answers = self._post("/v1/slates:batch", {"user_ids": list(user_ids), "k": self._slate_size})["slates"]
            if all(one["computed_at"] >= asked_ms for one in answers) or time.monotonic() > deadline:
                return [
                    Shown(one["user_id"], tuple(item["item_id"] for item in one["items"]), one["model_version"], one["source"])
                    for one in answers
                ]
            time.sleep(_LOOK_AGAIN_S)

    def take(self, events: Sequence[Event]) -> None:
        """Tell the service what users did."""
        fields = ("event_id", "user_id", "item_id", "level", "timestamp_ms", "request_id")
        told = [{name: getattr(event, name) for name in fields} for event in events]
        for start in range(0, len(told), MAX_EVENTS):
            self._post("/v1/events", {"events": told[start : start + MAX_EVENTS]})
        self._told += len(events)

    def end_hour(self) -> None:
        """Train on the hour's events, have what passes the gate released, and bring the service in step with the registry."""
        told, self._told = self._told, 0
        if self._trainer is not None and told:
            self._trainer.run(max_events=told, until_idle=_LOST_S)
        if self._sync is not None:
            self._sync.once()

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = self._client.post(path, json=body)
            answer.raise_for_status()
        except httpx.HTTPError as error:
            raise ServiceError(f"the service does not answer: {error}", where=path, mend="see the service's log above") from error
        found: dict[str, Any] = answer.json()
        return found
