"""The adapter places items by content and co-occurrence; its loss by hand, its behaviour on items of two kinds."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch

from components.semantic_ids.adapter import Adapter, fit_adapter, info_nce
from infra.sections import AdapterConfig

SETTINGS = AdapterConfig(hidden_dim=16, epochs=50, batch=64, learning_rate=0.01)
N, KNOWN = 60, 48


@cache
def world() -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Items of six kinds; timelines are of one kind, half of the inputs is noise, and the last items are in no timeline."""
    rng = np.random.default_rng(0)
    kinds = np.arange(N) % 6
    timelines = [rng.choice(np.flatnonzero((kinds == user % 6) & (np.arange(N) < KNOWN)), 5) for user in range(120)]
    told = np.eye(6)[kinds] + 0.2 * rng.standard_normal((N, 6))
    content, signal = (np.concatenate([told, 0.7 * rng.standard_normal((N, 6))], axis=1).astype(np.float32) for _ in range(2))
    signal[KNOWN:] = 0
    return content, signal, timelines


def fit() -> Adapter:
    content, signal, timelines = world()
    return fit_adapter(content, signal, timelines, SETTINGS, dim=24, window=2, seed=3)


@cache
def fitted() -> Adapter:
    return fit()


def kinship(vectors: np.ndarray, rows: slice) -> float:
    """Mean cosine to items of one's kind less that to all others."""
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    near = vectors[rows] @ vectors.T
    same = (np.arange(N) % 6)[rows, None] == np.arange(N) % 6
    return float(near[same].mean() - near[~same].mean())


def test_the_loss_of_two_pairs_by_hand() -> None:
    left, right = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    loss = info_nce(left, right, torch.tensor([0, 1]), torch.tensor([2, 3]), torch.zeros(4), temperature=0.5)

    def cross_entropy(own: float, other: float) -> float:
        return -math.log(math.exp(own / 0.5) / (math.exp(own / 0.5) + math.exp(other / 0.5)))

    forth = (cross_entropy(1.0, 0.6) + cross_entropy(0.8, 0.0)) / 2
    back = (cross_entropy(1.0, 0.0) + cross_entropy(0.8, 0.6)) / 2
    assert loss.item() == pytest.approx((forth + back) / 2, rel=1e-5)


def test_log_q_is_taken_off_the_logits() -> None:
    same = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    log_q = torch.log(torch.tensor([0.1, 0.1, 0.6, 0.2]))
    loss = info_nce(same, same, torch.tensor([0, 1]), torch.tensor([2, 3]), log_q, temperature=1.0)
    # Cosines are equal: an item's probability is in proportion to 1 / q, among the right 1/4 and 3/4, among the left one half.
    expected = ((-math.log(0.25) - math.log(0.75)) / 2 + math.log(2)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_items_of_a_pair_are_no_negatives_of_it() -> None:
    vectors = torch.nn.functional.normalize(torch.tensor([[1.0, 0.2], [0.5, 1.0]]), dim=1)
    twice = info_nce(vectors, vectors.flip(0), torch.tensor([0, 1]), torch.tensor([1, 0]), torch.zeros(2), temperature=0.1)
    assert twice.item() == pytest.approx(0, abs=1e-6)


def test_at_first_cosines_are_those_of_the_inputs() -> None:
    content, signal, _ = world()
    adapter = fit_adapter(content, signal, [], SETTINGS, dim=24, window=2, seed=0)
    inputs = np.concatenate([content, signal], axis=1)
    inputs /= np.linalg.norm(inputs, axis=1, keepdims=True)
    vectors = adapter.apply(content, signal)
    np.testing.assert_allclose(vectors @ vectors.T, inputs @ inputs.T, atol=1e-5)


def test_items_that_meet_come_closer() -> None:
    content, signal, _ = world()
    inputs = np.concatenate([content, signal], axis=1)
    assert kinship(fitted().apply(content, signal), slice(0, KNOWN)) > 1.5 * kinship(inputs, slice(0, KNOWN))


def test_items_that_nobody_had_come_closer_to_their_kind_by_content() -> None:
    content, signal, _ = world()
    assert kinship(fitted().apply(content, signal), slice(KNOWN, N)) > 1.2 * kinship(content, slice(KNOWN, N))


def test_vectors_have_unit_norm_and_no_more_width_than_the_inputs() -> None:
    content, signal, timelines = world()
    vectors = fit_adapter(content, signal, timelines, SETTINGS, dim=99, window=2, seed=0).apply(content, signal)
    assert vectors.shape == (N, 24)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


def test_an_item_without_content_and_signal_has_a_zero_row() -> None:
    vectors = fitted().apply(np.zeros((1, 12), np.float32), np.zeros((1, 12), np.float32))
    np.testing.assert_array_equal(vectors, 0)


def test_items_without_content_learn_from_their_signal_alone() -> None:
    _, signal, timelines = world()
    nothing = np.empty((N, 0), np.float32)
    adapter = fit_adapter(nothing, signal, timelines, SETTINGS, dim=12, window=2, seed=0)
    known = slice(0, KNOWN)
    inputs = signal + 1e-9
    assert kinship(adapter.apply(nothing, signal) + 1e-9, known) > kinship(inputs, known)


def test_a_dimension_without_variance_does_no_harm() -> None:
    content, signal, timelines = world()
    content = content.copy()
    content[:, 7:9] = [0, 7]
    assert np.isfinite(fit_adapter(content, signal, timelines, SETTINGS, dim=24, window=2, seed=0).apply(content, signal)).all()


def test_equal_seeds_give_equal_adapters() -> None:
    first, second = fit(), fitted()
    for name, tensor in first.tensors().items():
        np.testing.assert_array_equal(tensor, second.tensors()[name])


def test_the_global_generator_of_torch_is_left_alone() -> None:
    before = torch.get_rng_state()
    fit()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_restored_adapter_gives_the_same_vectors() -> None:
    content, signal, _ = world()
    adapter = fitted()
    restored = Adapter.restore(adapter.tensors())
    np.testing.assert_array_equal(restored.apply(content, signal), adapter.apply(content, signal))


def test_tensors_are_float32() -> None:
    assert {tensor.dtype for tensor in fitted().tensors().values()} == {np.dtype(np.float32)}
