"""New weights are judged on users that came after them; what cannot be compared is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from components.retriever.bundle import Bundle, load_bundle
from components.retriever.contract import History
from serving.challenger import Challenger
from serving.timelines import Visit
from tests.streaming import settings, write_small_bundle

CONFIG = settings("streaming.gate_users=2", "gate.metric=hr@5", "gate.max_drop_from_champion=0.1")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return load_bundle(write_small_bundle(tmp_path, CONFIG))


def visit(history: list[int], items: list[int], level: int = 3) -> Visit:
    return Visit("u", [], History(np.array(history, np.int64), np.full(len(history), 3)), items, [level] * len(items))


def test_equal_weights_hold_and_equal_figures_are_given(bundle: Bundle) -> None:
    ours = Challenger(bundle.weights, CONFIG)
    ours.watch([visit([1, 2], [3])])
    assert not ours.is_due
    # No history, no positive, only what was seen before: nobody to judge.
    ours.watch([visit([], [3]), visit([1], [3], level=1), visit([3], [3])])
    assert not ours.is_due
    ours.watch([visit([4, 5], [6, 4])])
    assert ours.is_due
    decision = ours.judge(bundle)
    assert ours.figures["new"] == ours.figures["served"]
    assert decision.promoted == bool(np.isfinite(ours.figures["new"]["hr@5"]))
    assert "2 users were judged" in decision.reasons


def test_worse_weights_are_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = iter([{"hr@5": 0.1}, {"hr@5": 0.2}])
    monkeypatch.setattr("serving.challenger.evaluate", lambda *_: next(figures))
    ours = Challenger(bundle.weights, CONFIG)
    ours.watch([visit([1], [2])])
    decision = ours.judge(bundle)
    assert not decision.promoted
    assert "hr@5 0.1000 is below 0.1800" in decision.reasons[0]


def test_nobody_to_judge_is_refused(bundle: Bundle) -> None:
    decision = Challenger(bundle.weights, CONFIG).judge(bundle)
    assert not decision.promoted
    assert decision.reasons[0] == "no user was judged"


def test_weights_that_are_not_finite_are_refused(bundle: Bundle) -> None:
    broken = {name: value * torch.nan if value.is_floating_point() else value for name, value in bundle.weights.items()}
    ours = Challenger(broken, CONFIG)
    ours.watch([visit([1], [2])])
    decision = ours.judge(bundle)
    assert not decision.promoted
    assert "NaN" in decision.reasons[0]
