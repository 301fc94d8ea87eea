"""Fit the reward model: epochs over the sessions of the training phase, the weights with the lowest loss of the validation phase kept.

A checkpoint after each epoch holds weights, moments and losses in one safetensors file, so that an interrupted fit goes on from there.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load, save
from torch import Tensor

from components.reward.data import Floats, Ints, Sessions, collate, epoch_batches, session_labels
from components.reward.model import RewardModel, Shape, reward_loss, tensors_of
from infra import records as r
from infra import storage
from infra.config import Config
from infra.errors import TrainingError
from infra.logs import ProgressMeter, get_logger

CHECKPOINT = "checkpoint.safetensors"
_STATE = "state"
_WARMUP = 0.1
_SCORED_TOGETHER = 1024


@dataclass
class Progress:
    """Where a fit stands.

    Attributes:
        epoch: finished ones.
        curve: of each, the mean loss of training and that of validation; None where there is nothing to validate on.
        best_epoch: whose weights are kept; 0 before the first.
    """

    epoch: int = 0
    curve: list[dict[str, float | None]] = field(default_factory=list)
    best_epoch: int = 0

    @property
    def best_loss(self) -> float:
        """Of the validation phase."""
        best = self.curve[self.best_epoch - 1]["valid"] if self.best_epoch else None
        return math.inf if best is None else best


@dataclass(frozen=True)
class Scores:
    """What a model says of some sessions, beside what came of them.

    Attributes:
        item_logits_EO: of each item in its session.
        item_labels_EO: what it earned.
        session_logits_SO: of each session.
        session_labels_SO: whether one of its items earned it.
    """

    item_logits_EO: Floats
    item_labels_EO: Floats
    session_logits_SO: Floats
    session_labels_SO: Floats


def build_model(catalogue: pa.Table, config: Config, objectives: int) -> RewardModel:
    """A model with fresh weights, seeded."""
    torch.manual_seed(config.seed)
    categories, category_of_I = np.unique(np.asarray(catalogue[r.CATEGORY].to_pylist(), dtype=str), return_inverse=True)
    model = RewardModel(Shape(len(catalogue), len(categories), objectives), config.reward)
    model.category_of_I.copy_(torch.from_numpy(category_of_I))
    return model


def fit(model: RewardModel, data: Sessions, config: Config, out_uri: str) -> Progress:
    """Fit until the last epoch, or until `patience` epochs brought no lower loss; the model ends with the best weights.

    Where no session lies in the validation phase, all epochs are done and the last weights kept.

    Args:
        model: of `build_model`.
        data: all sessions.
        config: `reward` and `seed` are used.
        out_uri: where the checkpoint lies while fitting.

    Raises:
        TrainingError: a loss that is not finite.
    """
    reward, checkpoint = config.reward, storage.join(out_uri, CHECKPOINT)
    train, valid = data.of_phase(r.Phase.TRAIN), data.of_phase(r.Phase.VALID)
    optimizer = torch.optim.AdamW(model.parameters(), lr=reward.learning_rate, weight_decay=reward.weight_decay, fused=True)
    progress, best = Progress(), _weights(model)
    if storage.exists(checkpoint):
        progress, best = _restore(storage.read_bytes(checkpoint), model, optimizer)
        get_logger("reward").info("an interrupted fit is continued", epoch=progress.epoch)
    meter = ProgressMeter(reward.epochs, step="reward", unit="epochs", already=progress.epoch)
    while progress.epoch < reward.epochs and progress.epoch - progress.best_epoch < reward.patience:
        loss = run_epoch(model, data, train, optimizer, config, epoch=progress.epoch)
        validated = validation_loss(model, data, valid, config) if len(valid) else None
        if not math.isfinite(loss + (validated or 0.0)):
            raise TrainingError(f"the loss is not finite: {loss}", where="reward", mend="lower reward.learning_rate")
        progress.epoch += 1
        progress.curve.append({"train": loss, "valid": validated})
        if validated is None or validated < progress.best_loss:
            progress.best_epoch, best = progress.epoch, _weights(model)
        storage.write_bytes(checkpoint, _saved(progress, best, model, optimizer))
        meter.advance(loss=round(loss, 4), valid=validated and round(validated, 4))
    meter.close()
    model.load_state_dict(best)
    storage.remove(checkpoint)
    return progress


def run_epoch(model: RewardModel, data: Sessions, train: Ints, optimizer: torch.optim.Optimizer, config: Config, *, epoch: int) -> float:
    """One pass over the sessions; what is random in it depends on seed and number of the epoch alone. Returns the mean loss."""
    reward = config.reward
    torch.manual_seed((config.seed << 16) + epoch + 1)
    model.train()
    steps = -(-len(train) // reward.batch)
    total = 0.0
    for step, sessions in enumerate(epoch_batches(data, train, size=reward.batch, seed=(config.seed, epoch))):
        for group in optimizer.param_groups:
            group["lr"] = reward.learning_rate * _rate_factor(epoch * steps + step, reward.epochs * steps)
        batch = tensors_of(collate(data, sessions, max_behaviour=reward.max_behaviour))
        loss = reward_loss(model(batch), batch)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += float(loss.detach()) * len(sessions)
    return total / len(train)


def _rate_factor(step: int, total: int) -> float:
    """Of the learning rate: a warm-up, then a cosine to 0 at the last step."""
    warmup = max(int(total * _WARMUP), 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


@torch.no_grad()
def validation_loss(model: RewardModel, data: Sessions, sessions: Ints, config: Config) -> float:
    """Mean loss of some sessions."""
    model.eval()
    total = 0.0
    for part in epoch_batches(data, sessions, size=_SCORED_TOGETHER, seed=None):
        batch = tensors_of(collate(data, part, max_behaviour=config.reward.max_behaviour))
        total += float(reward_loss(model(batch), batch)) * len(part)
    return total / len(sessions)


@torch.no_grad()
def score(model: RewardModel, data: Sessions, sessions: Ints, config: Config) -> Scores:
    """Logits and labels of some sessions and of their items, in the order of `Sessions.events_of`."""
    model.eval()
    starts = np.cumsum(data.ends_S[sessions] - data.starts_S[sessions])
    places = dict(zip(sessions.tolist(), range(len(sessions)), strict=True))
    events, objectives = int(starts[-1]) if len(sessions) else 0, data.labels_EO.shape[1]
    found = Scores(*(np.empty((rows, objectives), np.float32) for rows in (events, events, len(sessions), len(sessions))))
    for part in epoch_batches(data, sessions, size=_SCORED_TOGETHER, seed=None):
        batch = collate(data, part, max_behaviour=config.reward.max_behaviour)
        of_items, of_sessions = (logits.numpy() for logits in model(tensors_of(batch)))
        at_B = np.asarray([places[session] for session in part.tolist()], dtype=np.int64)
        lengths_B = batch.is_item_BN.sum(axis=1)
        at_BN = (starts[at_B] - lengths_B)[:, None] + np.arange(batch.is_item_BN.shape[1])
        found.item_logits_EO[at_BN[batch.is_item_BN]] = of_items[batch.is_item_BN]
        found.item_labels_EO[at_BN[batch.is_item_BN]] = batch.labels_BNO[batch.is_item_BN]
        found.session_logits_SO[at_B] = of_sessions
        found.session_labels_SO[at_B] = session_labels(batch.labels_BNO)
    return found


def _weights(model: RewardModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}


def _saved(progress: Progress, best: dict[str, Tensor], model: RewardModel, optimizer: torch.optim.Optimizer) -> bytes:
    moments = {f"{index}.{name}": value for index, entry in optimizer.state_dict()["state"].items() for name, value in entry.items()}
    tensors = {_STATE: torch.tensor(list(json.dumps(asdict(progress)).encode()), dtype=torch.uint8)}
    for prefix, part in (("best", best), ("model", _weights(model)), ("moments", moments)):
        tensors |= {f"{prefix}.{name}": tensor for name, tensor in part.items()}
    return save(tensors)


def _restore(content: bytes, model: RewardModel, optimizer: torch.optim.Optimizer) -> tuple[Progress, dict[str, Tensor]]:
    parts: dict[str, dict[str, Any]] = {"best": {}, "model": {}, "moments": {}}
    tensors = load(content)
    progress = Progress(**json.loads(bytes(tensors.pop(_STATE).tolist())))
    for key, tensor in tensors.items():
        prefix, _, name = key.partition(".")
        parts[prefix][name] = tensor
    model.load_state_dict(parts["model"])
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in parts["moments"].items():
        index, _, name = key.partition(".")
        moments.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return progress, parts["best"]
