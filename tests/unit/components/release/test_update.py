"""Weights that went on learning take the champion's place, unless another model has."""

from __future__ import annotations

from pathlib import Path

import torch

from components.release.update import streamed_of, update_champion
from components.retriever.bundle import load_bundle
from infra.config import Config
from infra.steps import Run, run_records
from infra.tracking import Registered, Registry
from tests.streaming import settings, write_small_bundle

ORIGIN = {"run_id": "a-run", "sessions": "s3://bucket/steps/sessions/1"}
FIGURES = {"new": {"hr@5": 0.3}, "served": {"hr@5": 0.2}}


def released(folder: Path, config: Config, registry: Registry) -> Registered:
    """A champion as the step `release` leaves it."""
    step = folder / "steps" / "release" / "first"
    uri = write_small_bundle(step, config)
    registry.promote(registry.register(uri, evaluation="e", metrics={}, params={}, files={}, origin=ORIGIN))
    return registry.require_champion()


def test_an_update_is_a_new_champion_of_the_same_run_and_lineage(tmp_path: Path) -> None:
    config = settings(f"workspace={tmp_path}")
    registry = Registry(config.tracking, config.workspace)
    first = released(tmp_path, config, registry)
    before = load_bundle(first.bundle_uri)
    assert streamed_of(first.bundle_uri) == before.version
    for round_ in (1, 2):
        champion = registry.require_champion()
        weights = {name: value + round_ if value.is_floating_point() else value for name, value in before.weights.items()}
        result = update_champion(Run(config), registry, champion, weights, FIGURES)
        assert result is not None
        now = registry.require_champion()
        bundle = load_bundle(now.bundle_uri)
        assert bundle.version == result.metadata["version"] != before.version
        assert all(torch.equal(bundle.weights[name], weights[name]) for name in weights)
        assert bundle.item_ids == before.item_ids
        assert streamed_of(now.bundle_uri) == before.version
        assert now.evaluation == "e"
        assert now.origin == ORIGIN
        assert run_records(config.workspace, "a-run")["release"].uri == result.uri
    # The first champion's trainer has been overtaken.
    assert update_champion(Run(config), registry, first, before.weights, FIGURES) is None
    assert registry.require_champion().bundle_uri == now.bundle_uri
