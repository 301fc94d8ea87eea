"""Slates as JSON, item by item from parts that are written once: most of what an answer costs, so no framework does it."""

from __future__ import annotations

from typing import Literal, NamedTuple

import orjson
from pydantic import BaseModel

from infra.catalogue import Catalogue
from infra.slate_store import Slate

Source = Literal["fresh", "stored", "stale", "popular", "fallback"]


class RankedItem(BaseModel):
    """An item of a slate."""

    item_id: str
    title: str
    score: float


class SlateAnswer(BaseModel):
    """A slate as it is sent, and where it comes from.

    `fresh`: computed after a request for it, lately; `stored`: computed before; `stale`: so long ago that it is being computed
    anew; `popular`: there is none for this user; `fallback`: popular items too, because the store does not answer, or what it
    keeps for this user is damaged.
    """

    user_id: str
    items: list[RankedItem]
    model_version: str
    computed_at: int
    age_s: float
    source: Source


class Answer(NamedTuple):
    """A `SlateAnswer` ready to be sent, and what is counted of it."""

    body: bytes
    model_version: str
    age_s: float
    source: Source


class SlateWriter:
    """Writes answers with the titles of a catalogue.

    Args:
        catalogue: None: no titles.
    """

    def __init__(self, catalogue: Catalogue | None) -> None:
        self._parts = _ItemParts(catalogue)

    def answer(self, user_id: str, slate: Slate, k: int, *, age_s: float, source: Source) -> Answer:
        """The best k items as a `SlateAnswer`."""
        ids, age_s = slate.item_ids[:k], round(age_s, 3)
        parts = [b""] * (2 * len(ids) + 1)
        if ids:
            parts[:-1:2] = map(self._parts.__getitem__, ids)
            parts[1::2] = orjson.dumps(slate.scores[:k])[1:-1].split(b",")
        # Joined once: parts are copied, and are most of what there is to do.
        parts[0] = b'{"user_id":%b,"items":[%b' % (orjson.dumps(user_id), parts[0][_END:])
        parts[-1] += b'%b],"model_version":%b,"computed_at":%d,"age_s":%b,"source":"%b"}' % (
            b"}" if ids else b"",
            orjson.dumps(slate.model_version),
            slate.computed_at,
            orjson.dumps(age_s),
            source.encode(),
        )
        return Answer(b"".join(parts), slate.model_version, age_s, source)


_END = len(b"},")


class _ItemParts(dict[str, bytes]):
    """What stands before an item's score, written when it is first needed, with the end of the item before it."""

    def __init__(self, catalogue: Catalogue | None) -> None:
        self._catalogue = catalogue

    def __missing__(self, item_id: str) -> bytes:
        item = self._catalogue.get(item_id) if self._catalogue else None
        part = b'},{"item_id":%b,"title":%b,"score":' % (orjson.dumps(item_id), orjson.dumps(item.title if item else ""))
        self[item_id] = part
        return part
