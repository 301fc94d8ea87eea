import math

import pytest

from components.evaluation.gate import decide, decide_update
from components.reward.gate import Verdict
from infra.sections import GateConfig

POLICY = GateConfig(metric="ndcg@10", min_gain_over_baselines=0.0, max_drop_from_champion=0.5, max_invalid_rate=0.0)


def report(ndcg=0.5, knn=0.25, popularity=0.125, **others):
    return {
        "retriever": {"ndcg@10": ndcg},
        "item_knn": {"ndcg@10": knn},
        "popularity": {"ndcg@10": popularity},
        "invalid_rate": 0.0,
        "users": 943,
    } | others


def test_a_model_above_the_baselines_is_promoted_with_the_figures_that_carried_it():
    decision = decide(report(), None, POLICY)
    assert decision.promoted
    assert "ndcg@10 0.5000 is at least 0.2500 (item_knn 0.2500 +0.0%)" in decision.reasons
    assert "943 users were judged" in decision.reasons


def test_equal_to_the_best_baseline_is_enough_and_less_is_not():
    assert decide(report(ndcg=0.25), None, POLICY).promoted
    refused = decide(report(ndcg=0.2), None, POLICY)
    assert not refused.promoted
    assert refused.reasons == ("ndcg@10 0.2000 is below 0.2500 (item_knn 0.2500 +0.0%)",)


def test_a_gain_over_the_baselines_can_be_asked_for():
    policy = POLICY.model_copy(update={"min_gain_over_baselines": 1.0})
    assert decide(report(ndcg=0.5), None, policy).promoted
    assert not decide(report(ndcg=0.49), None, policy).promoted


def test_the_champion_may_be_missed_by_the_accepted_drop_and_no_more():
    assert decide(report(ndcg=0.5), report(ndcg=1.0), POLICY).promoted
    refused = decide(report(ndcg=0.49), report(ndcg=1.0), POLICY)
    assert refused.reasons == ("ndcg@10 0.4900 is below 0.5000 (champion 1.0000 -50.0%)",)


def test_invalid_items_are_refused():
    assert decide(report(invalid_rate=0.01), None, POLICY).reasons == ("invalid rate 0.0100 is above the 0.0000 allowed",)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"ndcg": math.nan}, "the retriever has no finite ndcg@10"),
        ({"ndcg": math.inf}, "the retriever has no finite ndcg@10"),
        ({"ndcg": "0.5"}, "the retriever has no finite ndcg@10"),
        ({"retriever": {}}, "the retriever has no finite ndcg@10"),
        ({"retriever": None}, "the retriever has no finite ndcg@10"),
        ({"knn": math.nan}, "no finite ndcg@10 of item_knn to compare with"),
        ({"popularity": None}, "no finite ndcg@10 of popularity to compare with"),
        ({"users": 0}, "no user was judged"),
        ({"users": None}, "no user was judged"),
        ({"invalid_rate": math.nan}, "there is no finite invalid rate"),
        ({"invalid_rate": None}, "there is no finite invalid rate"),
    ],
)
def test_what_is_missing_or_no_number_fails(broken, reason):
    decision = decide(report(**broken), None, POLICY)
    assert not decision.promoted
    assert reason in decision.reasons


@pytest.mark.parametrize("champion", [{}, report(ndcg=math.nan), {"retriever": {"hr@10": 0.5}}])
def test_a_champion_without_the_metric_fails(champion):
    assert decide(report(), champion, POLICY).reasons == ("no finite ndcg@10 of the champion to compare with",)


def test_an_empty_report_is_refused_for_every_reason():
    assert len(decide({}, {}, POLICY).reasons) == 4


def test_the_default_policy_reads_a_metric_that_reports_have():
    assert decide(report(), None, GateConfig()).promoted


def test_an_update_is_held_against_the_served_weights_on_the_same_users():
    served = {"ndcg@10": 0.4}
    assert decide_update({"ndcg@10": 0.2}, served, 50, POLICY).promoted
    refused = decide_update({"ndcg@10": 0.19}, served, 50, POLICY)
    assert refused.reasons == ("ndcg@10 0.1900 is below 0.2000 (champion 0.4000 -50.0%)",)


@pytest.mark.parametrize(
    ("new", "served", "users"),
    [
        ({}, {"ndcg@10": 0.1}, 5),
        ({"ndcg@10": 0.1}, {}, 5),
        ({"ndcg@10": math.nan}, {"ndcg@10": 0.1}, 5),
        ({"ndcg@10": 1.0}, {"ndcg@10": 0.1}, 0),
    ],
)
def test_an_update_that_cannot_be_compared_is_refused(new, served, users):
    assert not decide_update(new, served, users, POLICY).promoted


def test_a_reward_model_that_was_refused_keeps_the_model_from_being_promoted():
    refused = decide(report(), None, POLICY, Verdict(passed=False, reasons=("AUC(like) 0.4 is below 0.5",)))
    assert (refused.promoted, refused.reasons) == (False, ("AUC(like) 0.4 is below 0.5",))
    passed = decide(report(), None, POLICY, Verdict(passed=True, reasons=("AUC(like) 0.6 is at least 0.5",)))
    assert passed.promoted
    assert "AUC(like) 0.6 is at least 0.5" in passed.reasons


def test_a_verdict_without_reasons_fails_closed():
    assert not decide(report(), None, POLICY, Verdict(passed=True, reasons=())).promoted
