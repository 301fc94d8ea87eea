"""KFP faces of the steps `evaluation` and `gate`."""

from kfp import dsl

from infra.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate_retriever(
    config: str, run_id: str, fresh: bool, sessions: str, semantic_ids: str, training: str, metrics: dsl.Output[dsl.Metrics]
) -> str:
    """Retriever against popularity and item-kNN by one protocol; returns the step's folder."""
    from components.evaluation.job import step
    from infra.kfp_run import lineage, on_ray, step_process

    with step_process("evaluation", config, run_id, fresh) as run:
        result = on_ray(run, step, sessions=sessions, semantic_ids=semantic_ids, training=training)
    metrics.metadata.update(lineage(run, result))
    for method in ("retriever", "item_knn", "popularity"):
        for name, value in result.metadata[method].items():
            metrics.log_metric(f"{method} {name}", value)
    return result.uri


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def decide_promotion(
    config: str, run_id: str, fresh: bool, semantic_ids: str, training: str, evaluation: str, reward: str, report: dsl.Output[dsl.HTML]
) -> bool:
    """Reports, champion and policy to a decision: may the model become champion? Shows the report of the run."""
    from pathlib import Path

    from components.evaluation.gate_job import PAGE, step
    from infra import storage
    from infra.kfp_run import lineage, step_process

    with step_process("gate", config, run_id, fresh) as run:
        result = step(run, semantic_ids, training, evaluation, reward)
    report.metadata.update(lineage(run, result))
    Path(report.path).write_bytes(storage.read_bytes(storage.join(result.uri, PAGE)))
    return bool(result.metadata["promoted"])
