"""Whether a reward model is good enough: a pure function of its report and the policy, which fails closed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infra.sections import RewardGateConfig


@dataclass(frozen=True)
class Verdict:
    """Outcome of the gate.

    Attributes:
        passed: all conditions hold.
        reasons: with figures; all conditions that held if passed, else those that did not.
    """

    passed: bool
    reasons: tuple[str, ...]


def judge(report: Mapping[str, Any], policy: RewardGateConfig) -> Verdict:
    """Weigh the report of a reward model against thresholds and baseline.

    An AUC that is missing, not a number or not finite fails, on the baseline's side too; so does a report without objectives,
    unless the log names no signals: then no reward model was asked for.

    Args:
        report: of the step `reward`.
        policy: thresholds; where it names objectives, the others are not weighed.
    """
    if report.get("no_signals") is True:
        return Verdict(passed=True, reasons=("no reward model: the log names no signals",))
    objectives = report.get("objectives") or {}
    wanted = policy.objectives or dict.fromkeys(objectives, policy.min_auc)
    if not wanted:
        return Verdict(passed=False, reasons=("the reward model has no objective to be judged by",))
    checks = [_check(name, objectives.get(name), least, policy.min_gain_over_baseline, report) for name, least in wanted.items()]
    passed = all(holds for holds, _ in checks)
    return Verdict(passed, tuple(text for holds, text in checks if holds == passed))


def _check(name: str, figures: Any, least: float, gain: float, report: Mapping[str, Any]) -> tuple[bool, str]:
    if not isinstance(figures, Mapping):
        reason = (report.get("left_out") or {}).get(name, "there is no such objective")
        return False, f"the reward model has no {name}: {reason}"
    own, baseline = _finite(figures.get("auc")), _finite(figures.get("baseline_auc"))
    if own is None or baseline is None:
        return False, f"no finite AUC({name}) of the {'reward model' if own is None else 'logistic regression'}"
    bar = max(least, baseline + gain)
    origin = f"at least {least:.4f}, logistic regression {baseline:.4f} {gain:+.4f}"
    return own >= bar, f"AUC({name}) {own:.4f} of the reward model is {'at least' if own >= bar else 'below'} {bar:.4f} ({origin})"


def _finite(value: Any) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None
