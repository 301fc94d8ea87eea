import pyarrow as pa
import pytest

from components.evaluation.protocol import build_cases, train_events
from infra.records import Level, Phase

TRAIN, VALID, TEST = Phase.TRAIN, Phase.VALID, Phase.TEST
EXPOSURE, CLICK = Level.EXPOSURE, Level.CLICK
TRUTHS = {"click": CLICK, "pv": EXPOSURE}


@pytest.fixture
def one_user(timelines):
    events = [(5, CLICK, TRAIN), (6, EXPOSURE, TRAIN), (7, CLICK, VALID), (8, CLICK, TEST), (5, CLICK, TEST), (9, EXPOSURE, TEST)]
    return timelines({"anna": events})


def test_the_test_history_is_everything_before_and_truths_are_cut_by_level(one_user):
    cases = build_cases(one_user, TEST, TRUTHS, exclude_seen=False)
    assert cases.histories[0].items.tolist() == [5, 6, 7]
    assert cases.histories[0].levels.tolist() == [CLICK, EXPOSURE, CLICK]
    assert cases.truths["click"][0].tolist() == [5, 8]
    assert cases.truths["pv"][0].tolist() == [5, 8, 9]


def test_the_validation_history_ends_where_training_ends(one_user):
    cases = build_cases(one_user, VALID, TRUTHS, exclude_seen=False)
    assert cases.histories[0].items.tolist() == [5, 6]
    assert cases.truths["click"][0].tolist() == [7]


def test_truths_that_no_method_could_return_are_dropped_when_seen_items_are_excluded(one_user):
    assert build_cases(one_user, TEST, TRUTHS, exclude_seen=True).truths["click"][0].tolist() == [8]


def test_events_below_the_lowest_level_are_no_history_and_not_seen(one_user):
    cases = build_cases(one_user, TEST, TRUTHS, exclude_seen=True, min_level=CLICK)
    assert cases.histories[0].items.tolist() == [5, 7]


def test_users_without_any_truth_are_left_out_and_those_without_history_counted(timelines):
    table = timelines(
        {
            "quiet": [(1, CLICK, TRAIN)],
            "new": [(1, CLICK, TEST)],
            "only_looks": [(1, CLICK, TRAIN), (2, EXPOSURE, TEST)],
        }
    )
    cases = build_cases(table, TEST, TRUTHS, exclude_seen=True)
    assert cases.user_ids == ["only_looks"]
    assert cases.cold_start_users == 1
    assert cases.truths["click"][0].tolist() == []
    assert cases.truths["pv"][0].tolist() == [2]


def test_a_sample_depends_on_the_seed_and_not_on_the_order_of_the_rows(timelines):
    users = {f"u{number:02}": [(1, CLICK, TRAIN), (2, CLICK, TEST)] for number in range(50)}
    there, back = timelines(users), timelines(dict(reversed(users.items())))
    picks = [build_cases(table, TEST, TRUTHS, exclude_seen=True, max_users=10, seed=3).user_ids for table in (there, back)]
    assert picks[0] == picks[1]
    assert len(set(picks[0])) == 10
    assert picks[0] != build_cases(there, TEST, TRUTHS, exclude_seen=True, max_users=10, seed=4).user_ids


def test_training_events_hold_the_training_phase_alone_across_shards(timelines):
    first = timelines({"anna": [(5, CLICK, TRAIN), (7, CLICK, VALID)], "idle": []})
    second = timelines({"ben": [(3, EXPOSURE, TRAIN), (4, CLICK, TRAIN), (9, CLICK, TEST)]})
    events = train_events(pa.concat_tables([first, second]))
    assert events.users.tolist() == [0, 2, 2]
    assert events.items.tolist() == [5, 3, 4]
    assert events.levels.tolist() == [CLICK, EXPOSURE, CLICK]


def test_no_users_give_no_cases_and_no_events(timelines):
    empty = timelines({})
    assert len(build_cases(empty, TEST, TRUTHS, exclude_seen=True)) == 0
    assert len(train_events(empty).items) == 0
