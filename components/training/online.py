"""Incremental training: one optimizer step on the rows that came, with the losses, clipping and average of the offline loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.retriever.model import Retriever
from components.retriever.packing import Row
from components.training.checkpoint import load_checkpoint, save_checkpoint, trained_state
from components.training.data import epoch_batches, plan_batches
from components.training.loop import build_average, build_optimizer, for_training, noise_seed, train_step
from components.training.replay import ReplayBuffer
from infra.config import Config
from infra.errors import TrainingError
from infra.logs import get_logger

_MEMORY = 0.9  # of the running mean of the loss, a step


def for_stream(config: Config) -> Config:
    """The same with `training` as it is for incremental steps: what `streaming` says of rate, average and weights holds."""
    streaming, training = config.streaming, config.training
    changed: dict[str, Any] = {"learning_rate": streaming.learning_rate, "schedule": "constant", "warmup_fraction": 0.0}
    changed["ema_decay"] = training.ema_decay if streaming.ema_decay is None else streaming.ema_decay
    if streaming.ntp_level_weights is not None:
        changed["loss"] = training.loss.model_copy(update={"ntp_level_weights": streaming.ntp_level_weights})
    return config.model_copy(update={"training": training.model_copy(update=changed)})


class OnlineLearner:
    """A model that goes on learning at a constant rate, with a replay buffer.

    Args:
        model: released weights, where its average starts too.
        config: `training` as offline but for the schedule; `streaming`.

    Attributes:
        steps: optimizer steps done.
        skipped: steps that were not, since their gradients were not finite.
        loss: its running mean before each step, so on rows that were not trained on yet; None at the beginning.
    """

    def __init__(self, model: Retriever, config: Config) -> None:
        self._config = for_stream(config)
        self.model = for_training(model, self._config)
        self._released = [parameter.detach().clone() for parameter in model.parameters()]
        self._average = build_average(model, self._config)
        self._average.n_averaged.fill_(1)  # it goes on from the released weights
        self._optimizer, self._schedule = build_optimizer(model, self._config, 1)
        self.replay = ReplayBuffer(config.streaming.replay_rows, config.seed)
        self._turn, self.steps, self.skipped = 0, 0, 0
        self.loss: float | None = None

    def learn(self, rows: Sequence[Row]) -> dict[str, float] | None:
        """One step on new rows and on earlier ones, after which the new ones are among these.

        Returns:
            the losses; None where the step was skipped, since its gradients were not finite.
        """
        share = self._config.streaming.replay_share
        earlier = self.replay.sample(round(len(rows) * share / (1 - share)), self._turn)
        plan = plan_batches([*rows, *earlier], self._config)
        (batches,) = epoch_batches(replace(plan, accumulate=len(plan.ends)), epoch=self._turn, seed=self._config.seed)
        torch.manual_seed(noise_seed(self._config, 0, self._turn + 1, 0))
        self._turn += 1
        try:
            losses = train_step(self.model, batches, self._optimizer, self._schedule, self._config)
        except TrainingError as error:
            self.skipped += 1
            get_logger("stream").warning("a step was skipped", why=error.what, skipped=self.skipped)
            return None
        self._average.update_parameters(self.model)
        self.steps += 1
        self.loss = losses["loss"] if self.loss is None else _MEMORY * self.loss + (1 - _MEMORY) * losses["loss"]
        self.replay.add(rows)
        return losses

    def drift(self) -> float:
        """Distance of the weights from the released ones, relative to the length of these."""
        with torch.no_grad():
            moved = sum(float((now - then).square().sum()) for now, then in zip(self.model.parameters(), self._released, strict=True))
            length = sum(float(then.square().sum()) for then in self._released)
        return float((moved / length) ** 0.5)

    def averaged(self) -> dict[str, Tensor]:
        """A copy of the averaged weights, which are what is released."""
        return trained_state(self._average.module)

    def released(self, weights: Mapping[str, Tensor]) -> None:
        """Measure drift from other weights."""
        names = [name for name, _ in self.model.named_parameters()]
        self._released = [weights[name].to(then.device) for name, then in zip(names, self._released, strict=True)]

    def save(self, folder: Path) -> None:
        """Write weights, average, optimizer, replay buffer and counts."""
        state: dict[str, Any] = {"steps": self.steps, "turn": self._turn, "skipped": self.skipped, "loss": self.loss}
        save_checkpoint(folder, self.model, self._average, self._optimizer, self._schedule, state)
        self.replay.save(folder)

    def load(self, folder: Path) -> None:
        """Inverse of `save`, but for the learning rate: that of the settings holds, which may have changed since."""
        state = load_checkpoint(folder, self.model, self._average, self._optimizer, self._schedule)
        rate = self._config.training.learning_rate
        self._schedule.base_lrs = [rate] * len(self._schedule.base_lrs)
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] = rate
        self.steps, self._turn, self.skipped, self.loss = (state[name] for name in ("steps", "turn", "skipped", "loss"))
        self._average.n_averaged.fill_(self.steps + 1)
        self.replay.load(folder)
