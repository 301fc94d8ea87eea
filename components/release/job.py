"""Bundle what was trained, register it and make it champion (`python -m components.release.job`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from components.retriever.bundle import write_bundle
from infra import storage
from infra.logs import get_logger
from infra.steps import Run, StepResult, content_of, job_main, remember, run_step
from infra.tracking import Registry

STEP = "release"
CODE = (
    "components/release",
    "components/retriever/bundle.py",
    "components/semantic_ids/coder.py",
    "components/semantic_ids/table.py",
    "infra/records.py",
)
BUNDLE = "bundle"


def step(run: Run, sessions: str, semantic_ids: str, training: str, evaluation: str) -> StepResult:
    """The step `release`: a bundle in `<step folder>/bundle`, a version in MLflow with the alias champion.

    The folder counts only after MLflow has the version, and the alias comes last: an interrupted release is done again, or promoted.
    """
    inputs = {
        "sessions": content_of(sessions),
        "semantic_ids": content_of(semantic_ids),
        "training": content_of(training),
        "evaluation": content_of(evaluation),
    }

    def work(out_uri: str) -> dict[str, Any]:
        report = storage.read_json(storage.join(evaluation, "report.json"))
        bundle_uri = storage.join(out_uri, BUNDLE)
        manifest = write_bundle(
            bundle_uri,
            config=run.config.public(),
            weights=storage.read_bytes(storage.join(training, "model.safetensors")),
            sids=storage.read_table(storage.join(semantic_ids, "sids.parquet")),
            catalogue=storage.read_table(storage.join(sessions, "catalogue.parquet")),
            coder=semantic_ids,
            metadata={"report": report, "inputs": inputs},
        )
        registry = Registry(run.config.tracking, run.config.workspace)
        made = {"sessions": sessions, "semantic_ids": semantic_ids, "training": training, "evaluation": evaluation}
        number = registry.register(
            bundle_uri,
            evaluation=inputs["evaluation"],
            metrics=_metrics(report),
            params={"run_id": run.run_id, "seed": str(run.config.seed), **inputs},
            files={
                "report.json": storage.read_bytes(storage.join(evaluation, "report.json")).decode(),
                "config.json": run.config.public().to_json(),
            },
            origin={"run_id": run.run_id, **made},
        )
        version = manifest.digest[:12]
        get_logger(STEP).info("registered", version=version, mlflow_version=number, mlflow=registry.address)
        return {"version": version, "mlflow_version": number}

    settings = {"tracking": run.config.tracking.model_dump(), "decoding": run.config.decoding.model_dump()}
    # Bundling copies what other steps made, so there is nothing to redo, and the folder may hold the live champion.
    release = partial(run_step, name=STEP, work=work, settings=settings, inputs=inputs, code=CODE)
    result = release(replace(run, fresh=False))
    registry = Registry(run.config.tracking, run.config.workspace)
    champion = registry.champion()
    if champion is not None and grown_of(champion.bundle_uri) == result.metadata["version"]:
        # The champion is this bundle with items that were added since: going back would lose them.
        folder = champion.bundle_uri.removesuffix(f"/{BUNDLE}")
        done = storage.open_committed(folder, verify=False).metadata
        grown = StepResult(STEP, folder, True, float(done["seconds"]), done)
        remember(run, grown)
        return grown
    return promoted(registry, result, lambda: release(replace(run, fresh=True)))


def promoted(registry: Registry, result: StepResult, again: Callable[[], StepResult]) -> StepResult:
    """The step, with its bundle as champion: it may have been finished, and another one promoted or the registry lost since.

    Args:
        registry: of the run.
        result: a finished release.
        again: releases once more, for a registry that does not know its version.
    """
    champion, uri = registry.champion(), storage.join(result.uri, BUNDLE)
    if champion is not None and champion.bundle_uri == uri:
        return result
    if not registry.has(result.metadata["mlflow_version"], uri):
        result = again()
    registry.promote(result.metadata["mlflow_version"])
    return result


def grown_of(bundle_uri: str) -> str:
    """Version of the bundle that this one was before items were added; empty if none were."""
    manifest = storage.read_manifest(bundle_uri)
    return str(manifest.metadata.get("grown_of", "")) if manifest else ""


def _metrics(report: dict[str, Any]) -> dict[str, float]:
    """Numbers of a report, one level flattened: `retriever/hr@10`."""
    flat = {name: value for name, value in report.items() if isinstance(value, int | float)}
    for method, figures in report.items():
        if isinstance(figures, dict):
            flat |= {f"{method}/{name}": value for name, value in figures.items() if isinstance(value, int | float)}
    return {name: float(value) for name, value in flat.items()}


if __name__ == "__main__":
    job_main(step, ("sessions", "semantic_ids", "training", "evaluation"))
