"""The gate of the reward model: thresholds, baseline, and what is missing fails."""

from __future__ import annotations

import math

import pytest

from components.reward.gate import judge
from infra.sections import RewardGateConfig

POLICY = RewardGateConfig()


def report(auc=0.8, baseline=0.7, **more):
    return {"no_signals": False, "objectives": {"like": {"auc": auc, "baseline_auc": baseline}}, "left_out": {}, **more}


def test_a_model_above_threshold_and_baseline_passes_with_figures():
    verdict = judge(report(), POLICY)
    assert verdict.passed
    assert verdict.reasons == (
        "AUC(like) 0.8000 of the reward model is at least 0.7000 (at least 0.5000, logistic regression 0.7000 +0.0000)",
    )


@pytest.mark.parametrize(
    ("auc", "baseline", "policy"),
    [
        (0.69, 0.7, POLICY),
        (0.45, 0.4, POLICY),
        (0.71, 0.7, RewardGateConfig(min_gain_over_baseline=0.02)),
        (0.71, 0.6, RewardGateConfig(objectives={"like": 0.72})),
    ],
)
def test_a_model_below_either_is_refused_with_figures(auc, baseline, policy):
    verdict = judge(report(auc, baseline), policy)
    assert not verdict.passed
    assert f"AUC(like) {auc:.4f}" in verdict.reasons[0]


@pytest.mark.parametrize("broken", [None, math.nan, math.inf, True, "0.9"])
@pytest.mark.parametrize("side", ["auc", "baseline"])
def test_an_auc_that_is_no_finite_number_fails(broken, side):
    verdict = judge(report(**{side: broken}), RewardGateConfig(min_auc=0, min_gain_over_baseline=-1))
    assert not verdict.passed
    assert "no finite AUC(like)" in verdict.reasons[0]


@pytest.mark.parametrize("empty", [{}, {"objectives": {}}, {"objectives": None, "left_out": {"like": "none of 9 events earned it"}}])
def test_a_report_without_objectives_fails(empty):
    assert not judge(empty, POLICY).passed


def test_only_the_objectives_that_are_named_are_weighed():
    two = report()
    two["objectives"]["follow"] = {"auc": 0.3, "baseline_auc": 0.6}
    assert not judge(two, POLICY).passed
    assert judge(two, RewardGateConfig(objectives={"like": 0.7})).passed


def test_a_named_objective_that_was_left_out_fails_with_the_reason():
    verdict = judge(report(left_out={"follow": "none of 9 events earned it"}), RewardGateConfig(objectives={"follow": 0.5}))
    assert verdict.reasons == ("the reward model has no follow: none of 9 events earned it",)


def test_a_log_without_signals_asks_for_no_reward_model():
    verdict = judge({"no_signals": True, "objectives": {}}, POLICY)
    assert verdict.passed
    assert "names no signals" in verdict.reasons[0]
