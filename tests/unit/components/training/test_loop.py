"""The loop without Ray: it learns, resumes to the bit, stops at what is not finite, and keeps its golden losses."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from components.retriever.contract import History
from components.retriever.packing import collate
from components.retriever.recommender import RetrieverRecommender
from components.semantic_ids.trie import build_trie
from components.training.loop import build_average, build_model, build_optimizer, train_step
from infra.errors import TrainingError
from tests.unit.components.training.small import N_ITEMS, K, configuration, sids
from tests.unit.components.training.trainer import Trainer, assert_same_weights, losses

GOLDEN = Path(__file__).with_name("golden_loss.json")


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [("cosine", lambda done: 0.5 * (1 + math.cos(math.pi * done))), ("linear", lambda done: 1 - done), ("constant", lambda _: 1.0)],
)
def test_the_learning_rate_rises_in_a_line_and_then_follows_its_schedule(schedule, factor):
    config = configuration(
        "training.epochs=2", "training.warmup_fraction=0.2", "training.learning_rate=0.1", f"training.schedule={schedule}"
    )
    model = torch.nn.Linear(1, 1)
    optimizer, scheduler = build_optimizer(model, config, 5)  # 10 steps, 2 of them warm-up
    rates = []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.05, 0.1, *(0.1 * factor(step / 8) for step in range(9))], abs=1e-8)


def test_the_average_moves_a_tenth_of_the_way_to_the_weights_at_a_decay_of_nine_tenths():
    model = torch.nn.Linear(1, 1, bias=False)
    average = build_average(model, configuration("training.ema_decay=0.9"))
    for weight, expected in ((2.0, 2.0), (4.0, 2.2), (2.2, 2.2), (12.2, 3.2)):  # the first step starts it
        torch.nn.init.constant_(model.weight, weight)
        average.update_parameters(model)
        assert average.module.weight.item() == pytest.approx(expected)


def test_norms_and_biases_do_not_decay():
    config = configuration("training.weight_decay=0.3")
    model = build_model(config, sids())
    groups = build_optimizer(model, config, 5)[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert all(p.dim() > 1 for p in groups[0]["params"])
    assert all(p.dim() == 1 for p in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_without_its_loss_the_rank_head_is_not_trained():
    config = configuration("training.loss.rsp_weight=0", "decoding.score=iap")
    model = build_model(config, sids())
    trained = {id(p) for group in build_optimizer(model, config, 5)[0].param_groups for p in group["params"]}
    assert not trained & {id(p) for p in model.rank_head.parameters()}


def test_the_same_seed_gives_the_same_weights():
    weights = [build_model(configuration(f"seed={seed}"), sids()).embedding.weight for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_checkpoint_restores_moments_learning_rate_and_the_next_step_exactly(tmp_path):
    config = configuration("training.epochs=4", "training.warmup_fraction=0.5")
    trainer = Trainer(config).run(1)
    trainer.save(tmp_path)
    restored = Trainer(config).load(tmp_path)
    assert restored.state == trainer.state
    assert restored.schedule.last_epoch == trainer.schedule.last_epoch == trainer.state["steps"]
    for one, other in zip(trainer.optimizer.param_groups, restored.optimizer.param_groups, strict=True):
        assert {**one, "params": None, "betas": list(one["betas"])} == {**other, "params": None, "betas": list(other["betas"])}
        for a, b in zip(one["params"], other["params"], strict=True):
            moments, same = trainer.optimizer.state[a], restored.optimizer.state[b]
            assert moments.keys() == same.keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(moments[name], same[name]) for name in moments)
    trainer.run(1)
    restored.run(1)
    assert losses(trainer) == losses(restored)
    assert_same_weights(trainer, restored)


@pytest.mark.parametrize("interrupted_after", [1, 2, 3])
def test_a_resumed_run_ends_where_an_undisturbed_one_ends(tmp_path, interrupted_after):
    config = configuration("training.epochs=4", "retriever.dropout=0.3", "training.warmup_fraction=0.3")
    straight = Trainer(config).run()
    Trainer(config).run(interrupted_after).save(tmp_path)
    resumed = Trainer(config).load(tmp_path).run()
    assert losses(resumed) == losses(straight)
    assert [point["epoch"] for point in losses(resumed)] == [1, 2, 3, 4]
    assert_same_weights(straight, resumed)


@pytest.mark.parametrize("interrupted_after", [1, 2, 3, 5])
def test_a_run_interrupted_within_an_epoch_ends_where_an_undisturbed_one_ends(tmp_path, interrupted_after):
    """24 rows make 3 steps of two batches an epoch: checkpoints after steps 2, 3, 4, 6, 8, 9."""
    settings = ("training.rows_per_batch=4", "training.accumulation_steps=2", "training.checkpoint_every_steps=2")
    config = configuration("training.epochs=3", "retriever.dropout=0.3", *settings)
    straight = Trainer(config).run()
    first = Trainer(config).run(interrupted_after)
    assert first.state["steps"] == [2, 3, 4, 6, 8][interrupted_after - 1]
    first.save(tmp_path)
    resumed = Trainer(config).load(tmp_path).run()
    assert losses(resumed) == losses(straight)
    assert [point["step"] for point in losses(resumed)] == [3, 6, 9]
    assert_same_weights(straight, resumed)


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    trainer = Trainer(configuration()).run()
    trainer.save(tmp_path)
    again = Trainer(configuration()).load(tmp_path).run()
    assert_same_weights(trainer, again)
    assert losses(again) == losses(trainer)


def test_each_step_is_told():
    told = []
    trainer = Trainer(configuration("training.epochs=2")).run(tell=lambda *step: told.append(step))
    steps = trainer.state["steps"]
    assert [(done, total) for done, total, _ in told] == [(i + 1, steps) for i in range(steps)]
    assert [figures["epoch"] for _, _, figures in told] == [1] * (steps // 2) + [2] * (steps // 2)


def test_a_learnable_data_set_is_learned():
    config = configuration("training.epochs=60", "training.rows_per_batch=8", "training.learning_rate=0.02")
    trainer = Trainer(config).run()
    curve = losses(trainer)
    assert curve[-1]["loss"] < 0.7 * curve[0]["loss"]
    for name in ("ntp", "ldpo", "bce"):
        assert curve[-1][name] < curve[0][name], name
    trie = build_trie(trainer.model.sid_codes.numpy(), np.ones(N_ITEMS), n_codes=K)
    decoder = RetrieverRecommender(trainer.model, trie, config.decoding)
    hits = 0
    for user in range(N_ITEMS):
        pairs = [(item % N_ITEMS, level) for step in range(3) for item, level in ((user + step, 3), (user + step + 6, 2))]
        items, levels = (np.array(column) for column in zip(*pairs, strict=True))
        (ranked,) = decoder.recommend([History(items, levels)], 1, exclude_seen=False)
        hits += int(ranked.items[0]) == (user + 3) % N_ITEMS
    assert hits >= N_ITEMS - 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_weights(value):
    trainer = Trainer(configuration())
    with torch.no_grad():
        trainer.model.feedback.weight.fill_(value)
    before = trainer.model.embedding.weight.clone()
    with pytest.raises(TrainingError, match="not finite") as caught:
        trainer.run()
    assert "learning_rate" in caught.value.mend
    assert torch.equal(trainer.model.embedding.weight, before)


def test_the_golden_losses_have_not_moved():
    """Three steps from a fixed seed. RANKGR_WRITE_GOLDEN=1 writes the file anew, for a change that is meant to move them."""
    config = configuration(
        "training.rows_per_batch=4", "training.loss.beta=0.7", "training.loss.train_lambdas=[3, 2]", "decoding.score=iap"
    )
    trainer = Trainer(config)
    found = []
    for start in range(0, 12, 4):
        torch.manual_seed(start)
        batch = collate(trainer.rows[start : start + 4])
        found.append(train_step(trainer.model, [batch], trainer.optimizer, trainer.schedule, config))
    if os.environ.get("RANKGR_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps([{name: round(value, 6) for name, value in step.items()} for step in found], indent=2) + "\n")
    for step, expected in zip(found, json.loads(GOLDEN.read_text()), strict=True):
        assert step == pytest.approx(expected, abs=1e-4)
