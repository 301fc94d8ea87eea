import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from components.retriever.contract import Ranked
from components.training import early_stopping as module
from components.training.checkpoint import WEIGHTS
from components.training.early_stopping import EarlyStopping, validation_cases
from infra.errors import DataError
from infra.records import TIMELINES
from tests.unit.components.training.small import configuration, sids, timelines
from tests.unit.components.training.trainer import Trainer, assert_same_weights, losses

SETTINGS = ("training.patience=2", "training.validation_k=3", "decoding.exclude_seen=false")


def table(*users):
    """Users are lists of (item, level, phase)."""
    rows = []
    for number, events in enumerate(users):
        items, levels, phases = ([event[i] for event in events] for i in range(3))
        order = list(range(len(events)))
        rows.append(
            {"user_id": f"u{number}", "items": items, "levels": levels, "timestamps": order, "requests": order, "phases": phases}
        )  # fmt: skip
    return pa.Table.from_pylist(rows, schema=TIMELINES)


def as_lists(cases):
    return [(case.history.items.tolist(), case.history.levels.tolist(), case.truth.tolist()) for case in cases]


EVENTS = [(1, 3, 0), (2, 2, 0), (5, 3, 1), (1, 4, 1), (6, 2, 1), (7, 3, 2)]


@pytest.mark.parametrize(("exclude_seen", "truth"), [("true", [5]), ("false", [1, 5])])
def test_histories_end_before_the_validation_phase_and_its_positives_are_the_truth(exclude_seen, truth):
    config = configuration("retriever.history_min_level=1", f"decoding.exclude_seen={exclude_seen}")
    assert as_lists(validation_cases(table(EVENTS), config)) == [([1, 2], [3, 2], truth)]


def test_users_without_history_or_truth_are_not_judged():
    only_seen = [(1, 3, 0), (1, 3, 1)]
    only_history, only_truth, only_exposed = [(1, 3, 0)], [(1, 3, 1)], [(1, 3, 0), (2, 2, 1)]
    assert validation_cases(table(only_seen, only_history, only_truth, only_exposed), configuration("decoding.exclude_seen=true")) == []


def test_a_sample_of_users_is_the_same_for_the_same_seed():
    def sample(seed):
        return as_lists(validation_cases(timelines(), configuration("training.validation_users=5", *SETTINGS[2:], f"seed={seed}")))

    assert len(sample(0)) == 5
    assert sample(0) == sample(0) != sample(1)


def test_nothing_to_validate_on_is_an_error():
    with pytest.raises(DataError, match="nothing can be validated"):
        EarlyStopping(configuration(*SETTINGS), table([(1, 3, 0)]), sids())


def answering(monkeypatch, answers):
    """Let every history be answered with the same items."""

    class Fixed:
        def __init__(self, *_):
            pass

        def recommend(self, histories, k, *, exclude_seen):
            return [Ranked(np.array(answers)[:k], np.zeros(min(k, len(answers)), np.float32)) for _ in histories]

    monkeypatch.setattr(module, "RetrieverRecommender", Fixed)


def test_the_rate_is_the_mean_share_of_each_users_truth_in_the_first_k(monkeypatch):
    answering(monkeypatch, [5, 8, 1, 9])
    users = table(EVENTS, [(2, 3, 0), (9, 3, 1)], [(2, 3, 0), (8, 3, 1), (9, 3, 1)])  # truths {1, 5}, {9}, {8, 9}
    early = EarlyStopping(configuration(*SETTINGS), users, sids())
    model = Trainer(configuration()).model
    assert early.judge(model, 1) == {"hr@3": pytest.approx((1 + 0 + 0.5) / 3)}


class Scripted(EarlyStopping):
    """Its rates are given."""

    def __init__(self, config, rates):
        super().__init__(config, timelines(), sids())
        self.rates = list(rates)

    def _hit_rate(self, model):
        return self.rates.pop(0)


def test_training_ends_after_the_patience_and_the_best_weights_are_released(tmp_path):
    config = configuration("training.epochs=9", *SETTINGS)
    trainer = Trainer(config, Scripted(config, [0.1, 0.4, 0.2, 0.3, 0.9])).run()
    assert [point["hr@3"] for point in losses(trainer)] == [0.1, 0.4, 0.2, 0.3]
    assert trainer.state["stopped"]
    trainer.save(tmp_path)
    released = load_file(tmp_path / WEIGHTS)
    best = Trainer(config).run(2).average.module.state_dict()
    assert all(torch.equal(released[name], value) for name, value in best.items())


def test_an_equal_rate_is_no_better_one():
    config = configuration("training.epochs=9", *SETTINGS)
    early = Scripted(config, [0.4, 0.4, 0.4])
    assert len(losses(Trainer(config, early).run())) == 3
    assert early.best_epoch == 1


def test_validation_every_second_epoch_and_after_the_last():
    config = configuration("training.epochs=5", "training.validate_every_epochs=2", *SETTINGS)
    trainer = Trainer(config, Scripted(config, [0.1, 0.2, 0.3])).run()
    assert [point["epoch"] for point in losses(trainer) if "hr@3" in point] == [2, 4, 5]
    assert not trainer.state["stopped"]


@pytest.mark.parametrize("interrupted_after", [1, 2, 3])
def test_a_resumed_run_stops_where_an_undisturbed_one_stops(tmp_path, interrupted_after):
    rates = [0.4, 0.3, 0.5, 0.4, 0.2, 0.9]
    config = configuration("training.epochs=9", *SETTINGS)
    straight = Trainer(config, Scripted(config, rates)).run()
    Trainer(config, Scripted(config, rates)).run(interrupted_after).save(tmp_path)
    resumed = Trainer(config, Scripted(config, rates[interrupted_after:])).load(tmp_path).run()
    assert losses(resumed) == losses(straight)
    assert len(losses(resumed)) == 5
    assert_same_weights(straight, resumed)
    assert resumed.early.state() == straight.early.state()
    best, expected = resumed.early.best_weights, straight.early.best_weights
    assert all(torch.equal(best[name], expected[name]) for name in expected)
    resumed.save(tmp_path / "end")
    assert len(losses(Trainer(config, Scripted(config, [])).load(tmp_path / "end").run())) == 5  # nothing is left to do


def test_validating_changes_nothing_but_the_end():
    settings = ("training.epochs=3", "retriever.dropout=0.3", "training.gradient_checkpointing=true")
    config = configuration(*settings, "training.patience=9", *SETTINGS[1:])
    judged = Trainer(config, EarlyStopping(config, timelines(), sids())).run()
    assert_same_weights(judged, Trainer(configuration(*settings)).run())
    assert all(0 <= point["hr@3"] <= 1 for point in losses(judged))


def test_the_rate_of_several_workers_is_that_of_one(monkeypatch):
    config = configuration(*SETTINGS)
    model = Trainer(config).model
    alone = EarlyStopping(config, timelines(), sids()).judge(model, 1)["hr@3"]
    parts = []
    monkeypatch.setattr(module, "all_reduce", lambda total: parts.append(float(total)))
    for rank in range(3):
        EarlyStopping(config, timelines(), sids(), rank=rank, world_size=3).judge(model, 1)
    assert sum(parts) / len(validation_cases(timelines(), config)) == pytest.approx(alone)
