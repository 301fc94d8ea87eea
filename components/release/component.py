"""KFP face of the step `release`."""

from kfp import dsl

from infra.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def release_bundle(
    config: str, run_id: str, fresh: bool, sessions: str, semantic_ids: str, training: str, evaluation: str, model: dsl.Output[dsl.Model]
) -> str:
    """Bundle to the registry, alias champion; returns the step's folder. The artifact names the bundle, and version and run in MLflow."""
    import json
    from pathlib import Path

    from components.release.job import BUNDLE, step
    from infra import storage
    from infra.kfp_run import lineage, step_process
    from infra.tracking import Registry

    with step_process("release", config, run_id, fresh) as run:
        result = step(run, sessions, semantic_ids, training, evaluation)
        registry, number = Registry(run.config.tracking, run.config.workspace), result.metadata["mlflow_version"]
        model.metadata.update(lineage(run, result), bundle=storage.join(result.uri, BUNDLE))
        model.metadata["mlflow_model"] = f"{run.config.tracking.model_name}/{number}"
        model.metadata.update(mlflow_run=registry.run_of(number), mlflow_page=registry.page_of(number))
    Path(model.path).write_text(json.dumps(model.metadata), "utf-8")
    return result.uri
