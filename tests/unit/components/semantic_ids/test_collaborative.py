"""Co-occurrence as vectors, held-out pairs and the verdict on a signal; by hand on a few items."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from components.semantic_ids.adapter import Adapter
from components.semantic_ids.collaborative import (
    SignalOfContent,
    collaborative_signal,
    cosine_features,
    held_out_pairs,
    judge_signal,
    neighbour_hit_rate,
    pmi_features,
    split_users,
    unit,
)
from infra.sections import SemanticIdConfig

KINDS = 8


def ppmi(timelines: list[list[int]], n_items: int, window: int) -> np.ndarray:
    """What the collaborative vectors factorise, in plain loops."""
    counts = np.zeros((n_items, n_items))
    for items in timelines:
        for i, first in enumerate(items):
            for j in range(i + 1, min(i + window + 1, len(items))):
                counts[first, items[j]] += 1 / (j - i)
                counts[items[j], first] += 1 / (j - i)
    marginal = counts.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.log(counts * counts.sum() / np.outer(marginal, marginal))
    values = np.where(counts > 0, np.maximum(values, 0), 0)
    np.fill_diagonal(values, 0)
    return values


def test_ppmi_of_one_timeline_by_hand() -> None:
    # 0-1 and 1-2 count 1, 0-2 counts 1/2; marginals 1.5, 2, 1.5 of 5.
    values = ppmi([[0, 1, 2]], 3, window=2)
    np.testing.assert_allclose(values[0, 1], np.log(1 * 5 / (1.5 * 2)))
    np.testing.assert_allclose(values[0, 2], np.log(0.5 * 5 / (1.5 * 1.5)))


@pytest.mark.parametrize("window", [1, 2, 10])
def test_collaborative_vectors_span_the_ppmi_matrix(window: int) -> None:
    timelines = [[0, 1, 2], [0, 1], [3, 4, 3, 0], [2, 4]]
    vectors = pmi_features([np.asarray(t) for t in timelines], 6, dim=5, window=window, seed=0)
    values = ppmi(timelines, 6, window)
    assert vectors.shape == (6, 5)
    # U S of the SVD has the same inner products as the rows of the matrix.
    np.testing.assert_allclose(vectors @ vectors.T, values @ values.T, atol=1e-4)


def test_items_that_only_meet_themselves_have_no_signal() -> None:
    np.testing.assert_array_equal(pmi_features([np.array([0, 0])], 3, dim=2, window=2, seed=0), np.zeros((3, 2)))


def test_cosine_vectors_span_neighbours_and_visits() -> None:
    timelines = [[0, 1, 2], [0, 1], [3, 4, 3, 0], [2, 4], [5, 1], [5], [0, 5]]
    vectors = cosine_features([np.asarray(t) for t in timelines], 6, dim=5, window=10, seed=0)
    counts = np.zeros((6, 6))
    visits = np.zeros((6, len(timelines)))
    for user, items in enumerate(timelines):
        for i, first in enumerate(items):
            visits[first, user] = 1
            for j in range(len(items)):
                if items[j] != first:
                    counts[first, items[j]] += 1 / abs(i - j)
    events = np.bincount(np.concatenate(timelines), minlength=6) + 5
    neighbours = counts / np.sqrt(np.outer(events, events))
    shares = visits / np.sqrt(np.outer(visits.sum(1), visits.sum(0)))
    for half, matrix in ((vectors[:, :5], neighbours), (vectors[:, 5:], shares)):
        left, values, _ = np.linalg.svd(matrix)
        expected = left[:, :5] * values[:5]
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(half @ half.T, expected @ expected.T, atol=1e-4)


@pytest.mark.parametrize("build", [pmi_features, cosine_features])
def test_no_timeline_gives_zero_vectors(build: Any) -> None:
    assert not build([], 3, dim=2, window=2, seed=0).any()


def test_no_pair_gives_zero_vectors() -> None:
    np.testing.assert_array_equal(pmi_features([], 3, dim=2, window=2, seed=0), np.zeros((3, 2)))


def test_users_are_split_nine_to_one() -> None:
    fit, held_out = split_users([np.array([user]) for user in range(5000)], seed=0)
    assert len(fit) + len(held_out) == 5000
    assert 0.08 < len(held_out) / 5000 < 0.12


def test_no_user_is_on_both_sides() -> None:
    fit, held_out = split_users([np.array([user]) for user in range(500)], seed=0)
    assert sorted(int(timeline[0]) for timeline in [*fit, *held_out]) == list(range(500))


def test_another_seed_holds_out_other_users() -> None:
    timelines = [np.array([user]) for user in range(500)]
    first, second = ({int(timeline[0]) for timeline in split_users(timelines, seed=seed)[1]} for seed in (0, 1))
    assert len(first & second) < len(first) / 2


def test_pairs_are_neighbours_in_both_orders_and_never_an_item_with_itself() -> None:
    pairs = held_out_pairs([np.array([0, 1, 1, 2]), np.array([5])], window=2, seed=0)
    # One apart: 0-1, 1-1, 1-2. Two apart: 0-1, 1-2.
    assert sorted(map(tuple, pairs.tolist())) == [(0, 1), (0, 1), (1, 0), (1, 0), (1, 2), (1, 2), (2, 1), (2, 1)]


def test_pairs_are_sampled_down_to_the_limit() -> None:
    assert held_out_pairs([np.arange(100)], window=3, seed=0, limit=7).shape == (7, 2)


ANGLES = np.deg2rad([0, 10, 30, 90])
FAN = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1).astype(np.float32)


@pytest.mark.parametrize(("k", "expected"), [(1, 1 / 3), (2, 2 / 3), (3, 1.0)])
def test_hit_rate_by_hand(k: int, expected: float) -> None:
    # Nearest first: of 0 these are 1, 2, 3; of 3 these are 2, 1, 0.
    assert neighbour_hit_rate(FAN, np.array([[0, 1], [0, 3], [3, 1]]), k=k) == pytest.approx(expected)


def test_items_equally_near_share_the_places_left() -> None:
    # Of item 0, items 1, 2 and 3 are equally near and two places are left.
    features = np.array([[1, 0], [1, 1], [1, 1], [1, 1], [0, 1]], np.float32)
    assert neighbour_hit_rate(features, np.array([[0, 2]]), k=2) == pytest.approx(2 / 3)


def test_the_length_of_features_does_not_count() -> None:
    pairs = np.array([[0, 1], [0, 3], [3, 1]])
    assert neighbour_hit_rate(FAN * np.array([[1], [50], [2], [9]], np.float32), pairs, k=2) == neighbour_hit_rate(FAN, pairs, k=2)


def test_hit_rate_in_blocks_is_that_of_a_full_sort() -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((700, 5)).astype(np.float32)
    pairs = rng.integers(0, 700, (900, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    near = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosines = near @ near.T
    np.fill_diagonal(cosines, -np.inf)
    nearest = np.argsort(-cosines, axis=1)[:, :10]
    assert neighbour_hit_rate(features, pairs) == pytest.approx(np.mean([j in nearest[i] for i, j in pairs]))


def test_a_sample_judges_the_first_pairs_only() -> None:
    assert neighbour_hit_rate(FAN, np.array([[0, 1], [0, 3]]), k=1, sample=1) == 1


def test_no_pair_is_a_hit_rate_of_0() -> None:
    assert neighbour_hit_rate(FAN, np.empty((0, 2), np.int64)) == 0


def timelines_of_kinds(n_items: int = 160, users: int = 800, *, random: bool = False) -> list[np.ndarray]:
    """Users who stay with one kind of items, or who take any."""
    rng = np.random.default_rng(0)
    kinds = np.arange(n_items) % KINDS
    return [rng.choice(n_items if random else np.flatnonzero(kinds == user % KINDS), 5, replace=False) for user in range(users)]


def noise(n_items: int = 160, width: int = 6) -> np.ndarray:
    return 0.3 * unit(np.random.default_rng(1).standard_normal((n_items, width)).astype(np.float32))


def settings(**changes: Any) -> SemanticIdConfig:
    adapter = {"epochs": 5, "hidden_dim": 16, "batch": 128, "learning_rate": 0.01}
    return SemanticIdConfig(**{"collaborative_dim": KINDS, "adapter": adapter, **changes})


@pytest.mark.parametrize("kind", ["pmi", "cosine", "adapter"])
def test_a_signal_that_finds_neighbours_of_other_users_is_accepted(kind: str) -> None:
    outcome = judge_signal(noise(), timelines_of_kinds(), settings(collaborative=kind, min_collaborative_gain=0.5), seed=0)
    assert outcome["accepted"]
    assert outcome["combined_hit_rate"] > 3 * outcome["content_hit_rate"]


def test_a_signal_of_chance_is_refused_where_content_is_right() -> None:
    """Held-out users stay with a kind, which content tells; those fitted on take anything."""
    of_kinds, of_chance = timelines_of_kinds(), timelines_of_kinds(random=True)
    held_out = {id(timeline) for timeline in split_users(of_kinds, seed=0)[1]}
    timelines = [known if id(known) in held_out else chance for known, chance in zip(of_kinds, of_chance, strict=True)]
    content = 0.3 * np.eye(KINDS, dtype=np.float32)[np.arange(160) % KINDS]
    assert not judge_signal(content, timelines, settings(), seed=0)["accepted"]


def test_a_refusal_is_logged_with_both_figures() -> None:
    with capture_logs() as logs:
        judge_signal(noise(), timelines_of_kinds(), settings(min_collaborative_gain=1000), seed=0)
    refused = next(line for line in logs if "refused" in line["event"])
    assert refused["combined_hit_rate"] > refused["content_hit_rate"] > 0


def test_gain_is_relative_to_content() -> None:
    outcome = judge_signal(noise(), timelines_of_kinds(), settings(), seed=0)
    assert outcome["gain"] == pytest.approx(outcome["combined_hit_rate"] / outcome["content_hit_rate"] - 1)


def test_without_content_the_signal_is_taken_and_the_outcome_says_so() -> None:
    outcome = judge_signal(np.empty((160, 0), np.float32), timelines_of_kinds(), settings(min_collaborative_gain=9), seed=0)
    assert outcome["accepted"]
    assert "no content" in outcome["reason"]


def test_too_few_pairs_to_judge_by_are_told() -> None:
    outcome = judge_signal(noise(), timelines_of_kinds(users=20), settings(min_collaborative_gain=9), seed=0)
    assert outcome["accepted"]
    assert "fewer than 100" in outcome["reason"]


def test_equal_seeds_give_equal_verdicts() -> None:
    first, second = (judge_signal(noise(), timelines_of_kinds(), settings(collaborative="adapter"), seed=4) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(("kind", "width"), [("pmi", KINDS), ("cosine", 2 * KINDS), ("adapter", 2 * KINDS)])
def test_the_width_of_each_kind(kind: str, width: int) -> None:
    assert collaborative_signal(noise(), timelines_of_kinds(), settings(collaborative=kind), seed=0).vectors_NS.shape == (160, width)


def test_a_new_item_has_the_mean_signal_of_the_three_nearest_by_content() -> None:
    angles = np.deg2rad([0, 1, 2, 3, 90])
    content = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    signal = np.array([[1, 0], [1, 0], [0, 1], [0, -1], [0, -1]], np.float32)
    found = SignalOfContent.of(content, signal).estimate(content[:1], 1)
    np.testing.assert_allclose(found, np.array([[2, 1]]) / np.sqrt(5), rtol=1e-6)


def test_items_as_near_as_the_third_count_too() -> None:
    content = np.ones((8, 1), np.float32)
    signal = np.array([[1, 0]] * 4 + [[0, 1]] * 4, np.float32)
    found = SignalOfContent.of(content, signal).estimate(content[:1], 1)
    np.testing.assert_allclose(found, [[0.5**0.5, 0.5**0.5]], rtol=1e-6)


def test_items_without_signal_are_no_example_for_new_ones() -> None:
    content, signal = np.ones((2, 1), np.float32), np.array([[0, 0], [0, 2]], np.float32)
    np.testing.assert_allclose(SignalOfContent.of(content, signal).estimate(content[:1], 1), [[0, 1]])


def test_a_new_item_without_content_has_no_signal() -> None:
    examples = SignalOfContent.of(np.ones((2, 1), np.float32), np.ones((2, 3), np.float32))
    np.testing.assert_array_equal(examples.estimate(np.zeros((1, 1), np.float32), 1), np.zeros((1, 3)))


@pytest.mark.parametrize("kind", ["pmi", "cosine"])
def test_a_known_item_that_nobody_had_has_no_signal(kind: str) -> None:
    content = np.concatenate([noise(), noise()[:1] * 2])
    signal = collaborative_signal(content, timelines_of_kinds(), settings(collaborative=kind), seed=0)
    np.testing.assert_array_equal(signal.vectors_NS.any(axis=1), [True] * 160 + [False])


def test_an_adapter_is_given_the_weighted_signal_of_the_nearest_items() -> None:
    of_content = collaborative_signal(noise(), timelines_of_kinds(), settings(collaborative="adapter"), seed=0).of_content
    assert isinstance(of_content.adapter, Adapter)
    expected = of_content.adapter.apply(noise()[:3], 2 * of_content.nearest(noise()[:3]))
    np.testing.assert_array_equal(of_content.estimate(noise()[:3], 2), expected)
