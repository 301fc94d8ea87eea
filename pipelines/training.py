"""The training pipeline: raw logs to served slates, a step each. Compiling it imports neither torch nor ray."""

from kfp import dsl

from components.evaluation.component import decide_promotion, evaluate_retriever
from components.precompute.component import precompute_slates
from components.release.component import release_bundle
from components.reward.component import fit_reward_model
from components.semantic_ids.component import build_semantic_ids, check_semantic_ids
from components.sessions.component import prepare_sessions
from components.training.component import train_retriever


def _task(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Steps skip finished work themselves, by content; KFP's cache would only see equal URIs."""
    task.set_caching_options(enable_caching=False)
    return task


@dsl.pipeline(
    name="rankgr-training", description="Logs to timelines, semantic IDs, weights, reward model, report, gate, release and slates."
)
def training_pipeline(config: str, run_id: str = "manual", fresh: bool = False) -> None:
    """Train, judge, release.

    Args:
        config: all settings as JSON, as `rankgr config show --json` prints them.
        run_id: names the records of this run in the workspace.
        fresh: redo steps that were finished before with the same inputs, settings and code.
    """
    run = {"config": config, "run_id": run_id, "fresh": fresh}
    sessions = _task(prepare_sessions(**run))
    built = _task(build_semantic_ids(**run, sessions=sessions.outputs["Output"]))
    sids = _task(check_semantic_ids(**run, semantic_ids=built.outputs["Output"]))
    # Beside semantic IDs and training: it needs the timelines alone.
    reward = _task(fit_reward_model(**run, sessions=sessions.outputs["Output"]))
    weights = _task(train_retriever(**run, sessions=sessions.outputs["Output"], semantic_ids=sids.output))
    made = {"sessions": sessions.outputs["Output"], "semantic_ids": sids.output, "training": weights.outputs["Output"]}
    report = _task(evaluate_retriever(**run, **made))
    judged = {"evaluation": report.outputs["Output"], "reward": reward.outputs["Output"]}
    gate = _task(decide_promotion(**run, semantic_ids=made["semantic_ids"], training=made["training"], **judged))
    # The local runner resolves conditions on an output of the name "Output" only, so the decision is the gate's sole value.
    with dsl.If(gate.outputs["Output"] == True, name="promoted"):  # noqa: E712 - an expression of the DSL
        release = _task(release_bundle(**run, **made, evaluation=report.outputs["Output"]))
        _task(precompute_slates(**run, sessions=made["sessions"], release=release.output))
