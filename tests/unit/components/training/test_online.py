"""Incremental steps: the optimizer step of the offline loop, to the bit resumable, and no step where gradients are not finite."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from components.training import online
from components.training.data import epoch_batches, plan_batches, target_min_level, training_rows
from components.training.loop import build_model, build_optimizer, noise_seed, train_step
from components.training.online import OnlineLearner, for_stream
from infra.config import Config
from tests.unit.components.training.small import configuration, sids, timelines


def settings(*overrides: str) -> Config:
    return configuration("retriever.dropout=0.1", "streaming.learning_rate=0.01", "streaming.replay_rows=30", *overrides)


def learner(config: Config) -> OnlineLearner:
    return OnlineLearner(build_model(config, sids()), config)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_step_is_that_of_the_offline_loop_at_a_constant_rate_and_the_average_goes_on_from_the_released_weights() -> None:
    config = settings("training.rows_per_batch=99", "training.ema_decay=0.9", "streaming.replay_share=0")
    rows = training_rows(timelines(), config)
    ours = learner(config)
    released = weights(ours.model)
    losses = ours.learn(rows[:4])

    constant = {"learning_rate": 0.01, "schedule": "constant", "warmup_fraction": 0.0}
    same = config.model_copy(update={"training": config.training.model_copy(update=constant)})
    model = build_model(config, sids())
    optimizer, schedule = build_optimizer(model, same, 1)
    (batches,) = epoch_batches(plan_batches(rows[:4], same), epoch=0, seed=config.seed)
    torch.manual_seed(noise_seed(same, 0, 1, 0))
    assert losses == train_step(model, batches, optimizer, schedule, same)
    for name, value in model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], value)
        if value.is_floating_point():
            torch.testing.assert_close(ours.averaged()[name], 0.9 * released[name] + 0.1 * value)
    assert ours.loss == losses["loss"]
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}


def test_levels_weigh_as_the_stream_says_where_it_says_so() -> None:
    all_alike, clicks_alone = "{2: 1.0, 3: 1.0, 4: 1.0}", "{2: 0.0, 3: 1.0, 4: 0.5}"
    trained_so = settings(f"training.loss.ntp_level_weights={clicks_alone}")
    trained_otherwise = settings(f"training.loss.ntp_level_weights={all_alike}")
    told_so = settings(f"training.loss.ntp_level_weights={all_alike}", f"streaming.ntp_level_weights={clicks_alone}")
    rows = training_rows(timelines(), trained_otherwise)[:4]
    expected, other, found = (learner(config).learn(rows) for config in (trained_so, trained_otherwise, told_so))
    assert found == expected != other


def test_a_level_that_counts_in_the_stream_alone_makes_targets_there() -> None:
    trained_on = ("training.loss.alpha=0", "training.loss.rsp_weight=0", "training.loss.ntp_level_weights={3: 1.0}")
    config = settings(*trained_on, "decoding.score=iap", "streaming.ntp_level_weights={2: 0.5, 3: 1.0}")
    assert (target_min_level(config), target_min_level(for_stream(config))) == (3, 2)


def test_it_learns_and_mixes_earlier_rows_in(monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings("streaming.replay_share=0.5")
    rows = training_rows(timelines(), config)
    ours = learner(config)
    ours.replay.add(rows[12:])
    sizes = []
    monkeypatch.setattr(online, "plan_batches", lambda rows, config: sizes.append(len(rows)) or plan_batches(rows, config))
    first = ours.learn(rows[:6])
    for _ in range(20):
        last = ours.learn(rows[:6])
    assert first is not None and last is not None
    assert last["loss"] < first["loss"]
    assert set(sizes) == {12}
    assert len(ours.replay) == 30
    assert ours.steps == 21


def test_a_restored_learner_goes_on_at_the_rate_of_its_settings(tmp_path: Path) -> None:
    rows = training_rows(timelines(), settings())
    fast = learner(settings())
    fast.learn(rows[:4])
    fast.save(tmp_path)
    slow = learner(settings("streaming.learning_rate=0.001"))
    slow.load(tmp_path)
    for _ in range(2):
        slow.learn(rows[:4])
        assert {group["lr"] for group in slow._optimizer.param_groups} == {0.001}


def test_a_restored_learner_goes_on_to_the_bit(tmp_path: Path) -> None:
    config = settings()
    rows = training_rows(timelines(), config)
    undisturbed, restored = learner(config), learner(config)
    for turn in range(6):
        undisturbed.learn(rows[turn * 4 : turn * 4 + 4])
        if turn == 2:
            undisturbed.save(tmp_path)
    restored.load(tmp_path)
    for turn in range(3, 6):
        restored.learn(rows[turn * 4 : turn * 4 + 4])
    for mine, theirs in ((restored.averaged(), undisturbed.averaged()), (weights(restored.model), weights(undisturbed.model))):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert (restored.steps, restored.loss) == (undisturbed.steps, undisturbed.loss)
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".safetensors", ".json")]


def test_a_step_without_finite_gradients_is_skipped_and_its_rows_are_not_replayed() -> None:
    config = settings("streaming.replay_share=0")
    rows = training_rows(timelines(), config)
    ours = learner(config)
    table = ours.model.embedding.weight
    kept = table.detach().clone()
    with torch.no_grad():
        table.fill_(math.nan)
    assert ours.learn(rows[:3]) is None
    with torch.no_grad():
        table.copy_(kept)
    assert (ours.skipped, ours.steps, len(ours.replay), ours.loss) == (1, 0, 0, None)
    assert ours.learn(rows[:3]) is not None


def test_drift_is_the_distance_from_the_released_weights_by_their_length() -> None:
    ours = learner(settings())
    assert ours.drift() == 0
    with torch.no_grad():
        for parameter in ours.model.parameters():
            parameter *= 1.25
    assert ours.drift() == pytest.approx(0.25, rel=1e-5)
    ours.released(weights(ours.model))
    assert ours.drift() == 0
