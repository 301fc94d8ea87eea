import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.retriever.packing import Row
from components.training.data import epoch_batches, plan_batches, training_rows
from infra.errors import ConfigError
from infra.records import TIMELINES
from tests.unit.components.training.small import configuration


def numbered_rows(lengths):
    """Row i has its number as its only target."""
    one = np.zeros(1, dtype=np.int64)
    return [Row(np.arange(length), np.ones(length, np.int64), np.array([i]), one + 3, one, one) for i, length in enumerate(lengths)]


def plan(rows, *settings, workers=1, per_batch=2):
    return plan_batches(rows, configuration(f"training.rows_per_batch={per_batch}", *settings), world_size=workers)


def numbers(batch):
    return batch.target_items_BP.flatten().tolist()


def epoch(rows, *settings, workers=1, per_batch=2, number=0, seed=0, skip=0):
    """For each worker and optimizer step, the row numbers of its batches."""
    planned = plan(rows, *settings, workers=workers, per_batch=per_batch)
    return [
        [[numbers(batch) for batch in step] for step in epoch_batches(planned, epoch=number, seed=seed, rank=rank, skip=skip)]
        for rank in range(workers)
    ]


lengths = st.lists(st.integers(0, 130), min_size=1, max_size=40)


@given(lengths, st.integers(1, 4), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_every_row_comes_once_an_epoch_and_every_worker_steps_alike(sizes, workers, per_batch, number):
    by_worker = epoch(numbered_rows(sizes), workers=workers, per_batch=per_batch, number=number)
    steps = plan(numbered_rows(sizes), workers=workers, per_batch=per_batch).steps
    assert [len(batches) for batches in by_worker] == [steps] * workers
    assert all(1 <= len(batch) <= per_batch for batches in by_worker for (batch,) in batches)
    seen = [i for batches in by_worker for (batch,) in batches for i in batch]
    assert set(seen) == set(range(len(sizes)))
    # Where the last step has fewer rows than workers, some rows come again, one for each worker without any.
    left = len(sizes) % (per_batch * workers)
    assert len(seen) - len(sizes) == (workers - left if 0 < left < workers else 0)


@given(lengths, st.integers(1, 4), st.integers(1, 400), st.integers(0, 3), st.sampled_from(["merged", "tokens"]))
@settings(max_examples=150, deadline=None)
def test_a_batch_of_several_rows_stays_within_its_tokens(sizes, workers, budget, number, history):
    settings = (f"training.tokens_per_batch={budget}", f"retriever.history={history}")
    planned = plan(numbered_rows(sizes), *settings, workers=workers)
    width = {"merged": 1, "tokens": 2}[history]
    seen, steps = [], []
    for rank in range(workers):
        batches = [batch for (batch,) in epoch_batches(planned, epoch=number, seed=0, rank=rank)]
        steps.append(len(batches))
        for batch in batches:
            rows, items = batch.items_BH.shape
            assert rows == 1 or rows * (1 + width * items + batch.target_items_BP.shape[1]) <= budget  # two levels: a position a target
            seen += numbers(batch)
    assert steps == [planned.steps] * workers
    assert set(seen) == set(range(len(sizes)))


def test_short_rows_make_larger_batches():
    # [BOS], 9 or 99 items and the first codeword of a target: 11 or 101 positions a row.
    batches = epoch(numbered_rows([9] * 20 + [99] * 4), "training.tokens_per_batch=205")[0]
    assert sorted(len(batch) for (batch,) in batches) == [2, 2, 2, 18]


def test_batches_of_a_step_come_together_and_the_last_step_has_the_rest():
    (steps,) = epoch(numbered_rows([3] * 10), "training.accumulation_steps=2", per_batch=2)
    assert [len(step) for step in steps] == [2, 2, 1]
    assert sorted(i for step in steps for batch in step for i in batch) == list(range(10))


@pytest.mark.parametrize("more", [(), ("training.accumulation_steps=2",), ("training.tokens_per_batch=40",)])
def test_an_interrupted_epoch_goes_on_with_the_next_step(more):
    rows = numbered_rows([3, 9, 40] * 7)
    whole = epoch(rows, *more, workers=2, number=5)
    assert epoch(rows, *more, workers=2, number=5, skip=2) == [steps[2:] for steps in whole]


def test_an_interrupted_epoch_hides_the_history_that_an_undisturbed_one_hides():
    planned = plan(numbered_rows([20] * 12), "training.history_dropout=0.5")
    whole, rest = ([batch.history_B.tolist() for (batch,) in epoch_batches(planned, epoch=1, seed=0, skip=skip)] for skip in (0, 2))
    assert rest == whole[2:]
    assert len({length for lengths in whole for length in lengths}) > 2


def test_the_order_depends_on_seed_and_epoch_alone():
    rows = numbered_rows([3] * 20)
    assert epoch(rows, number=4, seed=1) == epoch(rows, number=4, seed=1)
    assert epoch(rows, number=4, seed=1) != epoch(rows, number=5, seed=1)
    assert epoch(rows, number=4, seed=1) != epoch(rows, number=4, seed=2)


def test_rows_of_like_length_share_a_batch():
    sizes = [4, 200] * 8
    for (batch,) in epoch(numbered_rows(sizes), per_batch=4)[0]:
        assert len({sizes[i] for i in batch}) == 1


def table(items, levels, requests, phases):
    row = {"user_id": "u", "items": items, "levels": levels, "timestamps": requests, "requests": requests, "phases": phases}
    return pa.Table.from_pylist([row], schema=TIMELINES)


FOUR_LEVELS = table([5, 6, 7, 8], [1, 2, 3, 4], [0, 1, 2, 3], [0, 0, 0, 0])


def test_only_the_training_phase_is_read():
    (row,) = training_rows(table([5, 6, 7, 8], [3, 3, 3, 3], [0, 0, 1, 2], [0, 0, 1, 2]), configuration())
    assert (row.items.tolist(), row.target_items.tolist()) == ([5, 6], [5, 6])


def timeline_by_days(days, phases, user="u"):
    """An item a day, each in a request of its own."""
    times = [int(day * 86_400_000) for day in days]
    n = len(days)
    row = {"user_id": user, "items": range(n), "levels": [3] * n, "timestamps": times, "requests": range(n), "phases": phases}
    return pa.Table.from_pylist([row], schema=TIMELINES)


def test_events_older_than_the_target_days_are_history_alone():
    (row,) = training_rows(timeline_by_days([1, 5, 7.5, 8, 9], [0, 0, 0, 0, 1]), configuration("training.target_days=1"))
    assert (row.items.tolist(), row.target_items.tolist(), row.target_prefix.tolist()) == ([0, 1, 2, 3], [2, 3], [2, 3])


def test_without_target_days_events_before_1970_are_targets_too():
    (row,) = training_rows(timeline_by_days([-2, -1, 1], [0, 0, 0]), configuration())
    assert row.target_items.tolist() == [0, 1, 2]


def test_the_target_days_end_with_the_last_training_event_of_all_users():
    tables = pa.concat_tables([timeline_by_days([1, 2], [0, 0]), timeline_by_days([3, 4, 9], [0, 0, 2], user="v")])
    (row,) = training_rows(tables, configuration("training.target_days=1.5"))
    assert row.target_items.tolist() == [0, 1]
    assert [len(r.target_items) for r in training_rows(tables, configuration("training.target_days=2"))] == [1, 2]


def test_a_user_without_a_training_event_has_no_row():
    assert training_rows(table([5], [3], [0], [1]), configuration()) == []


@pytest.mark.parametrize(
    ("losses", "targets"),
    [
        (["training.loss.alpha=1", "training.loss.ntp_level_weights={}"], [5, 6, 7, 8]),
        (["training.loss.alpha=0", "training.loss.ntp_level_weights={2: 1.0}"], [6, 7, 8]),
        (["training.loss.alpha=0", "training.loss.ntp_level_weights={4: 1.0}"], [7, 8]),
        (["training.loss.alpha=0", "training.loss.ntp_level_weights={4: 1.0}", "training.loss.rsp_weight=0", "decoding.score=iap"], [8]),
        (["training.loss.alpha=0", "training.loss.ntp_level_weights={}", "split.positive_level=4"], [8]),
    ],
)
def test_an_event_is_a_target_from_the_lowest_level_on_that_any_loss_uses(losses, targets):
    (row,) = training_rows(FOUR_LEVELS, configuration(*losses))
    assert row.target_items.tolist() == targets
    assert row.items.tolist() == [5, 6, 7, 8]


def test_losses_that_all_weigh_nothing_are_refused():
    losses = ["training.loss.alpha=0", "training.loss.ntp_level_weights={}", "training.loss.rsp_weight=0"]
    nothing = configuration(*losses, "decoding.score=iap")
    with pytest.raises(ConfigError, match="weight 0"):
        training_rows(FOUR_LEVELS, nothing)
