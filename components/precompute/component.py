"""KFP face of the step `precompute`."""

from kfp import dsl

from infra.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def precompute_slates(config: str, run_id: str, fresh: bool, sessions: str, release: str, metrics: dsl.Output[dsl.Metrics]) -> str:
    """Slates of all users to Redis, activated last; returns the step's folder."""
    from components.precompute.job import step
    from infra.kfp_run import lineage, on_ray, step_process

    with step_process("precompute", config, run_id, fresh) as run:
        result = on_ray(run, step, sessions=sessions, release=release)
    metrics.metadata.update(lineage(run, result))
    metrics.log_metric("users", result.metadata["users"])
    return result.uri
