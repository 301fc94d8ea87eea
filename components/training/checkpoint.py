"""Training state as safetensors and JSON: weights, AdamW moments, learning rates, steps. No pickle anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from components.training.early_stopping import EarlyStopping

WEIGHTS = "model.safetensors"
"""What is released: the averaged weights, of the best validation where there are validations."""
_AVERAGED = "averaged.safetensors"
_TRAINED = "trained.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as contiguous tensors on the CPU, aliases removed."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    average: AveragedModel,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    state: dict[str, Any],
    early_stopping: EarlyStopping | None = None,
) -> None:
    """Write everything that training needs to go on with the next step.

    Args:
        folder: made if need be.
        model: being trained.
        average: of its weights.
        optimizer: AdamW.
        schedule: of the learning rate.
        state: JSON values that `run_epochs` yielded.
        early_stopping: with the best weights so far.
    """
    folder.mkdir(parents=True, exist_ok=True)
    best = early_stopping and early_stopping.best_weights
    save_file(best or trained_state(average.module), folder / WEIGHTS)
    if best:
        save_file(trained_state(average.module), folder / _AVERAGED)
    save_file(trained_state(model), folder / _TRAINED)
    saved = optimizer.state_dict()
    moments = {
        f"{index}.{name}": value.detach().cpu().contiguous() for index, entry in saved["state"].items() for name, value in entry.items()
    }
    save_file(moments, folder / _OPTIMIZER)
    # The groups hold the learning rate of the next step: the schedule alone would bring it back one step late.
    rest = {
        "state": state,
        "param_groups": saved["param_groups"],
        "schedule": schedule.state_dict(),
        "early_stopping": early_stopping and early_stopping.state(),
    }
    (folder / _STATE).write_text(json.dumps(rest))


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    average: AveragedModel,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    early_stopping: EarlyStopping | None = None,
) -> dict[str, Any]:
    """Inverse of `save_checkpoint`; returns its `state`."""
    model.load_state_dict(load_file(folder / _TRAINED))
    released, has_best = load_file(folder / WEIGHTS), (folder / _AVERAGED).exists()
    average.module.load_state_dict(load_file(folder / _AVERAGED) if has_best else released)
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(folder / _OPTIMIZER).items():
        index, _, name = key.partition(".")
        moments.setdefault(int(index), {})[name] = value
    rest = json.loads((folder / _STATE).read_text())
    optimizer.load_state_dict({"state": moments, "param_groups": rest["param_groups"]})
    schedule.load_state_dict(rest["schedule"])
    average.n_averaged.fill_(rest["state"]["steps"])
    if early_stopping is not None:
        early_stopping.restore(rest["early_stopping"], released if has_best else None)
    return dict(rest["state"])
