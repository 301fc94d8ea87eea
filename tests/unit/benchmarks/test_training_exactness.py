"""What the training benchmarks compare is equal, and their checks can fail; at tiny sizes, without a clock."""

import dataclasses

import numpy as np
import polars as pl
import pytest
import torch

from components.retriever.packing import collate
from tests.benchmarks import packing, train_step
from tests.unit.components.training.small import configuration, timelines

SIZES = {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ff_size": 64}


@pytest.fixture
def model():
    return packing.tiny_model(16, **SIZES)


def gradients_of_shared_history(model, row, other):
    ours, peer = [lambda: packing.packed_loss(model, collate([row]))], [lambda: packing.separate_loss(model, other)]
    return packing.compare(model, ours, peer)


@pytest.mark.parametrize(("tokens", "targets"), [(8, 3), (2, 5), (0, 2)])
def test_a_packed_row_has_the_gradients_of_separate_rows(model, tokens, targets):
    row = packing.shared_history(tokens, targets)
    assert gradients_of_shared_history(model, row, row) < packing.TOLERANCE


def test_the_check_of_gradients_sees_another_target(model):
    row = packing.shared_history(8, 3)
    other = dataclasses.replace(row, target_items=row.target_items[[0, 1, 1]])
    assert gradients_of_shared_history(model, row, other) > packing.TOLERANCE


def test_rows_of_users_have_the_gradients_of_rows_of_requests(model):
    config = configuration("training.tokens_per_batch=64", "retriever.max_history=6")
    whole = packing.user_rows(config, timelines(users=5), {"u1": [3, 4, 5], "u2": list(range(9))})
    single = [request for row in whole for request in packing.requests_of(row)]
    sides = [[lambda b=b: packing.packed_loss(model, b) for b in packing.batches_of(rows, config)] for rows in (whole, single)]
    assert packing.compare(model, *sides) < packing.TOLERANCE


def test_every_event_of_the_training_phase_is_a_target_and_no_earlier_one_is():
    config = configuration("retriever.max_history=6")
    for earlier in ({}, {f"u{user}": [11] * 9 for user in range(3)}):
        rows = packing.user_rows(config, timelines(users=3), earlier)
        events = [
            item for line in timelines(users=3).to_pylist() for item, phase in zip(line["items"], line["phases"], strict=True) if not phase
        ]
        assert sorted(item for row in rows for item in row.target_items.tolist()) == sorted(events)


def test_a_row_a_request_holds_the_history_that_its_targets_see():
    row = packing.user_rows(configuration(), timelines(users=1, events=4), {})[0]
    parts = packing.requests_of(row)
    assert [part.target_items.tolist() for part in parts] == [[0, 6], [1, 7], [2, 8]]
    assert [part.items.tolist() for part in parts] == [[], [0, 6], [0, 6, 1, 7]]
    assert all((part.target_prefix == len(part.items)).all() for part in parts)


def test_timelines_of_kuairand_are_read_in_one_process(tmp_path):
    folder = tmp_path / "kuairand_pure_14d"
    folder.mkdir()
    first, days = 1_650_000_000_000, 9 * 86_400_000
    log = {
        "user_id": [7, 7, 7],
        "item_id": [30, 20, 30],
        "timestamp_ms": [first, first + 1, first + days],
        "session_id": [0, 0, 1],
        "is_click": [1, 0, 0],
    }
    others = ["is_like", "is_follow", "is_comment", "is_forward", "long_view"]
    pl.DataFrame(log | {name: [0, 0, 0] for name in others}).write_parquet(folder / "interactions.parquet")
    pl.DataFrame({"item_id": [20, 30]}).write_parquet(folder / "items.parquet")
    pl.DataFrame({"user_id": [7], "watch_seq": [[20, 99, 30]]}).write_parquet(folder / "prior_positive_histories.parquet")
    table, number = packing.kuairand_timelines(packing.kuairand_config(folder))
    (line,) = table.to_pylist()
    assert number == {"20": 0, "30": 1}
    assert (line["items"], line["levels"], line["requests"], line["phases"]) == ([1, 0, 1], [3, 2, 2], [0, 0, 1], [0, 0, 2])
    assert packing.earlier_positives(folder, number) == {"7": [0, 1]}


def test_the_trainers_model_has_the_logits_of_packed_rows(model):
    rows = train_step.user_rows(model, 3, 5)
    assert train_step.logits_difference(model, rows) < packing.TOLERANCE


def test_the_check_of_logits_sees_another_model(model, monkeypatch):
    stranger = train_step.language_model(packing.tiny_model(16, **SIZES))
    torch.nn.init.normal_(stranger.model.norm.weight)
    monkeypatch.setattr(train_step, "language_model", lambda _: stranger)
    assert train_step.logits_difference(model, train_step.user_rows(model, 2, 3)) > packing.TOLERANCE


def test_the_trainer_is_given_every_target_behind_all_that_precedes_it(model):
    (row,) = train_step.user_rows(model, 1, 3)
    codes = [[model.first_token + m * 16 + code for m, code in enumerate(model.sid_codes[i].tolist())] for i in row.target_items]
    bos = model.first_token - 1
    assert train_step.sequences(model, [row]) == [
        {"input_ids": [bos, codes[0][0]], "labels": codes[0]},
        {"input_ids": [bos, *codes[0], codes[1][0]], "labels": codes[1]},
        {"input_ids": [bos, *codes[0], *codes[1], codes[2][0]], "labels": codes[2]},
    ]


def test_both_sides_take_steps(model):
    rows = train_step.user_rows(model, 2, 4)
    assert len(train_step.our_steps(model, rows, steps=2)) == 2
    assert len(train_step.trainer_step(model, train_step.sequences(model, rows), train_step.padded, per_batch=4, steps=2)) == 2
    assert np.isfinite([p.detach().abs().max() for p in model.parameters()]).all()
