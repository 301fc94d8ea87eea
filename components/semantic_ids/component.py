"""KFP faces of the step `semantic_ids` and of its gate."""

from kfp import dsl

from infra.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def build_semantic_ids(
    config: str, run_id: str, fresh: bool, sessions: str, metrics: dsl.Output[dsl.Metrics], page: dsl.Output[dsl.HTML]
) -> str:
    """Item features to codebooks and the SID table, with figures and a report; returns the step's folder."""
    from pathlib import Path

    from components.semantic_ids.job import PAGE, step
    from infra import storage
    from infra.kfp_run import lineage, on_ray, step_process

    with step_process("semantic_ids", config, run_id, fresh) as run:
        result = on_ray(run, step, sessions=sessions, hold_to_limits=False)
        metrics.metadata.update(lineage(run, result))
        for name in ("items", "collision_rate_before", "collision_rate", "largest_bucket", "moved", "reconstruction_error"):
            metrics.log_metric(name, result.metadata[name])
        for name in ("utilisation", "perplexity", "gini", "entropy", "conditional_entropy"):
            for level, value in enumerate(result.metadata[name]):
                metrics.log_metric(f"{name} of level {level + 1}", value)
        Path(page.path).write_bytes(storage.read_bytes(storage.join(result.uri, PAGE)))
    return result.uri


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def check_semantic_ids(config: str, run_id: str, fresh: bool, semantic_ids: str) -> str:
    """Hold SIDs against their limits, in a task of its own so that figures and report of those refused are kept; returns the folder."""
    from components.semantic_ids.job import check_limits, result_of
    from infra.kfp_run import step_process

    with step_process("semantic_ids_check", config, run_id, fresh) as run:
        check_limits(result_of(semantic_ids), run.config.semantic_ids)
    return semantic_ids
