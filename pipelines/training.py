"""The training pipeline: raw logs to served slates, a step each. Compiling it imports neither torch nor ray."""

from collections.abc import Callable
from functools import partial
from typing import Any

from kfp import dsl

from components.evaluation.component import decide_promotion, evaluate_retriever
from components.precompute.component import precompute_slates
from components.release.component import release_bundle
from components.reward.component import fit_reward_model
from components.semantic_ids.component import build_semantic_ids, check_semantic_ids
from components.sessions.component import prepare_sessions
from components.training.component import train_retriever
from infra.image import IMAGE
from pipelines.component import report_outcome, validate_parameters
from pipelines.placement import DEFAULT, Placement

Place = Callable[..., dsl.PipelineTask]


def walk(place: Place, run: dict[str, Any]) -> None:
    """The steps from logs to slates; the last two only for a model that passed the gate.

    Args:
        place: puts a task where it is to run.
        run: arguments that all steps have: config, run_id, fresh.
    """
    sessions = place(prepare_sessions(**run), size="heavy")
    built = place(build_semantic_ids(**run, sessions=sessions.outputs["Output"]), size="heavy")
    sids = place(check_semantic_ids(**run, semantic_ids=built.outputs["Output"]))
    # Beside semantic IDs and training: it needs the timelines alone.
    reward = place(fit_reward_model(**run, sessions=sessions.outputs["Output"]), size="heavy")
    weights = place(train_retriever(**run, sessions=sessions.outputs["Output"], semantic_ids=sids.output), size="gpu")
    made = {"sessions": sessions.outputs["Output"], "semantic_ids": sids.output, "training": weights.outputs["Output"]}
    report = place(evaluate_retriever(**run, **made), size="gpu")
    judged = {"evaluation": report.outputs["Output"], "reward": reward.outputs["Output"]}
    gate = place(decide_promotion(**run, semantic_ids=sids.output, training=made["training"], **judged))
    # The local runner resolves conditions on an output of the name "Output" only, so the decision is the gate's sole value.
    with dsl.If(gate.outputs["Output"] == True, name="promoted"):  # noqa: E712 - an expression of the DSL
        release = place(release_bundle(**run, **made, evaluation=report.outputs["Output"]))
        place(precompute_slates(**run, sessions=made["sessions"], release=release.outputs["Output"]), size="gpu")


def build(placement: Placement, *, name: str, description: str, refresh: bool) -> Any:
    """A pipeline around `walk`: parameters checked first, the outcome reported last, whatever happens."""

    @dsl.pipeline(name=name, description=description)
    def pipeline(
        preset: str = "small",
        logs_uri: str = "",
        items_uri: str = "",
        overrides: list[str] = [],  # noqa: B006 - KFP copies it into the compiled file
        dry_run: bool = False,
        image: str = IMAGE,
        fresh: bool = False,
        run_id: str = "",
        config: str = "",
    ) -> None:
        """Logs to slates.

        Args:
            preset: settings to start from: tiny, small, beauty, kuairand or paper.
            logs_uri: events, a Parquet, CSV or JSONL file or folder, as s3://bucket/path.
            items_uri: the catalogue, in the same formats; empty makes items of the log alone.
            overrides: single settings, such as ["workspace=s3://bucket/rankgr", "training.epochs=30"].
            dry_run: check the parameters and the data, and do nothing.
            image: container image of the steps.
            fresh: redo steps that were finished before with the same inputs, settings and code.
            run_id: names the records of this run in the workspace; empty takes the id of the run.
            config: all settings as JSON, below the other parameters, as `rankgr config show --json` prints them.
        """
        place = partial(placement.place, image=image)
        given = {"preset": preset, "logs_uri": logs_uri, "items_uri": items_uri, "overrides": overrides, "config": config}
        given |= {"run_id": run_id, "job_id": dsl.PIPELINE_JOB_ID_PLACEHOLDER}
        with dsl.ExitHandler(place(report_outcome(**given)), name="run"):
            checked = place(validate_parameters(**given, refresh=refresh, fresh=fresh))
            with dsl.If(dry_run == False, name="to-be-done"):  # noqa: E712 - an expression of the DSL
                walk(place, {"config": checked.outputs["config"], "run_id": checked.outputs["run_id"], "fresh": fresh})

    return pipeline


def training_pipeline(placement: Placement = DEFAULT) -> Any:
    """Logs to a model trained from scratch, judged, released and served from slates."""
    description = "Logs to timelines, semantic IDs, weights, reward model, report, gate, release and slates."
    return build(placement, name="rankgr-training", description=description, refresh=False)
