"""The bytes and names of what the slate store keeps: slates, histories and their keys.

A slate is one packed blob: format byte, flag, time, version, float32 scores, item ids as JSON. The user id is left to the key.
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass

import numpy as np
import orjson

from infra.errors import ConfigError, DataError, IntegrityError

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")  # neither a separator nor a character that SCAN's patterns know
_SLATE_FORMAT, _HISTORY_FORMAT = 1, 3
_SLATE_HEAD = struct.Struct("<B?qHI")  # format, fresh, computed_at, bytes of the version, items
_HISTORY_HEAD = struct.Struct("<BIq")  # format, events, until
_MAX_USER_BYTES = 1024
_DAMAGE = (struct.error, TypeError, ValueError)


@dataclass(frozen=True)
class Slate:
    """Ranked items of a user.

    Attributes:
        item_ids: best first.
        scores: one an item, float32 precision in the store.
        model_version: the bundle that computed them.
        computed_at: milliseconds since the epoch, UTC.
        fresh: computed after a request for it, not by the batch job.
    """

    user_id: str
    item_ids: tuple[str, ...]
    scores: tuple[float, ...]
    model_version: str
    computed_at: int
    fresh: bool = False


@dataclass(frozen=True)
class UserHistory:
    """What a user did, in time order: items and the feedback level of each event.

    Attributes:
        until: time of the last event that is included, milliseconds since the epoch; what happened later is no part of it.
    """

    user_id: str
    item_ids: tuple[str, ...]
    levels: tuple[int, ...]
    until: int = 0


def encode_slate(slate: Slate) -> bytes:
    """Pack a slate; the user id is left to the key."""
    version, ids = slate.model_version.encode(), json.dumps(slate.item_ids, ensure_ascii=False, separators=(",", ":")).encode()
    if len(slate.item_ids) != len(slate.scores):
        raise ValueError(f"{len(slate.item_ids)} items but {len(slate.scores)} scores")
    head = _SLATE_HEAD.pack(_SLATE_FORMAT, slate.fresh, slate.computed_at, len(version), len(slate.scores))
    return head + version + np.asarray(slate.scores, "<f4").tobytes() + ids


def decode_slate(user_id: str, blob: bytes) -> Slate:
    """Inverse of `encode_slate`; raises `IntegrityError` on bytes that are not a slate."""
    _require_format(blob, _SLATE_FORMAT)
    try:
        _, fresh, computed_at, version_bytes, count = _SLATE_HEAD.unpack_from(blob)
        scores_at = _SLATE_HEAD.size + version_bytes
        ids_at = scores_at + 4 * count
        scores = np.frombuffer(blob, "<f4", count, scores_at)
        if math.isnan(scores.min(initial=0.0)):  # as soon as one of them is
            raise ValueError("a score is no number")
        ids = _id_list(blob[ids_at:], count)
        return Slate(user_id, ids, tuple(scores.tolist()), blob[_SLATE_HEAD.size : scores_at].decode(), computed_at, fresh)
    except _DAMAGE as error:
        raise _damaged(error) from error


def encode_history(history: UserHistory) -> bytes:
    """Pack a history; the user id is left to the key."""
    if len(history.item_ids) != len(history.levels):
        raise ValueError(f"{len(history.item_ids)} items but {len(history.levels)} levels")
    ids = json.dumps(history.item_ids, ensure_ascii=False, separators=(",", ":")).encode()
    return _HISTORY_HEAD.pack(_HISTORY_FORMAT, len(history.levels), history.until) + bytes(history.levels) + ids


def decode_history(user_id: str, blob: bytes) -> UserHistory:
    """Inverse of `encode_history`; raises `IntegrityError` on bytes that are not a history."""
    _require_format(blob, _HISTORY_FORMAT)
    try:
        _, count, until = _HISTORY_HEAD.unpack_from(blob)
        ids_at = _HISTORY_HEAD.size + count
        return UserHistory(user_id, _id_list(blob[ids_at:], count), tuple(blob[_HISTORY_HEAD.size : ids_at]), until)
    except _DAMAGE as error:
        raise _damaged(error) from error


def _require_format(blob: bytes, expected: int) -> None:
    if blob[:1] != bytes([expected]):
        raise IntegrityError(
            f"a stored blob has format {blob[:1]!r}, not {expected}", mend="run `rankgr precompute` again with this release"
        )


def _damaged(error: Exception) -> IntegrityError:
    return IntegrityError(f"a stored blob is damaged: {error}", mend="run `rankgr precompute` again")


def _id_list(text: bytes, count: int) -> tuple[str, ...]:
    ids = orjson.loads(text)
    if not isinstance(ids, list):
        raise TypeError("what should be a list of ids is none")
    "".join(ids)  # raises TypeError unless all are strings
    if len(ids) != count:
        raise ValueError(f"{len(ids)} ids where {count} were announced")
    return tuple(ids)


class Keys:
    """Names of all keys below a prefix; see `infra.slate_store` for the list.

    Raises:
        ConfigError: a prefix or version with characters that could make one key look like another.
        DataError: a user id that is empty, longer than 1024 bytes or not encodable as UTF-8.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = _name(prefix, "slate_store.prefix")
        self.active, self.versions = f"{prefix}:active", f"{prefix}:versions"
        self.events, self.quarantine = f"{prefix}:events", f"{prefix}:quarantine"
        self.retired, self.seen = f"{prefix}:retired", f"{prefix}:seen"

    def meta(self, version: str) -> str:
        """Marker of a complete version."""
        return f"{self._prefix}:meta:{_name(version, 'model version')}"

    def parts(self, version: str) -> str:
        """Parts of a version that its publisher is done with, until all of them are in."""
        return f"{self._prefix}:parts:{_name(version, 'model version')}"

    def fallback(self, version: str) -> str:
        """Popular items of a version."""
        return f"{self._prefix}:fallback:{_name(version, 'model version')}"

    def slate(self, version: str, user_id: str) -> str:
        """Slate of a user."""
        return f"{self._prefix}:slate:{_name(version, 'model version')}:{_user(user_id)}"

    def slates(self, version: str) -> str:
        """Pattern of all slates of a version."""
        return f"{self._prefix}:slate:{_name(version, 'model version')}:*"

    def history(self, user_id: str) -> str:
        """History of a user."""
        return f"{self._prefix}:history:{_user(user_id)}"

    def recent(self, user_id: str) -> str:
        """Events of a user behind the history."""
        return f"{self._prefix}:recent:{_user(user_id)}"

    def claim(self, version: str, user_id: str) -> str:
        """Says that somebody computes a slate."""
        return f"{self._prefix}:claim:{_name(version, 'model version')}:{_user(user_id)}"


def _name(value: str, what: str) -> str:
    if not _NAME.fullmatch(value):
        raise ConfigError(f"{what} {value!r} is not usable", mend="take letters, digits, '.', '_' and '-', at most 128")
    return value


def _user(user_id: str) -> str:
    try:
        size = len(user_id.encode())
    except UnicodeEncodeError:
        size = 0
    if not 0 < size <= _MAX_USER_BYTES:
        raise DataError("the user id is not usable", where=repr(user_id[:80]), mend=f"take 1 to {_MAX_USER_BYTES} bytes of UTF-8 text")
    return user_id
