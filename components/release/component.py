"""KFP face of the step `release`."""

from kfp import dsl

from infra.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def release_bundle(config: str, run_id: str, fresh: bool, sessions: str, semantic_ids: str, training: str, evaluation: str) -> str:
    """Bundle to the registry, alias champion; returns the step's folder."""
    from components.release.job import step
    from infra.kfp_run import step_process

    with step_process(config, run_id, fresh) as run:
        result = step(run, sessions, semantic_ids, training, evaluation)
    return result.uri
