"""Packed rows give what separate sequences give: the same logits, losses and gradients."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from components.retriever import model as model_module
from components.retriever.packing import collate
from infra.sections import LossConfig
from tests.unit.components.retriever import slow
from tests.unit.components.retriever.slow import row, tiny_model

SIDS = {
    1: [[0], [1], [2], [3]],
    2: [[0, 1], [0, 2], [3, 1], [2, 2], [0, 3]],
    3: [[0, 1, 2], [0, 1, 3], [3, 1, 0], [2, 2, 2], [0, 3, 3]],
}
ROWS = [
    row([0, 1, 2, 3, 0], [3, 1, 4, 2, 3], [(1, 3, 0, 0), (2, 2, 3, 1), (0, 3, 3, 1), (1, 4, 3, 1), (2, 1, 5, 2), (3, 4, 5, 2)]),
    row([], [], [(3, 4, 0, 0)]),
    row([2, 1], [4, 4], [(0, 3, 2, 7), (1, 2, 2, 7)]),
]


def separate_logits(model, rows):
    """For each row and target, the logits of all levels, each from a sequence of its own."""
    for packed in rows:
        for item, prefix in zip(packed.target_items, packed.target_prefix, strict=True):
            sid = model.sid_codes[item].tolist()
            states = slow.hidden_states(model, packed.items[:prefix], packed.levels[:prefix], sid[:-1])
            yield torch.stack(slow.codeword_logits(model, *states))


def packed_logits(model, batch):
    logits = model.target_logits(model.encode(batch, model.sid_codes[batch.target_items_BP]), batch)
    return torch.stack(logits, dim=2)[batch.target_valid_BP]


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def numbers(parts):
    return {name: float(value.detach()) for name, value in parts.items()}


def assert_close(actual, expected):
    scale = max(float(expected.detach().abs().max()), 1.0)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("history", ["merged", "tokens"])
@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("rows", [ROWS, ROWS[1:2]], ids=["ragged", "empty history"])
def test_packed_logits_and_gradients_are_those_of_separate_sequences(history, levels, rows):
    model = tiny_model(SIDS[levels], n_codes=4, history=history)
    packed = packed_logits(model, collate(rows))
    separate = torch.stack(list(separate_logits(model, rows)))
    assert packed.shape == (sum(len(r.target_items) for r in rows), levels, 4)
    assert_close(packed, separate)
    weight = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1))
    expected = gradients(model, (separate * weight).sum())
    for name, gradient in gradients(model, (packed * weight).sum()).items():
        assert_close(gradient, expected[name])
    assert any(g.abs().max() > 1e-3 for g in expected.values())


@pytest.mark.parametrize("history", ["merged", "tokens"])
def test_without_level_embeddings_the_level_of_the_history_has_no_effect(history):
    model = tiny_model(SIDS[2], n_codes=4, history=history, history_levels=False)
    assert model.feedback is None
    other = [replace(r, levels=np.full_like(r.levels, 1)) for r in ROWS]
    assert torch.equal(packed_logits(model, collate(ROWS)), packed_logits(model, collate(other)))


def test_what_stands_in_padding_changes_nothing():
    model = tiny_model(SIDS[2], n_codes=4)
    batch = collate(ROWS)
    items, levels, targets = batch.items_BH.clone(), batch.levels_BH.clone(), batch.target_items_BP.clone()
    padding = torch.arange(items.shape[1]) >= batch.history_B[:, None]
    items[padding], levels[padding], targets[~batch.target_valid_BP] = 4, 4, 4
    noisy = replace(batch, items_BH=items, levels_BH=levels, target_items_BP=targets, target_levels_BP=batch.target_levels_BP.clone())
    noisy.target_levels_BP[~batch.target_valid_BP] = 4
    assert torch.equal(packed_logits(model, batch), packed_logits(model, noisy))
    config = LossConfig(train_lambdas=[4, 4])
    assert numbers(model(noisy, config)) == pytest.approx(numbers(model(batch, config)), rel=1e-6)


def test_a_row_gives_the_same_alone_and_in_company():
    model = tiny_model(SIDS[2], n_codes=4)
    together = packed_logits(model, collate(ROWS))
    alone = torch.cat([packed_logits(model, collate([r])) for r in ROWS])
    assert_close(alone, together)


LOSSES = {
    "as in the paper": {},
    "weights by level": {"ntp_level_weights": {2: 0.5, 3: 1.0, 4: 2.0}},
    "sharp LDPO": {"beta": 3.0, "alpha": 0.5},
    "few candidates": {"train_lambdas": [2, 1, 3], "rsp_weight": 0.3},
    "smoothed": {"label_smoothing": 0.2},
}


KINDS = {
    "prior": {"rank_prior": "iap"},
    "no prior": {"rank_prior": "none"},
    "children": {"codeword_softmax": "children"},
    "repeats": {"repeat_bias": True},
}
REFUSED = ("children", "smoothed")
PAIRS = [(kind, name) for kind in KINDS for name in LOSSES if (kind, name) != REFUSED]


@pytest.mark.parametrize(("kind", "settings"), [(KINDS[kind], LOSSES[name]) for kind, name in PAIRS], ids=map(", ".join, PAIRS))
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_the_losses_and_their_gradients_are_those_of_the_slow_model(levels, settings, kind):
    model = tiny_model(SIDS[levels], n_codes=4, **kind)
    config = LossConfig(**{"train_lambdas": [4, 3, 2], **settings})
    expected = slow.losses(model, ROWS, config)
    actual = model(collate(ROWS), config)
    assert numbers(actual) == pytest.approx(numbers(expected), rel=1e-4)
    reference = gradients(model, expected["loss"])
    for name, gradient in gradients(model, actual["loss"]).items():
        assert_close(gradient, reference[name])


def test_a_loss_with_weight_0_is_not_computed():
    model = tiny_model(SIDS[2], n_codes=4)
    parts = model(collate(ROWS), LossConfig(alpha=0.0, rsp_weight=0.0))
    assert parts.keys() == {"loss", "ntp"}
    assert parts["loss"] == parts["ntp"]
    assert not parts["ntp"].requires_grad


def test_without_any_positive_all_losses_are_finite_and_the_rank_head_gets_no_gradient():
    model = tiny_model(SIDS[2], n_codes=4)
    rows = [row([0, 1], [2, 2], [(2, 1, 2, 0), (3, 2, 2, 0)]), row([], [], [(1, 2, 0, 0)])]
    parts = model(collate(rows), LossConfig(train_lambdas=[4, 4]))
    assert float(parts["bce"]) == 0
    assert all(torch.isfinite(part) for part in parts.values())
    found = gradients(model, parts["loss"])
    assert all(torch.isfinite(g).all() for g in found.values())
    assert all(float(g.abs().max()) == 0 for name, g in found.items() if name.startswith("rank_head"))


def test_levels_without_weight_leave_the_loss_at_0():
    model = tiny_model(SIDS[2], n_codes=4)
    parts = model(collate([row([0], [3], [(1, 2, 1, 0)])]), LossConfig(ntp_level_weights={4: 1.0}))
    assert numbers(parts) == {"loss": 0.0, "ntp": 0.0, "ldpo": 0.0, "bce": 0.0}


@pytest.fixture
def labels(monkeypatch):
    """Labels that the rank head is trained on, one list of label sums a level."""
    seen = []

    def record(score_QC, label_QC, retained_QC):
        real = retained_QC.any(-1)
        seen.append(sorted(label_QC[real].sum(-1).int().tolist()))
        return score_QC.sum() * 0

    monkeypatch.setattr(model_module, "rank_head_loss", record)
    return seen


BCE_ONLY = LossConfig(alpha=0.0, train_lambdas=[4, 4])


def test_positives_with_one_first_codeword_share_a_row_of_labels(labels):
    # Items 0, 1, 4 are [0, 1], [0, 2], [0, 3]: a single label at level 1, three labels in one row at level 2.
    tiny_model(SIDS[2], n_codes=4)(collate([row([], [], [(0, 3, 0, 0), (1, 4, 0, 0), (4, 3, 0, 0)])]), BCE_ONLY)
    assert labels == [[1], [3]]


def test_positives_with_different_first_codewords_share_the_first_level_only(labels):
    # Items 0 and 2 are [0, 1] and [3, 1]; item 1 is [0, 2] but only an exposure.
    tiny_model(SIDS[2], n_codes=4)(collate([row([], [], [(0, 3, 0, 0), (2, 3, 0, 0), (1, 2, 0, 0)])]), BCE_ONLY)
    assert labels == [[2], [1, 1]]


def test_positives_of_different_requests_share_nothing(labels):
    tiny_model(SIDS[2], n_codes=4)(collate([row([3], [3], [(0, 3, 0, 0), (1, 3, 1, 1)])]), BCE_ONLY)
    assert labels == [[1, 1], [1, 1]]


def test_an_item_twice_in_a_request_is_one_label(labels):
    tiny_model(SIDS[2], n_codes=4)(collate([row([], [], [(0, 3, 0, 0), (0, 4, 0, 0)])]), BCE_ONLY)
    assert labels == [[1], [1]]


def test_at_most_rsp_predictions_a_row_are_drawn(labels):
    model = tiny_model(SIDS[2], n_codes=4)
    targets = [(item, 3, 0, request) for request, item in enumerate([0, 1, 2, 3, 4, 0])]
    model(collate([row([], [], targets), row([], [], targets[:1])]), LossConfig(alpha=0.0, train_lambdas=[4, 4], rsp_predictions=2))
    assert labels == [[1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("history", ["merged", "tokens"])
@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("feedback", [1, 4])
def test_every_parameter_has_a_gradient_whatever_the_batch_holds(history, levels, feedback):
    """DDP waits for each of them."""
    model = tiny_model(SIDS[levels], n_codes=4, history=history)
    model(collate([row([], [], [(0, feedback, 0, 0)])]), LossConfig(train_lambdas=[4, 4, 4]))["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
