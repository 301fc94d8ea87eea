"""KFP face of the step `sessions`."""

from kfp import dsl

from infra.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def prepare_sessions(config: str, run_id: str, fresh: bool, metrics: dsl.Output[dsl.Metrics]) -> str:
    """Raw logs to per-user timelines and the catalogue; returns the step's folder."""
    from components.sessions.job import step
    from infra.kfp_run import lineage, on_ray, step_process

    with step_process("sessions", config, run_id, fresh) as run:
        result = on_ray(run, step)
    metrics.metadata.update(lineage(run, result))
    for name, value in result.metadata.items():
        if isinstance(value, int | float):
            metrics.log_metric(name, value)
    return result.uri
