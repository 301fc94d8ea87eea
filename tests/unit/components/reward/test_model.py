"""The reward model: attention by hand, masks, what the order of items changes, the loss over known labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from components.reward.data import collate, sessions_of
from components.reward.fit import build_model
from components.reward.model import Attention, reward_loss, tensors_of
from tests.unit.components.reward.small import catalogue, configuration, learnable, timelines

CONFIG = configuration()
NAMES = ["like", "watch"]


@pytest.fixture
def model():
    made = build_model(catalogue(12), CONFIG, objectives=2).eval()
    nn.init.normal_(made.item.weight)
    return made


def batch_of(table, sessions, **settings):
    data = sessions_of(table, CONFIG, NAMES)
    return tensors_of(collate(data, np.asarray(sessions), **({"max_behaviour": 8} | settings)))


def slow_attention(layer: Attention, queries, memory):
    """One query, one head, one key at a time."""
    keys = [*memory, layer.nothing]
    width, size = len(layer.nothing), len(layer.nothing) // layer.heads
    found = []
    for query in queries:
        heads = []
        for head in range(layer.heads):
            part = slice(head * size, (head + 1) * size)
            projected = [layer.key_value(key) for key in keys]
            weights = torch.stack([layer.query(query)[part] @ key[:width][part] / math.sqrt(size) for key in projected]).softmax(0)
            heads.append(sum(weight * key[width:][part] for weight, key in zip(weights, projected, strict=True)))
        found.append(layer.out(torch.cat(heads)))
    return torch.stack(found)


def test_attention_equals_one_query_and_key_at_a_time_without_those_that_are_masked():
    torch.manual_seed(0)
    layer = Attention(8, heads=2)
    query, memory, mask = torch.randn(2, 3, 8), torch.randn(2, 4, 8), torch.tensor([[True, False, True, True], [False] * 4])
    found = layer(query, memory, mask)
    for row in range(2):
        torch.testing.assert_close(found[row], slow_attention(layer, query[row], memory[row][mask[row]]), rtol=1e-5, atol=1e-6)


def test_equal_keys_give_a_mean_that_is_smoothed_by_the_learned_one():
    layer = Attention(2, heads=1)
    nn.init.zeros_(layer.query.weight)
    nn.init.zeros_(layer.query.bias)
    for part, weight in ((layer.key_value, torch.cat([torch.zeros(2, 2), torch.eye(2)])), (layer.out, torch.eye(2))):
        part.weight.data, part.bias.data = weight, torch.zeros(len(weight))
    layer.nothing.data = torch.tensor([0.4, 0.0])
    found = layer(torch.zeros(1, 1, 2), torch.tensor([[[1.0, 0.0], [1.0, 3.0]]]), torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(found[0, 0], torch.tensor([(1 + 1 + 0.4) / 3, 3 / 3]))


def test_padding_changes_nothing(model):
    table = learnable(users=4)
    together = model(batch_of(table, [0, 9, 10]))
    for row, session in enumerate([0, 9, 10]):
        alone = model(batch_of(table, [session]))
        torch.testing.assert_close(together[0][row], alone[0][0])
        torch.testing.assert_close(together[1][row], alone[1][0])


def test_a_longer_session_in_the_batch_changes_nothing(model):
    users = [[(1, 0, 0, 1.0, 1.0), (2, 1, 0, 0.0, 0.0)], [(item, 0, 0, 0.0, 0.0) for item in range(5)]]
    together = model(batch_of(timelines(*users), [1, 2]))
    alone = model(batch_of(timelines(*users), [1]))
    torch.testing.assert_close(together[0][0, :1], alone[0][0])
    torch.testing.assert_close(together[1][0], alone[1][0])


def test_the_order_of_items_moves_their_logits_along_and_leaves_those_of_the_session(model):
    batch = batch_of(timelines([(1, 0, 0, 1.0, 1.0), (2, 1, 0, 0.0, 0.0), (3, 1, 0, 0.0, 0.0), (4, 1, 0, 1.0, 1.0)]), [1])
    order = torch.tensor([2, 0, 1])
    turned = {
        name: value[:, order] if name in ("items_BN", "is_item_BN", "rates_BNO", "labels_BNO") else value for name, value in batch.items()
    }
    (items, session), (turned_items, turned_session) = model(batch), model(turned)
    torch.testing.assert_close(turned_items, items[:, order])
    torch.testing.assert_close(turned_session, session)


def test_an_item_is_seen_in_its_session(model):
    shown = [(1, 0, 0, 1.0, 1.0), (2, 1, 0, 0.0, 0.0), (3, 1, 0, 0.0, 0.0)]
    beside = [*shown[:2], (9, 1, 0, 0.0, 0.0)]
    one, other = (model(batch_of(timelines(events), [1]))[0][0, 0] for events in (shown, beside))
    assert not torch.allclose(one, other)


def test_a_session_of_one_item_has_that_items_logits(model):
    items, sessions = model(batch_of(timelines([(1, 0, 0, 1.0, 1.0), (2, 1, 0, 0.0, 0.0)]), [0, 1]))
    torch.testing.assert_close(items[:, 0], sessions)


def test_labels_of_the_session_itself_are_not_looked_at(model):
    batch = batch_of(learnable(users=3), [5, 6])
    blind = {**batch, "labels_BNO": 1 - batch["labels_BNO"], "labels_BO": 1 - batch["labels_BO"]}
    torch.testing.assert_close(model(batch), model(blind))


def test_behaviour_counts(model):
    liked, disliked = ([(1, 0, 0, like, like), (2, 1, 0, 0.0, 0.0)] for like in (1.0, 0.0))
    one, other = (model(batch_of(timelines(events), [1]))[1] for events in (liked, disliked))
    assert not torch.allclose(one, other)


def test_the_loss_is_the_sum_over_objectives_of_the_mean_over_known_labels():
    logits = (torch.tensor([[[0.5, -1.0], [2.0, 0.0]]]), torch.tensor([[1.0, 0.25]]))
    nan = float("nan")
    batch = {"labels_BNO": torch.tensor([[[1.0, nan], [0.0, nan]]]), "labels_BO": torch.tensor([[1.0, nan]])}
    bce = lambda logit, label: F.binary_cross_entropy_with_logits(torch.tensor(logit), torch.tensor(label))  # noqa: E731
    expected = (bce(0.5, 1.0) + bce(2.0, 0.0)) / 2 + bce(1.0, 1.0)
    torch.testing.assert_close(reward_loss(logits, batch), expected)


def test_a_batch_without_any_known_label_costs_nothing_and_has_finite_gradients(model):
    batch = batch_of(learnable(users=2), [3])
    batch = {
        **batch,
        "labels_BNO": torch.full_like(batch["labels_BNO"], torch.nan),
        "labels_BO": torch.full_like(batch["labels_BO"], torch.nan),
    }
    loss = reward_loss(model(batch), batch)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
