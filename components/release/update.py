"""The champion with weights that went on learning: the same items, SIDs and settings, a new version in the registry."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from safetensors.torch import save
from torch import Tensor

from components.release.job import BUNDLE, CODE, STEP
from components.retriever.bundle import load_bundle, write_bundle
from infra import storage
from infra.logs import get_logger
from infra.steps import Run, StepResult, content_of, run_step
from infra.tracking import Registered, Registry

_OF = "streamed_of"


def streamed_of(bundle_uri: str) -> str:
    """Version of the bundle whose training the weights of this one went on from, hour after hour; its own if they did not."""
    manifest = storage.open_committed(bundle_uri, verify=False)
    return str(manifest.metadata.get(_OF, manifest.digest[:12]))


def update_champion(
    run: Run, registry: Registry, champion: Registered, weights: Mapping[str, Tensor], figures: Mapping[str, Mapping[str, float]]
) -> StepResult | None:
    """Release weights in place of the champion's.

    The report of the champion is carried along, beside what the new weights and the old ones were judged by.

    Args:
        run: any of the workspace; the step `release` of the one that the champion came from becomes the new one.
        registry: of the run.
        champion: the weights' origin.
        weights: state of the model.
        figures: `new` and `served` -> metrics on the same events.

    Returns:
        the step, with `version` and `mlflow_version`; None where another model is champion now.
    """
    bundle, content = load_bundle(champion.bundle_uri), save(dict(weights))
    run = Run(run.config, champion.origin.get("run_id", "streaming"))
    lineage = {_OF: streamed_of(champion.bundle_uri), "updated_from": champion.bundle_uri}

    def work(out_uri: str) -> dict[str, Any]:
        uri = storage.join(out_uri, BUNDLE)
        manifest = write_bundle(
            uri,
            config=bundle.config,
            weights=content,
            sids=bundle.sids,
            catalogue=bundle.catalogue,
            coder=champion.bundle_uri,
            metadata={"report": champion.report, "streaming": figures, **lineage},
        )
        metrics = {f"{name}/{metric}": value for name, values in figures.items() for metric, value in values.items()}
        files = {"config.json": bundle.config.to_json()}
        number = registry.register(
            uri, evaluation=champion.evaluation, metrics=metrics, params=lineage, files=files, origin=champion.origin
        )
        return {"version": manifest.digest[:12], "mlflow_version": number}

    inputs = {"champion": content_of(champion.bundle_uri), "weights": hashlib.sha256(content).hexdigest()}
    now = registry.champion()
    if now is None or now.bundle_uri != champion.bundle_uri:
        return None
    result = run_step(run, STEP, work, settings={"tracking": run.config.tracking.model_dump()}, inputs=inputs, code=CODE)
    registry.promote(result.metadata["mlflow_version"])
    get_logger(STEP).info("champion", version=result.metadata["version"], mlflow_version=result.metadata["mlflow_version"])
    return result
