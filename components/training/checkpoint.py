"""Training state as safetensors and JSON: weights, AdamW moments, epoch. No pickle anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS = "model.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as contiguous tensors on the CPU, aliases removed."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Write everything that training needs to go on at the start of the next epoch.

    Args:
        state: JSON values, `epoch` (epochs finished) and the loss curve among them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(trained_state(model), folder / WEIGHTS)
    moments = {
        f"{index}.{name}": value.detach().cpu().contiguous()
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }
    save_file(moments, folder / _OPTIMIZER)
    (folder / _STATE).write_text(json.dumps(state))


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Inverse of `save_checkpoint`; returns its `state`."""
    model.load_state_dict(load_file(folder / WEIGHTS))
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(folder / _OPTIMIZER).items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return dict(json.loads((folder / _STATE).read_text()))
