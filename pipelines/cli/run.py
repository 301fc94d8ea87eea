"""`rankgr run`, `refresh`, `train`, `evaluate`, `precompute`: the pipeline, whole or up to a step."""

from __future__ import annotations

import sys

from components.precompute import job as precompute_job
from components.sessions import job as sessions_job
from infra import storage
from infra.config import Config
from infra.errors import DataError
from infra.steps import Run, StepResult, remember_run
from infra.tracking import Registry
from pipelines.cli.common import ConfigFile, DryRun, Fresh, Items, Logs, Overrides, Preset, announce, settings_of
from pipelines.cli.show import print_figures
from pipelines.local_run import local_services, new_run_id, run_pipeline

_STEPS = ["sessions", "semantic_ids", "training", "evaluation", "reward", "gate", "release", "precompute"]


def run(
    logs: Logs = None,
    items: Items = None,
    config: ConfigFile = None,
    preset: Preset = None,
    overrides: Overrides = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
) -> None:
    """Run the whole pipeline on this machine: logs to timelines, SIDs, weights, reward model, report, gate, release, slates.

    Example: `rankgr run --preset kuairand --logs interactions.parquet --items items.parquet`
    """
    _walk(settings_of(config, preset, overrides, logs=logs, items=items), fresh=fresh, dry_run=dry_run)


def refresh(
    logs: Logs = None,
    items: Items = None,
    config: ConfigFile = None,
    preset: Preset = None,
    overrides: Overrides = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
) -> None:
    """Run the pipeline on newer logs from the champion on: its SIDs are kept, new items join, training goes on from its weights.

    Example: `rankgr refresh --preset kuairand --logs all_events.parquet --items items.parquet`
    """
    _walk(settings_of(config, preset, overrides, logs=logs, items=items), fresh=fresh, dry_run=dry_run, refresh=True)


def _walk(given: Config, *, fresh: bool, dry_run: bool, refresh: bool = False) -> None:
    settings = checked(given)
    if dry_run:
        announce(settings, [f"run the step {name}" for name in _STEPS])
        return
    run_id = new_run_id()
    with local_services(settings):
        records = run_pipeline(settings, run_id=run_id, fresh=fresh, refresh=refresh)
    print_figures(settings, records)


def train(
    logs: Logs = None,
    items: Items = None,
    config: ConfigFile = None,
    preset: Preset = None,
    overrides: Overrides = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
) -> None:
    """Do the steps up to the weights; finished ones are skipped.

    Example: `rankgr train --config run.yaml --set training.epochs=3`
    """
    settings = checked(settings_of(config, preset, overrides, logs=logs, items=items))
    if dry_run:
        announce(settings, [f"run the step {name}" for name in _STEPS[:3]])
        return
    with local_services(settings, redis=False):
        sys.stdout.write(f"{_trained(Run(settings, new_run_id(), fresh))['training'].uri}\n")


def evaluate(
    logs: Logs = None,
    items: Items = None,
    config: ConfigFile = None,
    preset: Preset = None,
    overrides: Overrides = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
) -> None:
    """Do the steps up to the report, print the figures against the baselines; finished steps are skipped.

    Example: `rankgr evaluate --config run.yaml --set decoding.score=rsp`
    """
    from components.evaluation import job as evaluation_job

    settings = checked(settings_of(config, preset, overrides, logs=logs, items=items))
    if dry_run:
        announce(settings, [f"run the step {name}" for name in _STEPS[:4]])
        return
    with local_services(settings, redis=False):
        run = Run(settings, new_run_id(), fresh)
        steps = _trained(run)
        made = {name: steps[name].uri for name in ("sessions", "semantic_ids", "training")}
        steps["evaluation"] = evaluation_job.step(run, **made)
    remember_run(settings.workspace, run.run_id)
    print_figures(settings, steps)


def precompute(
    config: ConfigFile = None, preset: Preset = None, overrides: Overrides = None, fresh: Fresh = False, dry_run: DryRun = False
) -> None:
    """Compute the champion's slates for all users of the run that released it and make them the active ones.

    Example: `rankgr precompute --set slate_store.url=redis://localhost:6379/0`
    """
    from components.release.job import BUNDLE

    settings = settings_of(config, preset, overrides)
    champion = Registry(settings.tracking, settings.workspace).require_champion()
    if "sessions" not in champion.origin:
        mend = "rankgr run, until another model is promoted"
        raise DataError("the timelines that the champion came from are not known", where=champion.bundle_uri, mend=mend)
    run_id, sessions, release = champion.origin["run_id"], champion.origin["sessions"], champion.bundle_uri.removesuffix(f"/{BUNDLE}")
    if dry_run:
        version = storage.open_committed(release, verify=False).metadata["version"]
        announce(settings, [f"publish the slates of {version} for the users of run {run_id}"])
        return
    with local_services(settings):
        result = precompute_job.step(Run(settings, run_id, fresh), sessions, release)
    sys.stdout.write(f"{result.metadata['users']} users, version {result.metadata['version']}\n")


def checked(settings: Config) -> Config:
    """Find what is wrong with the logs before anything is started."""
    sessions_job.check_sources(settings.data)
    return settings


def _trained(run: Run) -> dict[str, StepResult]:
    from components.semantic_ids import job as semantic_ids_job
    from components.training import job as training_job

    sessions = sessions_job.step(run)
    sids = semantic_ids_job.step(run, sessions.uri)
    return {"sessions": sessions, "semantic_ids": sids, "training": training_job.step(run, sessions.uri, sids.uri)}
