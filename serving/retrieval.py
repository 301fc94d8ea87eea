"""What the ingress answers with: slates from Redis, popular items where there is none or Redis does not answer.

No model here: a slate is one lookup (RankGR 3.4, near-line serving). The catalogue lies in memory, and with it a
fallback that needs nobody.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel

from infra.activity import UserActivity
from infra.catalogue import Catalogue
from infra.errors import DataError, RankGRError, ServiceError
from infra.logs import get_logger
from infra.slate_store import AsyncSlateReader, Slate

Source = Literal["slate", "fresh", "fallback"]
_REST_S = 1.0  # after a failure Redis is left alone for this long, so that a dead one costs one time-out a second, not one a request


class RankedItem(BaseModel):
    """An item of a slate."""

    item_id: str
    title: str
    score: float


class SlateAnswer(BaseModel):
    """A slate as it is sent, and where it comes from.

    `slate`: computed by the batch job; `fresh`: computed after a request for it; `fallback`: popular items, because
    the user is unknown or the store does not answer.
    """

    user_id: str
    items: list[RankedItem]
    model_version: str
    computed_at: int
    age_s: float
    source: Source


class HistoryEvent(BaseModel):
    """An event of a user's history."""

    item_id: str
    title: str
    level: int


class HistoryAnswer(BaseModel):
    """What a user did, in time order."""

    user_id: str
    events: list[HistoryEvent]


class ItemAnswer(BaseModel):
    """An item of the catalogue."""

    item_id: str
    title: str
    category: str
    brand: str
    popularity: int


class Retrieval:
    """Looks slates up and never fails where a fallback helps.

    Args:
        reader: the slate store.
        catalogue: items of the served bundle; None: no titles, and the fallback of the store is the only one.
        slate_size: items of the fallback.
        version: the served bundle's version, shown with the fallback of the catalogue.
    """

    def __init__(self, reader: AsyncSlateReader, catalogue: Catalogue | None, *, slate_size: int, version: str = "") -> None:
        self.reader, self.catalogue, self.activity = reader, catalogue, UserActivity(reader)
        self._popular = catalogue.popular(slate_size, version) if catalogue else None
        self._fallbacks: dict[str, Slate] = {}
        self._rests_until = 0.0
        self._log = get_logger("retrieval")

    async def slate(self, user_id: str, k: int) -> SlateAnswer:
        """The best k items for a user.

        Raises:
            DataError: the user id is not usable.
            ServiceError: the store does not answer and no catalogue was given.
        """
        return (await self.slates([user_id], k))[0]

    async def slates(self, user_ids: Sequence[str], k: int) -> list[SlateAnswer]:
        """The best k items for each user, all of one version; see `slate`."""
        slates = dict(await self._look_up(user_ids))
        unknown = {user_id for user_id in user_ids if user_id not in slates}
        if unknown:
            slates |= dict.fromkeys(unknown, await self._fallback())
        return [self._answer(user_id, slates[user_id], k, known=user_id not in unknown) for user_id in user_ids]

    async def history(self, user_id: str) -> HistoryAnswer:
        """What a user did; empty where nothing is known.

        Raises:
            DataError: the user id is not usable.
            ServiceError: the store does not answer.
        """
        history = await self.activity.history(user_id)
        pairs = zip(history.item_ids, history.levels, strict=True)
        return HistoryAnswer(
            user_id=user_id, events=[HistoryEvent(item_id=item, title=self._title(item), level=level) for item, level in pairs]
        )

    def item(self, item_id: str) -> ItemAnswer | None:
        """An item of the catalogue."""
        item = self.catalogue.get(item_id) if self.catalogue else None
        return None if item is None else ItemAnswer(**item._asdict())

    async def ready(self) -> str:
        """The active version.

        Raises:
            ServiceError: the store does not answer, or no version is active.
        """
        version = await self.reader.active_version()
        if version is None:
            raise ServiceError("no slates are active", mend="run `rankgr precompute`")
        return version

    async def _look_up(self, user_ids: Sequence[str]) -> Mapping[str, Slate]:
        if time.monotonic() < self._rests_until:
            return {}
        try:
            return await self.reader.get_many(user_ids)
        except DataError:
            raise
        except RankGRError as error:
            self._rests_until = time.monotonic() + _REST_S
            self._log.error("answering from the fallback", reason=error.what, where=error.where)
            return {}

    async def _fallback(self) -> Slate:
        """Popular items: those published with the active version, else those of the catalogue in memory."""
        if time.monotonic() >= self._rests_until:
            try:
                version = await self.reader.active_version()
                if version and version not in self._fallbacks and (slate := await self.reader.fallback(version)):
                    self._fallbacks = {version: slate}
                if version in self._fallbacks:
                    return self._fallbacks[version]
            except RankGRError as error:
                self._log.error("answering from memory", reason=error.what, where=error.where)
        if self._popular is None:
            raise ServiceError("there is no slate and no fallback", mend="serve with a bundle, or run `rankgr precompute`")
        return self._popular

    def _answer(self, user_id: str, slate: Slate, k: int, *, known: bool) -> SlateAnswer:
        ranked = zip(slate.item_ids[:k], slate.scores, strict=False)
        return SlateAnswer(
            user_id=user_id,
            items=[RankedItem(item_id=item, title=self._title(item), score=score) for item, score in ranked],
            model_version=slate.model_version,
            computed_at=slate.computed_at,
            age_s=round(max(time.time() - slate.computed_at / 1000, 0.0), 3),
            source=("fresh" if slate.fresh else "slate") if known else "fallback",
        )

    def _title(self, item_id: str) -> str:
        item = self.catalogue.get(item_id) if self.catalogue else None
        return item.title if item else ""
