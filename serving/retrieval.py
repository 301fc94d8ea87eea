"""What the ingress answers with: slates from Redis, popular items where there is none or Redis does not answer.

No model here: a slate is one lookup (RankGR 3.4, near-line serving). The catalogue lies in memory, and with it a
fallback that needs nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from pydantic import BaseModel

from infra.activity import UserActivity
from infra.catalogue import Catalogue
from infra.errors import DataError, RankGRError, ServiceError
from infra.logs import get_logger
from infra.metrics import Meter
from infra.slate_store import AsyncSlateReader, Found, Slate
from serving.slate_json import Answer, SlateWriter, Source

_REST_S = 1.0  # after a failure Redis is left alone for this long, so that a dead one costs one time-out a second, not one a request


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
        fresh_s: how long a slate that was computed on request is called fresh.
        stale_s: age from which a slate is computed anew.
        meter: counts what the store did not answer.

    Attributes:
        revalidate: is told user and version of each slate that is stale or damaged; returns at once.
    """

    def __init__(
        self,
        reader: AsyncSlateReader,
        catalogue: Catalogue | None,
        *,
        slate_size: int,
        version: str = "",
        fresh_s: float = 1800.0,
        stale_s: float = 86400.0,
        meter: Meter | None = None,
    ) -> None:
        self.reader, self.activity = reader, UserActivity(reader)
        self.revalidate: Callable[[str, str], None] | None = None
        self._slate_size, self._fresh_s, self._stale_s = slate_size, fresh_s, stale_s
        self._fallbacks: dict[str, Slate] = {}
        self._rests_until = 0.0
        self._meter, self._log = meter or Meter(), get_logger("retrieval")
        self.take(catalogue, version)

    def take(self, catalogue: Catalogue | None, version: str) -> None:
        """Show items of another bundle from now on."""
        self.catalogue, self._version, self._writer = catalogue, version, SlateWriter(catalogue)
        self._popular = {"": catalogue.popular(self._slate_size, version)} if catalogue else {}

    async def slate(self, user_id: str, k: int, segment: str = "") -> Answer:
        """The best k items for a user.

        Args:
            user_id: as in the logs.
            k: how many.
            segment: of users, or a category of items, whose popular items a user without a slate gets.

        Raises:
            DataError: the user id is not usable.
            ServiceError: the store does not answer and no catalogue was given.
        """
        return (await self.slates([user_id], k, segment))[0]

    async def slates(self, user_ids: Sequence[str], k: int, segment: str = "") -> list[Answer]:
        """The best k items for each user, all of one version; see `slate`."""
        found = await self._look_up(user_ids)
        if found is not None and all(user_id in found.slates for user_id in user_ids):
            return [self._answer(user_id, found.slates[user_id], k) for user_id in user_ids]
        popular = await self._fallback(segment, found)
        return [self._answer_or(popular, user_id, found, k) for user_id in user_ids]

    def _answer_or(self, popular: Slate, user_id: str, found: Found | None, k: int) -> Answer:
        """A user's slate, or popular items."""
        if found is None:
            return self._answer(user_id, popular, k, "fallback")
        if user_id in found.slates:
            return self._answer(user_id, found.slates[user_id], k)
        if user_id not in found.damaged:
            return self._answer(user_id, popular, k, "popular")
        error = found.damaged[user_id]
        self._log.error("a stored slate is damaged, answering from the fallback", reason=error.what, version=found.version)
        if self.revalidate is not None and found.version is not None:
            self.revalidate(user_id, found.version)
        return self._answer(user_id, popular, k, "fallback")

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

    async def _look_up(self, user_ids: Sequence[str]) -> Found | None:
        """What the store has; None where it does not answer."""
        if time.monotonic() < self._rests_until:
            return None
        try:
            return await self.reader.look_up(user_ids)
        except DataError:
            raise
        except RankGRError as error:
            self._rests_until = time.monotonic() + _REST_S
            self._meter.count("rankgr_store_failures")
            self._log.error("answering from the fallback", reason=error.what, where=error.where)
            return None

    async def _fallback(self, segment: str, found: Found | None) -> Slate:
        """Popular items: of the segment if it is a known one, else those published with the version that was found, else those in memory.

        Beside slates of a version they carry its name: an answer is of one version.
        """
        popular = self._of_segment(segment) or await self._published(found.version if found else None)
        popular = popular or self._popular.get("") or next(iter(self._fallbacks.values()), None)
        if popular is None:
            raise ServiceError("there is no slate and no fallback", mend="serve with a bundle, or run `rankgr precompute`")
        return replace(popular, model_version=found.version) if found and found.slates and found.version else popular

    def _of_segment(self, segment: str) -> Slate | None:
        if self.catalogue is None or not self.catalogue.knows(segment):
            return None
        if segment not in self._popular:
            self._popular[segment] = self.catalogue.popular(self._slate_size, self._version, segment)
        return self._popular[segment]

    async def _published(self, version: str | None) -> Slate | None:
        """The popular items that were published with a version; read once."""
        if version is None or version in self._fallbacks:
            return self._fallbacks.get(version or "")
        try:
            published = await self.reader.fallback(version)
        except RankGRError as error:
            self._log.error("answering from memory", reason=error.what, where=error.where)
            return None
        if published is not None:
            self._fallbacks = {version: published}
        return published

    def _answer(self, user_id: str, slate: Slate, k: int, source: Source | None = None) -> Answer:
        age_s = max(time.time() - slate.computed_at / 1000, 0.0)
        if source is None:
            source = "stale" if age_s > self._stale_s else "fresh" if slate.fresh and age_s <= self._fresh_s else "stored"
        if source == "stale" and self.revalidate is not None:
            self.revalidate(user_id, slate.model_version)
        return self._writer.answer(user_id, slate, k, age_s=age_s, source=source)

    def _title(self, item_id: str) -> str:
        item = self.catalogue.get(item_id) if self.catalogue else None
        return item.title if item else ""
