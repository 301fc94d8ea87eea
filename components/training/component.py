"""KFP face of the step `training`."""

from kfp import dsl

from infra.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train_retriever(config: str, run_id: str, fresh: bool, sessions: str, semantic_ids: str, metrics: dsl.Output[dsl.Metrics]) -> str:
    """Timelines and SIDs to the weights of the retriever; returns the step's folder."""
    from components.training.job import step
    from infra.kfp_run import lineage, on_ray, step_process

    with step_process("training", config, run_id, fresh) as run:
        result = on_ray(run, step, sessions=sessions, semantic_ids=semantic_ids)
    metrics.metadata.update(lineage(run, result))
    for name in ("loss", "ntp", "ldpo", "bce", "epochs", "parameters"):
        if name in result.metadata:
            metrics.log_metric(name, result.metadata[name])
    return result.uri
