from collections.abc import Callable, Sequence

import pyarrow as pa
import pytest

from infra.records import TIMELINES

Event = tuple[int, int, int]  # item, level, phase
Table = Callable[[dict[str, Sequence[Event]]], pa.Table]

DAY_MS = 86_400_000


@pytest.fixture
def timelines() -> Table:
    """Builds a timelines table from user -> (item, level, phase); the events of a user are a day apart."""

    def build(users: dict[str, Sequence[Event]]) -> pa.Table:
        rows = [
            {
                "user_id": user,
                "items": [item for item, _, _ in events],
                "levels": [level for _, level, _ in events],
                "timestamps": [place * DAY_MS for place in range(len(events))],
                "requests": list(range(len(events))),
                "phases": [phase for _, _, phase in events],
            }
            for user, events in users.items()
        ]
        return pa.Table.from_pylist(rows, schema=TIMELINES)

    return build
