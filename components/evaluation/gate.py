"""Whether a new model may become champion: a pure function of report, champion and policy, which fails closed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.evaluation.baselines import BASELINES
from components.reward.gate import Verdict
from infra.sections import GateConfig


@dataclass(frozen=True)
class Decision:
    """Outcome of the gate.

    Attributes:
        promoted: the model becomes champion.
        reasons: with figures; all conditions that held if promoted, else those that did not.
    """

    promoted: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class _Check:
    holds: bool
    text: str


def decide(report: Mapping[str, Any], champion: Mapping[str, Any] | None, policy: GateConfig, reward: Verdict | None = None) -> Decision:
    """Weigh a model's report against the baselines, the champion and the policy.

    A figure that is missing, not a number or not finite fails its condition, on the champion's side too.

    Args:
        report: the report of the model: method -> metrics, `invalid_rate`, `users`.
        champion: the report of the present champion, in the same form; None if there is none.
        policy: the metric and the margins.
        reward: on the reward model of the run, which must have passed too; None where none was fitted.
    """
    checks = [_some_users(report), _beats_baselines(report, policy), _is_valid(report, policy)]
    if champion is not None:
        checks.append(_holds_against_champion(report, champion, policy))
    if reward is not None:
        checks += [_Check(reward.passed, reason) for reason in reward.reasons] or [_Check(False, "the reward model was not judged")]
    return _decision(checks)


def decide_update(figures: Mapping[str, float], served: Mapping[str, float], users: int, policy: GateConfig) -> Decision:
    """Weigh weights that went on learning against the served ones, both judged on the same events.

    Args:
        figures: metrics of the new weights.
        served: of those that they would replace.
        users: who were judged.
        policy: the metric and `max_drop_from_champion`.
    """
    new, old = {"retriever": figures, "users": users}, {"retriever": served}
    return _decision([_some_users(new), _holds_against_champion(new, old, policy)])


def _decision(checks: Sequence[_Check]) -> Decision:
    promoted = all(check.holds for check in checks)
    return Decision(promoted, tuple(check.text for check in checks if check.holds == promoted))


def _some_users(report: Mapping[str, Any]) -> _Check:
    users = _figure(report, "users")
    if users is None or users < 1:
        return _Check(False, "no user was judged")
    return _Check(True, f"{users:.0f} users were judged")


def _beats_baselines(report: Mapping[str, Any], policy: GateConfig) -> _Check:
    own = _figure(report, "retriever", policy.metric)
    if own is None:
        return _Check(False, f"the retriever has no finite {policy.metric}")
    figures = {name: _figure(report, name, policy.metric) for name in BASELINES}
    known = {name: figure for name, figure in figures.items() if figure is not None}
    if len(known) < len(figures):
        missing = ", ".join(name for name in figures if name not in known)
        return _Check(False, f"no finite {policy.metric} of {missing} to compare with")
    best = max(known, key=known.__getitem__)
    bar = known[best] * (1 + policy.min_gain_over_baselines)
    return _compare(own, bar, policy.metric, f"{best} {known[best]:.4f} {policy.min_gain_over_baselines:+.1%}")


def _holds_against_champion(report: Mapping[str, Any], champion: Mapping[str, Any], policy: GateConfig) -> _Check:
    own, other = _figure(report, "retriever", policy.metric), _figure(champion, "retriever", policy.metric)
    if own is None or other is None:
        return _Check(False, f"no finite {policy.metric} of {'the champion' if own is not None else 'the retriever'} to compare with")
    bar = other * (1 - policy.max_drop_from_champion)
    return _compare(own, bar, policy.metric, f"champion {other:.4f} {-policy.max_drop_from_champion:+.1%}")


def _is_valid(report: Mapping[str, Any], policy: GateConfig) -> _Check:
    rate = _figure(report, "invalid_rate")
    if rate is None:
        return _Check(False, "there is no finite invalid rate")
    holds = rate <= policy.max_invalid_rate
    return _Check(holds, f"invalid rate {rate:.4f} is {'within' if holds else 'above'} the {policy.max_invalid_rate:.4f} allowed")


def _compare(own: float, bar: float, metric: str, origin: str) -> _Check:
    return _Check(own >= bar, f"{metric} {own:.4f} is {'at least' if own >= bar else 'below'} {bar:.4f} ({origin})")


def _figure(report: Mapping[str, Any], *keys: str) -> float | None:
    """The finite number at a path of keys, or None."""
    value: Any = report
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None
