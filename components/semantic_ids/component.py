"""KFP face of the step `semantic_ids`."""

from kfp import dsl

from infra.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def build_semantic_ids(config: str, run_id: str, fresh: bool, sessions: str, metrics: dsl.Output[dsl.Metrics]) -> str:
    """Item features to codebooks and the SID table; returns the step's folder."""
    from components.semantic_ids.job import step
    from infra.kfp_run import step_process

    with step_process(config, run_id, fresh) as run:
        result = step(run, sessions)
    for name in ("items", "collision_rate", "largest_bucket", "reconstruction_error"):
        metrics.log_metric(name, result.metadata[name])
    return result.uri
