"""Timelines to sessions: labels, behaviour that lies before the request and nothing else, padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.reward.data import AGES, collate, epoch_batches, objectives_of, session_labels, sessions_of
from infra.errors import ConfigError, DataError
from infra.records import Phase
from tests.unit.components.reward.small import configuration, learnable, slow_batch, timelines

CONFIG = configuration("reward.thresholds={watch: 30}")
NAMES = ["like", "watch"]
# item, request, phase, like, watch
ALICE = [(4, 0, 0, 1.0, 40.0), (5, 0, 0, 0.0, 30.0), (6, 1, 0, None, 29.0), (7, 2, 1, 0.0, None), (8, 2, 2, 1.0, 0.0)]
BOB = [(1, 0, 2, 0.0, 10.0)]


def all_of(data, **settings):
    return collate(data, np.arange(len(data.starts_S)), **({"max_behaviour": 9} | settings))


def test_an_event_is_labelled_by_its_signals_and_thresholds_and_what_is_missing_stays_unknown():
    data = sessions_of(timelines(ALICE, BOB), CONFIG, NAMES)
    expected = [[1, 1], [0, 1], [np.nan, 0], [0, np.nan], [1, 0], [0, 0]]
    np.testing.assert_array_equal(data.labels_EO, expected)


def test_a_session_is_a_request_cut_where_phases_meet():
    data = sessions_of(timelines(ALICE, BOB), CONFIG, NAMES)
    assert list(zip(data.starts_S, data.ends_S, data.phases_S, strict=True)) == [(0, 2, 0), (2, 3, 0), (3, 4, 1), (4, 5, 2), (5, 6, 2)]
    assert data.of_phase(Phase.TEST).tolist() == [3, 4]
    assert data.events_of(np.array([4, 0, 2])).tolist() == [5, 0, 1, 3]


def test_behaviour_is_what_the_user_did_before_the_request_the_latest_at_the_end():
    batch = all_of(sessions_of(timelines(ALICE, BOB), CONFIG, NAMES))
    past = [row[keep].tolist() for row, keep in zip(batch.past_items_BT, batch.is_past_BT, strict=True)]
    assert past == [[], [4, 5], [4, 5, 6], [4, 5, 6, 7], []]
    assert all_of(sessions_of(timelines(ALICE), CONFIG, NAMES), max_behaviour=2).past_items_BT[3].tolist() == [6, 7]


def test_the_time_until_the_request_is_counted_in_powers_of_two():
    table = timelines([(1, at, 0, 0.0, 0.0) for at in range(9)])
    batch = all_of(sessions_of(table, CONFIG, NAMES))
    assert batch.past_ages_BT[8].tolist() == [3, 3, 2, 2, 2, 2, 1, 1]
    assert batch.past_ages_BT.max() < AGES


def test_changing_what_came_later_or_what_is_to_be_foreseen_changes_nothing_that_the_model_sees():
    before = sessions_of(timelines(ALICE, BOB), CONFIG, NAMES)
    changed = [*ALICE[:3], (7, 2, 1, 1.0, 99.0), (3, 2, 2, 0.0, 77.0)]
    after = sessions_of(timelines(changed, BOB), CONFIG, NAMES)
    session = np.array([2])  # the request that is about to be answered: its items are seen, their labels are not
    one, other = (collate(data, session, max_behaviour=9) for data in (before, after))
    for name in ("items_BN", "is_item_BN", "rates_BNO", "habits_BO", "past_items_BT", "past_labels_BTO", "past_rates_BTO", "is_past_BT"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_the_label_of_a_session_is_one_where_an_item_earned_it_and_unknown_where_nothing_is_known():
    labels = np.array([[[0], [1]], [[0], [np.nan]], [[np.nan], [np.nan]]], np.float32)
    np.testing.assert_array_equal(session_labels(labels), [[1], [0], [np.nan]])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.sampled_from([0.0, 1.0, None])), min_size=1, max_size=7),
        min_size=1,
        max_size=4,
    )
)
def test_sessions_and_batches_equal_those_made_one_event_at_a_time(users):
    table = timelines(
        *(
            [(item, sum(new for _, new, _ in u[: at + 1]), min(at // 3, 2), like, 1.0) for at, (item, _, like) in enumerate(u)]
            for u in users
        )
    )
    config = configuration("reward.max_behaviour=3")
    batch = all_of(sessions_of(table, config, ["like"]), max_behaviour=3)
    slow = slow_batch(table, config, "like")
    assert len(slow) == len(batch.items_BN)
    for row, expected in enumerate(slow):
        keep = batch.is_item_BN[row]
        assert batch.items_BN[row][keep].tolist() == expected["items"]
        np.testing.assert_array_equal(batch.labels_BNO[row][keep][:, 0], np.array(expected["labels"], np.float32))
        assert batch.past_items_BT[row][batch.is_past_BT[row]].tolist() == expected["past"]


@pytest.mark.parametrize("seed", [(0, 1), None])
def test_an_epoch_has_each_session_once(seed):
    data = sessions_of(learnable(users=9), CONFIG, NAMES)
    train = data.of_phase(Phase.TRAIN)
    batches = list(epoch_batches(data, train, size=4, seed=seed))
    assert sorted(np.concatenate(batches).tolist()) == train.tolist()
    assert max(map(len, batches)) == 4


def test_epochs_differ_and_the_same_one_is_drawn_alike():
    data = sessions_of(learnable(users=9), CONFIG, NAMES)
    first, again, second = (
        np.concatenate(list(epoch_batches(data, data.of_phase(Phase.TRAIN), size=4, seed=(0, epoch)))).tolist() for epoch in (0, 0, 1)
    )
    assert first == again != second


def test_objectives_are_the_signals_that_are_asked_for():
    assert objectives_of(configuration()) == ["like", "watch"]
    assert objectives_of(configuration("reward.objectives=[watch]")) == ["watch"]
    assert objectives_of(configuration("data.columns.signals={}")) == []


@pytest.mark.parametrize("setting", ["reward.objectives=[share]", "reward.thresholds={share: 1}"])
def test_an_objective_that_is_no_signal_is_named(setting):
    with pytest.raises(ConfigError, match=r"name share, but data\.columns\.signals has like, watch"):
        configuration(setting)


def test_timelines_made_without_the_signals_are_refused():
    table = timelines(ALICE).drop_columns("signals").append_column("signals", timelines(BOB)["signals"])
    with pytest.raises(DataError, match="do not hold the signals like, watch"):
        sessions_of(table, CONFIG, NAMES)
