"""New events become targets behind what their user did before the request, each exactly once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from components.retriever.contract import History
from infra.config import Config
from infra.event_stream import Event
from serving.timelines import Timelines, Visit
from tests.unit.components.training.small import N_ITEMS, configuration

INDEX = {f"i{i}": i for i in range(N_ITEMS)}


def event(user: str, item: int, level: int = 3, request: str = "") -> Event:
    return Event(f"{user}-{item}-{level}-{request}", user, f"i{item}", level, 0, request)


def past(user_id: str) -> History:
    known = {"ann": ([1, 2], [3, 1])}
    items, levels = known.get(user_id, ([], []))
    return History(np.array(items, np.int64), np.array(levels, np.int64))


def timelines(*overrides: str) -> Timelines:
    return Timelines(INDEX, past, configuration(*overrides))


def targets(visit: Visit) -> list[tuple[int, int, list[int]]]:
    """Item, level and the history that the target sees."""
    return [
        (int(item), int(level), row.items[:prefix].tolist())
        for row in visit.rows
        for item, level, prefix in zip(row.target_items, row.target_levels, row.target_prefix, strict=True)
    ]


def test_items_of_a_request_see_what_lies_before_it_and_not_each_other() -> None:
    ann, bob = timelines().extend(
        [event("ann", 5, 3, "r1"), event("bob", 7), event("ann", 6, 1, "r1"), event("ann", 8, 4, "r2"), event("bob", 8)]
    )
    assert targets(ann) == [(5, 3, [1, 2]), (6, 1, [1, 2]), (8, 4, [1, 2, 5, 6])]
    assert [row.target_request.tolist() for row in ann.rows] == [[2, 2, 3]]
    assert targets(bob) == [(7, 3, []), (8, 3, [7])]  # without a request id, each is a request of its own
    assert (ann.history.items.tolist(), ann.items, ann.levels) == ([1, 2], [5, 6, 8], [3, 1, 4])
    assert bob.history.items.tolist() == []


def test_a_request_goes_on_in_the_next_step_and_holds_an_item_once_at_its_highest_level() -> None:
    ours = timelines()
    ours.extend([event("ann", 5, 1, "r1"), event("ann", 6, 1, "r1")])
    (visit,) = ours.extend([event("ann", 5, 4, "r1"), event("ann", 6, 1, "r1"), event("ann", 7, 1, "r1")])
    assert targets(visit) == [(5, 4, [1, 2]), (7, 1, [1, 2])]  # 6 was shown before at this level
    assert visit.history.items.tolist() == [1, 2]
    assert ours.extend([event("ann", 5, 4, "r1")]) == []
    (later,) = ours.extend([event("ann", 9, 3, "r2")])
    assert targets(later) == [(9, 3, [1, 2, 6, 5, 7])]


def test_what_no_later_target_can_see_is_forgotten() -> None:
    ours = timelines("retriever.history_min_level=2", "retriever.max_history=3")
    ours.extend([event("ann", item, 1 + item % 2, f"r{item}") for item in range(3, 11)])
    (visit,) = ours.extend([event("ann", 0, 2, "now")])
    assert targets(visit) == [(0, 2, [5, 7, 9])]
    assert visit.history.items.tolist() == [5, 7, 9]


def test_the_users_seen_last_are_kept_and_others_begin_with_their_past_again() -> None:
    ours = timelines("streaming.users=2")
    ours.extend([event("ann", 5), event("bob", 6), event("eve", 7)])
    ann, bob = ours.extend([event("ann", 8), event("bob", 9)])
    assert targets(ann) == [(8, 3, [1, 2])]
    assert targets(bob) == [(9, 3, [6])]


events = st.lists(
    st.builds(event, st.sampled_from(["ann", "bob", "eve"]), st.integers(0, 11), st.integers(1, 4), st.sampled_from(["", "r1", "r2"])),
    max_size=30,
)


@given(events, st.integers(0, 30))
def test_restored_timelines_go_on_as_the_saved_ones_and_each_target_comes_once(tmp_path_factory, came: list[Event], cut: int) -> None:
    config: Config = configuration("streaming.users=2", "retriever.max_history=5")
    folder: Path = tmp_path_factory.mktemp("timelines")
    saved, restored = Timelines(INDEX, past, config), Timelines(INDEX, past, config)
    first = saved.extend(came[:cut])
    saved.save(folder)
    restored.load(folder)
    mine, theirs = saved.extend(came[cut:]), restored.extend(came[cut:])
    assert [targets(visit) for visit in mine] == [targets(visit) for visit in theirs]
    for visit in (*first, *mine):
        found = [(item, level) for item, level, _ in targets(visit)]
        assert sorted(found) == sorted(zip(visit.items, visit.levels, strict=True))
        assert all(len(seen) <= 5 for _, _, seen in targets(visit))
