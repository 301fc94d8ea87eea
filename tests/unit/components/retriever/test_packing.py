import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.retriever.packing import Row, collate, drop_history, position_ids, rows_of_timeline, target_mask
from tests.unit.components.retriever.slow import row


def as_text(mask: torch.Tensor) -> list[str]:
    return ["".join("x" if allowed else "." for allowed in line) for line in mask]


def test_a_target_sees_bos_the_history_before_its_request_and_itself():
    batch = collate([row([7, 8], [3, 3], [(1, 3, 1, 0), (2, 3, 2, 1)])])
    # [BOS], 7, 8, first codeword of each target
    assert as_text(target_mask(batch, n_levels=2, width=1)[0]) == [
        "xx.x.",
        "xxx.x",
    ]
    assert position_ids(batch, n_levels=2, width=1).tolist() == [[0, 1, 2, 2, 3]]


def test_with_one_token_a_codeword_a_target_sees_whole_items_and_its_own_codewords_causally():
    batch = collate([row([7], [3], [(1, 3, 0, 0), (2, 3, 1, 1)])])
    # [BOS], three codewords of 7, two codewords of each target
    assert as_text(target_mask(batch, n_levels=3, width=3)[0]) == [
        "x...x...",
        "x...xx..",
        "xxxx..x.",
        "xxxx..xx",
    ]
    assert position_ids(batch, n_levels=3, width=3).tolist() == [[0, 1, 2, 3, 1, 2, 4, 5]]


def test_a_single_level_has_no_target_tokens():
    batch = collate([row([7], [3], [(1, 3, 0, 0), (2, 3, 1, 1)])])
    assert target_mask(batch, n_levels=1, width=1).shape == (1, 0, 2)
    assert position_ids(batch, n_levels=1, width=1).tolist() == [[0, 1]]


def test_targets_do_not_see_padding():
    batch = collate([row([7, 8, 9], [3, 3, 3], [(1, 3, 3, 0), (2, 3, 3, 0)]), row([5], [3], [(1, 3, 1, 0)])])
    # [BOS], 5, two padded items, the target, a padded target
    assert as_text(target_mask(batch, n_levels=2, width=1)[1]) == ["xx..x.", "x....x"]


def test_collate_pads_to_the_longest_row():
    batch = collate([row([7, 8], [3, 2], [(1, 4, 2, 5)]), row([], [], [(2, 1, 0, 0), (3, 3, 0, 1)])])
    assert batch.items_BH.tolist() == [[7, 8], [0, 0]]
    assert batch.levels_BH.tolist() == [[3, 2], [0, 0]]
    assert batch.history_B.tolist() == [2, 0]
    assert batch.target_items_BP.tolist() == [[1, 0], [2, 3]]
    assert batch.target_levels_BP.tolist() == [[4, 0], [1, 3]]
    assert batch.target_prefix_BP.tolist() == [[2, 0], [0, 0]]
    assert batch.target_request_BP.tolist() == [[5, 0], [0, 1]]
    assert batch.target_valid_BP.tolist() == [[True, False], [True, True]]


def test_rows_of_a_long_timeline_start_half_a_row_later():
    events = np.arange(7)
    rows = list(rows_of_timeline(events, np.full(7, 3), events, history_min_level=1, target_min_level=1, max_history=4))
    assert [r.items.tolist() for r in rows] == [[0, 1, 2, 3], [2, 3, 4, 5]]
    assert [r.target_items.tolist() for r in rows] == [[0, 1, 2, 3, 4], [5, 6]]
    assert [r.target_prefix.tolist() for r in rows] == [[0, 1, 2, 3, 4], [3, 4]]


def test_events_of_one_request_do_not_see_each_other():
    rows = list(
        rows_of_timeline(
            np.arange(4), np.full(4, 3), np.array([0, 0, 1, 1]), history_min_level=1, target_min_level=1, max_history=4
        )
    )  # fmt: skip
    assert [r.target_prefix.tolist() for r in rows] == [[0, 0, 2, 2]]


@st.composite
def timelines(draw):
    """Items are numbered, so that each event is known by its item."""
    events = draw(st.lists(st.tuples(st.booleans(), st.integers(1, 4)), max_size=30))
    requests = np.cumsum([new for new, _ in events]).astype(np.int64)
    return np.arange(len(events)), np.array([level for _, level in events], dtype=np.int64), requests


@given(timelines(), st.integers(1, 4), st.integers(1, 4), st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_each_event_is_a_target_once_behind_the_history_of_earlier_requests(timeline, history_min, target_min, max_history):
    items, levels, requests = timeline
    rows = list(
        rows_of_timeline(
            items, levels, requests, history_min_level=history_min, target_min_level=target_min, max_history=max_history
        )
    )  # fmt: skip
    targets = [item for r in rows for item in r.target_items.tolist()]
    assert sorted(targets) == items[levels >= target_min].tolist()
    for r in rows:
        assert len(r.target_items) > 0
        assert len(r.items) <= max_history
        assert (levels[r.items] == r.levels).all()
        for item, level, prefix, request in zip(r.target_items, r.target_levels, r.target_prefix, r.target_request, strict=True):
            assert (level, request) == (levels[item], requests[item])
            before = items[(requests < request) & (levels >= history_min)]
            seen = r.items[:prefix]
            assert seen.tolist() == before[len(before) - prefix :].tolist()
            assert prefix == len(before) or 2 * prefix >= max_history
            assert prefix == len(before) or len(before) > max_history


@given(st.integers(0, 12), st.floats(0, 0.99), st.integers(0, 99))
def test_dropped_history_leaves_every_target_behind_what_is_left_of_its_past(count, share, seed):
    numbers = np.arange(count)
    row = Row(numbers, numbers % 4, 100 + numbers, numbers, numbers, numbers)
    found = drop_history(row, share, np.random.default_rng(seed))
    assert set(found.items.tolist()) <= set(numbers.tolist())
    assert (found.levels == found.items % 4).all()
    assert found.target_items.tolist() == row.target_items.tolist()
    for prefix, item in zip(found.target_prefix, numbers, strict=True):
        assert found.items[:prefix].tolist() == [i for i in found.items.tolist() if i < item]


def test_on_average_half_the_share_of_a_history_is_dropped():
    row = Row(*[np.arange(1000)] * 6)
    rng = np.random.default_rng(0)
    kept = [len(drop_history(row, 0.6, rng).items) for _ in range(200)]
    assert np.mean(kept) == pytest.approx(700, abs=30)
    assert min(kept) >= 350
