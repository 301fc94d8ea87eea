"""Fit the reward model on the signals of the log, and judge it (`python -m components.reward.job --config run.yaml --sessions URI`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from components.reward.baseline import fit_baseline, fit_current_rates
from components.reward.data import ITEM_PRIOR, Floats, Sessions, objectives_of, sessions_of
from components.reward.metrics import auc, calibration, roc
from components.reward.rates import mean_rates, smoothed_log_odds
from components.reward.report import render_page
from infra import records as r
from infra import storage
from infra.config import Config
from infra.logs import get_logger
from infra.steps import Run, StepResult, content_of, job_main, run_step

STEP = "reward"
CODE = (
    "components/reward",
    "components/semantic_ids/report.py",
    "components/semantic_ids/report.html.j2",
    "infra/records.py",
    "infra/svg.py",
)
WEIGHTS, REPORT, ROC, PAGE = "model.safetensors", "report.json", "roc.json", "report.html"


def fit_reward_model(config: Config, sessions_uri: str, out_uri: str) -> dict[str, Any]:
    """Fit, judge and write `model.safetensors`, `report.json`, `roc.json` and `report.html` below `out_uri`.

    A signal that all events of the training phase have, or none, cannot be foreseen: it is left out with the reason. Where the log
    names no signals there is nothing to fit, and the report says so.

    Returns:
        the report: `objectives` (name -> figures), `left_out` (name -> reason), counts.

    Raises:
        DataError: timelines without the signals that the configuration names.
        TrainingError: a loss that is not finite.
    """
    names = objectives_of(config)
    if not names:
        report: dict[str, Any] = {"no_signals": True, "objectives": {}, "left_out": {}}
        get_logger(STEP).info("skipped: the log names no signals; a reward model needs data.columns.signals")
        return _written(report, {}, {}, [], out_uri)
    timelines = storage.read_table(storage.join(sessions_uri, "timelines"))
    catalogue = storage.read_table(storage.join(sessions_uri, "catalogue.parquet"))
    data = sessions_of(timelines, config, names)
    left_out = _one_class_only(data, names)
    for name, reason in left_out.items():
        get_logger(STEP).warning("an objective is left out", objective=name, reason=reason)
    names = [name for name in names if name not in left_out]
    if not names:
        return _written({"no_signals": False, "objectives": {}, "left_out": left_out}, {}, {}, [], out_uri)
    if left_out:
        data = sessions_of(timelines, config, names)
    return _fit_and_judge(config, data, catalogue, names, left_out, out_uri)


def rate_tables(data: Sessions, n_items: int) -> dict[str, Floats]:
    """Log odds of each item [I, O] and the mean rates [O], of the training phase."""
    train = data.events_of(data.of_phase(r.Phase.TRAIN))
    rates_IO = smoothed_log_odds(data.items_E[train], data.labels_EO[train], n_items, prior=ITEM_PRIOR)
    return {"rates_IO": rates_IO, "mean_O": mean_rates(data.labels_EO[train]).astype(np.float32)}


def _one_class_only(data: Sessions, names: list[str]) -> dict[str, str]:
    labels_EO = data.labels_EO[data.events_of(data.of_phase(r.Phase.TRAIN))]
    found = {}
    for name, labels in zip(names, labels_EO.T, strict=True):
        known = labels[~np.isnan(labels)]
        if len(np.unique(known)) < 2:
            what = "no event" if len(known) == 0 else f"all {len(known)} events" if known[0] else f"none of {len(known)} events"
            found[name] = f"{what} of the training phase {'says anything of it' if len(known) == 0 else 'earned it'}"
    return found


def _fit_and_judge(
    config: Config, data: Sessions, catalogue: pa.Table, names: list[str], left_out: Mapping[str, str], out_uri: str
) -> dict[str, Any]:
    import torch
    from safetensors.torch import save

    from components.reward.fit import build_model, fit, score

    torch.set_num_threads(config.reward.threads)
    model = build_model(catalogue, config, len(names))
    progress = fit(model, data, config, out_uri)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    # What scoring other sessions needs beside the weights: rates of items, and the means that a user's own are relative to.
    weights |= {name: torch.from_numpy(array) for name, array in rate_tables(data, len(catalogue)).items()}
    storage.write_bytes(storage.join(out_uri, WEIGHTS), save(weights))
    test = data.of_phase(r.Phase.TEST)
    scores = score(model, data, test, config)
    events = data.events_of(test)
    objectives, curves, calibrations = {}, {}, {}
    for o, name in enumerate(names):
        labels, logits = scores.item_labels_EO[:, o], scores.item_logits_EO[:, o]
        baseline = fit_baseline(data, o)
        objectives[name] = {
            "auc": auc(labels, logits),
            "baseline_auc": auc(labels, baseline.scores_E[events]),
            "current_rates_auc": auc(labels, fit_current_rates(data, o)[events]),
            "session_auc": auc(scores.session_labels_SO[:, o], scores.session_logits_SO[:, o]),
            "lone_item_auc": _lone_items_auc(data, events, labels, logits),
            **_counts(labels),
            **{f"baseline_{key}": value for key, value in baseline.params.items()},
        }
        curves[name] = {"reward model": roc(labels, logits), "logistic regression": roc(labels, baseline.scores_E[events])}
        calibrations[name] = calibration(labels, 1 / (1 + np.exp(-logits)))
        get_logger(STEP).info("judged", objective=name, **{k: objectives[name][k] for k in ("auc", "baseline_auc", "positives")})
    report = {
        "no_signals": False,
        "objectives": objectives,
        "left_out": dict(left_out),
        "sessions": {phase.name.lower(): len(data.of_phase(phase)) for phase in r.Phase},
        "epochs": progress.epoch,
        "best_epoch": progress.best_epoch,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    return _written(report, curves, calibrations, progress.curve, out_uri)


def _lone_items_auc(data: Sessions, events: np.ndarray, labels: Floats, logits: Floats) -> float | None:
    """AUC of items that are a session of their own, where the number of its items can tell nothing."""
    lengths_S = data.ends_S - data.starts_S
    alone = np.repeat(lengths_S, lengths_S)[events] == 1
    return auc(labels[alone], logits[alone])


def _counts(labels: Floats) -> dict[str, int]:
    return {"positives": int(np.nansum(labels)), "events": int((~np.isnan(labels)).sum())}


def _written(
    report: dict[str, Any], curves: Mapping[str, Any], calibrations: Mapping[str, Any], losses: list[Any], out_uri: str
) -> dict[str, Any]:
    storage.write_json(storage.join(out_uri, REPORT), report)
    storage.write_json(storage.join(out_uri, ROC), curves)
    storage.write_bytes(storage.join(out_uri, PAGE), render_page(report, curves, calibrations, losses).encode())
    return report


def step(run: Run, sessions: str) -> StepResult:
    """The step `reward`: timelines with signals to a reward model and its report."""
    config = run.config
    settings = {
        "reward": config.reward.model_dump(exclude={"gate"}),
        "signals": list(config.data.columns.signals),
        "seed": config.seed,
    }
    return run_step(
        run,
        STEP,
        lambda out_uri: fit_reward_model(config, sessions, out_uri),
        settings=settings,
        inputs={"sessions": content_of(sessions)},
        code=CODE,
        resumable=True,
    )


if __name__ == "__main__":
    job_main(step, ("sessions",))
