"""KFP face of the step `semantic_ids`."""

from kfp import dsl

from infra.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def build_semantic_ids(
    config: str, run_id: str, fresh: bool, sessions: str, metrics: dsl.Output[dsl.Metrics], page: dsl.Output[dsl.HTML]
) -> str:
    """Item features to codebooks and the SID table, held against its limits; returns the step's folder."""
    from pathlib import Path

    from components.semantic_ids.job import PAGE, check_limits, step
    from infra import storage
    from infra.kfp_run import step_process

    with step_process(config, run_id, fresh) as run:
        result = step(run, sessions, hold_to_limits=False)
        for name in ("items", "collision_rate", "largest_bucket", "moved", "reconstruction_error"):
            metrics.log_metric(name, result.metadata[name])
        for name in ("utilisation", "perplexity", "gini"):
            for level, value in enumerate(result.metadata[name]):
                metrics.log_metric(f"{name} of level {level + 1}", value)
        Path(page.path).write_bytes(storage.read_bytes(storage.join(result.uri, PAGE)))
        check_limits(result, run.config.semantic_ids)
    return result.uri
