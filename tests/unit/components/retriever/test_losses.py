from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.retriever.losses import ldpo_loss, ntp_loss, rank_head_loss
from components.retriever.model import retain_codewords
from tests.unit.components.retriever import slow


def ldpo(scores, levels, requests=None, *, beta=1.0, valid=None):
    """One row; `scores` is differentiable."""
    count = len(levels)
    return ldpo_loss(
        scores[None],
        torch.tensor([levels]),
        torch.tensor([requests or [0] * count]),
        torch.tensor([valid or [True] * count]),
        beta=beta,
    )


def logs(*values):
    return torch.tensor(values, dtype=torch.float64).log().requires_grad_()


def test_ntp_is_a_weighted_mean_of_the_levels_sum():
    logp = torch.tensor([[[-1.0, -2.0], [-0.5, -0.5], [-100.0, -100.0]]])
    assert float(ntp_loss(logp, torch.tensor([[1.0, 3.0, 0.0]]))) == pytest.approx((1 * 3 + 3 * 1) / 4)


def test_ntp_without_any_weight_is_0():
    assert float(ntp_loss(torch.full((1, 2, 2), -1.0), torch.zeros(1, 2))) == 0


def test_ldpo_of_one_request_with_all_four_levels():
    # exp(pi) = 4, 3, 2, 1: each item against itself and all below, -log(4/10), -log(3/6), -log(2/3), and nothing.
    loss = ldpo(logs(4, 3, 2, 1), [4, 3, 2, 1])
    assert loss.item() == pytest.approx((log(10 / 4) + log(6 / 3) + log(3 / 2)) / 3)


def test_the_order_of_items_does_not_matter():
    assert ldpo(logs(1, 4, 2, 3), [1, 4, 2, 3]).item() == pytest.approx(log(7.5) / 3)


def test_beta_sharpens():
    loss = ldpo(logs(4, 3, 2, 1), [4, 3, 2, 1], beta=2.0)
    assert loss.item() == pytest.approx((log(30 / 16) + log(14 / 9) + log(5 / 4)) / 3)


def test_items_of_one_level_are_not_compared():
    # exp(pi) = 3, 1, 2: the two clicks are each held against the exposure alone.
    assert ldpo(logs(3, 1, 2), [3, 3, 2]).item() == pytest.approx((log(5 / 3) + log(3 / 1)) / 2)


def test_the_lowest_item_is_pushed_down_by_its_share_of_each_comparison():
    scores = logs(4, 3, 2, 1)
    ldpo(scores, [4, 3, 2, 1]).backward()
    assert scores.grad.tolist() == pytest.approx(
        [(4 / 10 - 1) / 3, (3 / 10 + 3 / 6 - 1) / 3, (2 / 10 + 2 / 6 + 2 / 3 - 1) / 3, (1 / 10 + 1 / 6 + 1 / 3) / 3]
    )


@pytest.mark.parametrize("levels", [[3], [2, 2], [4, 4, 4]])
def test_items_with_nothing_below_contribute_neither_loss_nor_gradient(levels):
    scores = logs(*range(1, len(levels) + 1))
    loss = ldpo(scores, levels)
    loss.backward()
    assert loss.item() == 0
    assert scores.grad.tolist() == [0] * len(levels)


def test_empty_levels_between_are_finite():
    assert ldpo(logs(3, 1), [4, 1]).item() == pytest.approx(log(4 / 3))


def test_requests_of_one_row_do_not_mix():
    both = ldpo(logs(4, 3, 2, 1), [4, 2, 3, 1], [0, 0, 1, 1])
    assert both.item() == pytest.approx((log(7 / 4) + log(3 / 2)) / 2)
    assert ldpo(logs(4, 3), [4, 2], [0, 1]).item() == 0


def test_padding_is_nobodys_rival():
    assert ldpo(logs(3, 1, 50), [4, 1, 0], valid=[True, True, False]).item() == pytest.approx(log(4 / 3))


items = st.tuples(st.floats(-20, 0), st.integers(1, 4), st.integers(0, 2), st.booleans())


@given(st.lists(st.lists(items, min_size=4, max_size=4), min_size=1, max_size=3), st.sampled_from([0.1, 1.0, 5.0]))
@settings(max_examples=100, deadline=None)
def test_ldpo_equals_a_loop_over_items(rows, beta):
    scores = torch.tensor([[item[0] for item in row] for row in rows], dtype=torch.float64)
    levels, requests = (torch.tensor([[item[place] for item in row] for row in rows]) for place in (1, 2))
    valid = torch.tensor([[item[3] for item in row] for row in rows])
    flat = [(torch.tensor(s, dtype=torch.float64), level, (r, q)) for r, row in enumerate(rows) for s, level, q, ok in row if ok]
    expected = slow.ldpo(*zip(*flat, strict=True), beta) if flat else torch.zeros(())
    assert float(ldpo_loss(scores, levels, requests, valid, beta=beta)) == pytest.approx(float(expected), rel=1e-9, abs=1e-12)


def test_rank_head_loss_sums_over_codewords_and_averages_over_predictions():
    # -log s(0) = log 2 for a positive, -log(1 - s(log 3)) = log 4 for a negative; the second prediction: log 2 + log 2.
    score = torch.tensor([[0.0, log(3)], [0.0, 0.0]])
    label = torch.tensor([[1, 0], [0, 0]])
    assert float(rank_head_loss(score, label, torch.ones(2, 2, dtype=torch.bool))) == pytest.approx((log(8) + log(4)) / 2)


def test_rank_head_loss_leaves_out_padding():
    score = torch.tensor([[0.0, log(3)], [7.0, -7.0]])
    retained = torch.tensor([[True, True], [False, False]])
    assert float(rank_head_loss(score, torch.tensor([[1, 0], [0, 1]]), retained)) == pytest.approx(log(8))
    assert float(rank_head_loss(score, torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bool))) == 0


def test_the_most_probable_codewords_are_retained_and_true_ones_forced_in():
    logits = torch.tensor([[[3.0, 2.0, 1.0, 0.0]]])
    assert retain_codewords(logits, torch.zeros(1, 1, 4), 2).tolist() == [[[0, 1]]]
    assert sorted(retain_codewords(logits, torch.tensor([[[0, 0, 0, 1]]]), 2).flatten().tolist()) == [0, 3]
    assert sorted(retain_codewords(logits, torch.tensor([[[0, 0, 1, 1]]]), 2).flatten().tolist()) == [2, 3]
    assert sorted(retain_codewords(logits, torch.tensor([[[0, 0, 0, 1]]]), 9).flatten().tolist()) == [0, 1, 2, 3]
