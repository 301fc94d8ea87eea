"""The training loop, which knows nothing of Ray: model, optimizer, one step, one epoch after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from components.retriever.bundle import codes_of
from components.retriever.model import Retriever
from components.retriever.packing import Batch, Row
from components.training.data import epoch_batches, steps_per_epoch
from infra.config import Config
from infra.errors import TrainingError

Tell = Callable[[int, int, dict[str, Any]], None]


def build_model(config: Config, sids: pa.Table) -> Retriever:
    """A retriever with fresh weights for a SID table, seeded."""
    torch.manual_seed(config.seed)
    model = Retriever(config.retriever, codes_of(sids), n_codes=config.semantic_ids.codes, positive_level=config.split.positive_level)
    if config.training.loss.rsp_weight == 0:
        model.rank_head.requires_grad_(requires_grad=False)
    return model.train()


def build_optimizer(model: nn.Module, config: Config, steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW, and a warm-up followed by a cosine over all epochs of `steps` each; no decay on norms and biases."""
    training = config.training
    total, warmup = max(training.epochs * steps, 1), max(int(training.epochs * steps * training.warmup_fraction), 1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.98))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * min((step - warmup) / max(total - warmup, 1), 1.0)))))

    return optimizer, LambdaLR(optimizer, factor)


def build_average(model: nn.Module, config: Config) -> AveragedModel:
    """The exponential moving average of a model's weights over the steps, which is what gets released."""
    average = get_ema_multi_avg_fn(config.training.ema_decay)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=average)


def train_step(
    model: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    config: Config,
) -> dict[str, float]:
    """One optimizer step; returns the losses as numbers.

    Raises:
        TrainingError: the gradients are NaN or infinite.
    """
    device = next(model.parameters()).device
    parts = model(batch.to(device), config.training.loss)
    figures = {name: float(value.detach()) for name, value in parts.items()}
    optimizer.zero_grad(set_to_none=True)
    parts["loss"].backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.training.grad_clip)
    # Gradients are averaged over workers, so that all of them notice and none waits for the others.
    if not torch.isfinite(norm):
        raise TrainingError(f"the gradients are not finite, losses {figures}", where="training", mend="lower training.learning_rate")
    optimizer.step()
    schedule.step()
    return figures


def first_state() -> dict[str, Any]:
    """Where a new run stands: no epoch finished, an empty loss curve."""
    return {"epoch": 0, "steps": 0, "curve": []}


def run_epochs(
    model: nn.Module,
    average: AveragedModel,
    rows: Sequence[Row],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    config: Config,
    state: dict[str, Any],
    *,
    rank: int = 0,
    world_size: int = 1,
    tell: Tell | None = None,
) -> Iterator[dict[str, Any]]:
    """Train from where `state` stands to the last epoch.

    Args:
        model: wrapped in DDP where there are several workers.
        average: of `model`, updated after each step.
        rows: of all workers.
        state: of `first_state` or a checkpoint; not changed.
        rank: of this worker.
        world_size: workers.
        tell: called with (steps done, steps in all, figures) after each step.

    Yields:
        The state after each epoch: `epoch` (epochs finished), `steps` and `curve` (mean losses of each epoch).
    """
    training = config.training
    steps = steps_per_epoch(len(rows), rows_per_batch=training.rows_per_batch, world_size=world_size)
    for epoch in range(state["epoch"], training.epochs):
        # Seeded by the epoch, so that a resumed run draws the same dropout as one that was not disturbed.
        torch.manual_seed((config.seed * 10_007 + epoch) * 1_009 + rank)
        batches = epoch_batches(
            rows, rows_per_batch=training.rows_per_batch, epoch=epoch, seed=config.seed, rank=rank, world_size=world_size
        )
        start = time.monotonic()
        losses = []
        for done, batch in enumerate(batches, epoch * steps + 1):
            losses.append(train_step(model, batch, optimizer, schedule, config))
            average.update_parameters(model)
            if tell is not None:
                tell(done, training.epochs * steps, {"epoch": epoch + 1, "loss": round(losses[-1]["loss"], 3)})
        mean = {name: sum(step[name] for step in losses) / len(losses) for name in losses[0]}
        point = {"epoch": epoch + 1, "step": (epoch + 1) * steps, "seconds": round(time.monotonic() - start, 2), **mean}
        state = {"epoch": epoch + 1, "steps": (epoch + 1) * steps, "curve": [*state["curve"], point]}
        yield state
