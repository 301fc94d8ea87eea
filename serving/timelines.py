"""What users did, event by event: each new one is a target behind what its user did before the request it belongs to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from components.retriever.contract import History
from components.retriever.packing import Row, rows_of_timeline
from components.training.data import target_min_level
from infra.config import Config
from infra.event_stream import Event

Past = Callable[[str], History]
"""What a user did before the stream; empty where that is not known."""
_ARRAYS, _USERS = "timelines.safetensors", "timelines.json"


@dataclass(frozen=True)
class Visit:
    """New events of a user.

    Attributes:
        rows: in which each of them is a target once.
        history: what the user did before the first request among them.
        items: of the new events, catalogue indices.
        levels: of the new events.
    """

    user_id: str
    rows: list[Row]
    history: History
    items: list[int]
    levels: list[int]


@dataclass
class _Timeline:
    """Item, level and ordinal of the request of each event; the id of the last request, to which more events may come."""

    entries: list[tuple[int, int, int]] = field(default_factory=list)
    request_id: str = ""

    def add(self, item: int, level: int, request_id: str) -> int | None:
        """Append an event; returns the ordinal of its request, None where that shows the item at this level already."""
        last = self.entries[-1][2] if self.entries else -1
        ordinal = last if request_id and request_id == self.request_id else last + 1
        self.request_id = request_id
        of_request = takewhile(lambda entry: entry[2] == ordinal, reversed(self.entries))
        twin = next((entry for entry in of_request if entry[0] == item), None)
        if twin is not None:
            if twin[1] >= level:
                return None
            self.entries.remove(twin)  # a request holds an item once, at its highest level, as offline
        self.entries.append((item, level, ordinal))
        return ordinal

    def trim(self, min_level: int, size: int) -> None:
        """Forget what no later target can see."""
        last = self.entries[-1][2]
        history = [entry for entry in self.entries if entry[1] >= min_level and entry[2] != last]
        self.entries = history[-size:] + [entry for entry in self.entries if entry[2] == last][-size:]


class Timelines:
    """Timelines of the users seen last.

    Args:
        index: item id -> catalogue index.
        past: of users that are not among them.
        config: `retriever`, `training.loss`, `split` and `streaming.users` are used.
    """

    def __init__(self, index: Mapping[str, int], past: Past, config: Config) -> None:
        self._index, self._past, self._users, self._size = index, past, config.streaming.users, config.retriever.max_history
        self._min_level, self._lowest = config.retriever.history_min_level, target_min_level(config)
        self._timelines: dict[str, _Timeline] = {}  # the user seen last at the end

    def extend(self, events: Iterable[Event]) -> list[Visit]:
        """Append events, in the order in which they came, and make samples of them.

        An event that its request holds already, at its level or a higher one, gives none.
        """
        of_user: dict[str, list[Event]] = {}
        for event in events:
            of_user.setdefault(event.user_id, []).append(event)
        visits = [self._visit(user_id, new) for user_id, new in of_user.items()]
        for user_id in list(self._timelines)[: max(len(self._timelines) - self._users, 0)]:
            del self._timelines[user_id]
        return [visit for visit in visits if visit.items]

    def _visit(self, user_id: str, events: Sequence[Event]) -> Visit:
        timeline = self._timelines.pop(user_id, None) or self._first(user_id)
        self._timelines[user_id] = timeline
        new = {(self._index[e.item_id], timeline.add(self._index[e.item_id], e.level, e.request_id)) for e in events}
        requests_of_new = [ordinal for _, ordinal in new if ordinal is not None]
        if not requests_of_new:
            return Visit(user_id, [], History(np.empty(0, np.int64), np.empty(0, np.int64)), [], [])
        fresh = len(requests_of_new)
        items, levels, requests = np.array(timeline.entries, np.int64).T
        rows = rows_of_timeline(
            items,
            levels,
            requests,
            history_min_level=self._min_level,
            target_min_level=self._lowest,
            max_history=self._size,
            first_target=len(items) - fresh,
        )
        before = (requests < min(requests_of_new)) & (levels >= self._min_level)
        visit = Visit(user_id, list(rows), History(items[before], levels[before]), items[-fresh:].tolist(), levels[-fresh:].tolist())
        timeline.trim(self._min_level, self._size)
        return visit

    def _first(self, user_id: str) -> _Timeline:
        past = self._past(user_id)
        items, levels = past.items[-self._size :].tolist(), past.levels[-self._size :].tolist()
        return _Timeline([(item, level, ordinal) for ordinal, (item, level) in enumerate(zip(items, levels, strict=True))])

    def save(self, folder: Path) -> None:
        """Write all timelines."""
        entries = [entry for timeline in self._timelines.values() for entry in timeline.entries]
        columns = np.array(entries, np.int32).reshape(-1, 3)
        lengths = np.array([len(timeline.entries) for timeline in self._timelines.values()], np.int32)
        save_file({"entries": columns, "lengths": lengths}, folder / _ARRAYS)
        (folder / _USERS).write_text(json.dumps([[user, timeline.request_id] for user, timeline in self._timelines.items()]))

    def load(self, folder: Path) -> None:
        """Inverse of `save`."""
        arrays = load_file(folder / _ARRAYS)
        users = json.loads((folder / _USERS).read_text())
        ends = np.cumsum(arrays["lengths"])[:-1]
        parts = np.split(arrays["entries"], ends) if users else []
        self._timelines = {
            user: _Timeline([(item, level, ordinal) for item, level, ordinal in part.tolist()], request_id)
            for (user, request_id), part in zip(users, parts, strict=True)
        }
