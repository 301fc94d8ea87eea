"""KFP face of the step `reward`."""

from kfp import dsl

from infra.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def fit_reward_model(
    config: str,
    run_id: str,
    fresh: bool,
    sessions: str,
    metrics: dsl.Output[dsl.Metrics],
    roc: dsl.Output[dsl.ClassificationMetrics],
    page: dsl.Output[dsl.HTML],
) -> str:
    """Sessions to a reward model with its AUCs, the ROC curve of the first objective and a report; returns the step's folder."""
    from pathlib import Path

    from components.reward.job import PAGE, ROC, step
    from infra import storage
    from infra.kfp_run import lineage, on_ray, step_process

    with step_process("reward", config, run_id, fresh) as run:
        result = on_ray(run, step, sessions=sessions)
        metrics.metadata.update(lineage(run, result))
        for name, figures in result.metadata["objectives"].items():
            for key in ("auc", "baseline_auc", "session_auc", "positives"):
                if figures[key] is not None:
                    metrics.log_metric(f"{name} {key}", figures[key])
        curves = storage.read_json(storage.join(result.uri, ROC))
        points = next(iter(curves.values()))["reward model"] if curves else {"fpr": []}
        if points["fpr"]:
            roc.log_roc_curve(points["fpr"], points["tpr"], points["threshold"])
        Path(page.path).write_bytes(storage.read_bytes(storage.join(result.uri, PAGE)))
    return result.uri
