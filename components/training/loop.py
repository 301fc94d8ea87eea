"""The training loop, which knows nothing of Ray: model, optimizer, one step, one epoch after the other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from components.retriever.codeword_init import start_from_codebooks
from components.retriever.model import Retriever
from components.retriever.packing import Batch, Row
from components.semantic_ids.table import codes_of
from components.training.data import epoch_batches, plan_batches
from components.training.early_stopping import EarlyStopping
from infra.config import Config
from infra.errors import TrainingError
from infra.sections import LossConfig, TrainingConfig

Tell = Callable[[int, int, dict[str, Any]], None]


def build_model(config: Config, sids: pa.Table, codebooks_MKF: npt.NDArray[np.float32] | None = None) -> Retriever:
    """A retriever with fresh weights for a SID table, seeded; `codeword_init: codebooks` wants those the SIDs came from."""
    torch.manual_seed(config.seed)
    model = Retriever(config.retriever, codes_of(sids), n_codes=config.semantic_ids.codes, positive_level=config.split.positive_level)
    if config.retriever.codeword_init == "codebooks":
        assert codebooks_MKF is not None
        start_from_codebooks(model, codebooks_MKF)
    return for_training(model, config)


def for_training(model: Retriever, config: Config) -> Retriever:
    """The model in training mode; what no loss reaches is frozen."""
    if config.training.loss.rsp_weight == 0:
        model.rank_head.requires_grad_(requires_grad=False)
    if config.training.gradient_checkpointing:
        backbone: Any = model.backbone
        backbone.activation_checkpointing_enable()
        backbone.disable_input_require_grads()  # asked for by reentrant checkpointing only, and wrong while decoding
    return model.train()


def build_optimizer(model: nn.Module, config: Config, steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW, and a warm-up followed by the schedule over all epochs of `steps` each; no decay on norms and biases."""
    training = config.training
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.98), fused=True)
    return optimizer, LambdaLR(optimizer, _rate_factor(training, training.epochs * steps))


def _rate_factor(training: TrainingConfig, total: int) -> Callable[[int], float]:
    warmup = max(int(total * training.warmup_fraction), 1)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min((step - warmup) / max(total - warmup, 1), 1.0)
        return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[training.schedule]

    return factor


def build_average(model: nn.Module, config: Config) -> AveragedModel:
    """The exponential moving average of a model's weights over the steps, which is what gets released."""
    average = get_ema_multi_avg_fn(config.training.ema_decay)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=average)


def train_step(
    model: nn.Module,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    config: Config,
) -> dict[str, float]:
    """One optimizer step on the batches of a worker, with the gradients of one batch that holds all their rows.

    Each part of the loss is a mean over targets, so that a batch counts by its share of them (`Retriever.loss_counts`). Over
    workers, DDP takes the plain mean of these losses.

    Returns:
        the losses.

    Raises:
        TrainingError: the gradients are NaN or infinite.
    """
    loss, device = config.training.loss, next(model.parameters()).device
    batches = [batch.to(device) for batch in batches]
    optimizer.zero_grad(set_to_none=True)
    figures: dict[str, float] = {}
    for number, (batch, share) in enumerate(zip(batches, _shares(model, batches, loss), strict=True), 1):
        with _without_exchange(model, skip=number < len(batches)):
            with torch.autocast(device.type, torch.bfloat16, enabled=config.training.precision == "bf16"):
                parts = model(batch, loss, share)
            parts["loss"].backward()
        for name, value in parts.items():
            figures[name] = figures.get(name, 0.0) + float(value.detach())
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.training.grad_clip)
    # Gradients are averaged over workers, so that all of them notice and none waits for the others.
    if not torch.isfinite(norm):
        raise TrainingError(f"the gradients are not finite, losses {figures}", where="training", mend="lower training.learning_rate")
    optimizer.step()
    schedule.step()
    return figures


def _shares(model: nn.Module, batches: Sequence[Batch], loss: LossConfig) -> list[Tensor | None]:
    """Of each batch, its part of the counts of all of them; None for one that is alone."""
    if len(batches) == 1:
        return [None]
    retriever: Any = model.module if isinstance(model, DistributedDataParallel) else model
    counts = torch.stack([retriever.loss_counts(batch, loss) for batch in batches])
    return list(counts / counts.sum(0).clamp_min(torch.finfo(counts.dtype).tiny))


def _without_exchange(model: nn.Module, *, skip: bool) -> AbstractContextManager[None]:
    """Workers exchange gradients once a step, with the last batch."""
    return model.no_sync() if skip and isinstance(model, DistributedDataParallel) else nullcontext()


def first_state() -> dict[str, Any]:
    """Where a new run stands: no epoch finished, no step done, an empty loss curve."""
    return {"epoch": 0, "steps": 0, "curve": [], "sums": {}, "seconds": 0.0, "stopped": False}


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
    early_stopping: EarlyStopping | None = None,
) -> Iterator[dict[str, Any]]:
    """Train from where `state` stands to the last epoch, or to where early stopping ends it.

    Args:
        model: wrapped in DDP where there are several workers.
        average: of `model`, updated after each step.
        rows: of all workers.
        state: of `first_state` or a checkpoint; not changed.
        rank: of this worker.
        world_size: workers.
        tell: called with (steps done, steps in all, figures) after each step.
        early_stopping: judges the averaged weights.

    Yields:
        The state after each epoch, and every `checkpoint_every_steps` within one: `epoch` (epochs finished), `steps`, `curve`
        (mean losses of each epoch), `sums` and `seconds` of the epoch that is not finished yet, `stopped` (for good).
    """
    training, plan = config.training, plan_batches(rows, config, world_size=world_size)
    state = {**first_state(), **state}
    for epoch in range(state["epoch"], training.epochs):
        if state["stopped"]:
            return
        first, begun = epoch * plan.steps, state["steps"] - epoch * plan.steps
        sums, start = dict(state["sums"]), time.monotonic() - state["seconds"]
        torch.manual_seed(noise_seed(config, epoch, begun, rank))
        for done, batches in enumerate(epoch_batches(plan, epoch=epoch, seed=config.seed, rank=rank, skip=begun), begun + 1):
            losses = train_step(model, batches, optimizer, schedule, config)
            sums = {name: sums.get(name, 0.0) + value for name, value in losses.items()}
            average.update_parameters(model)
            if tell is not None:
                tell(first + done, training.epochs * plan.steps, {"epoch": epoch + 1, "loss": round(losses["loss"], 3)})
            if training.checkpoint_every_steps and (first + done) % training.checkpoint_every_steps == 0 and done < plan.steps:
                yield {**state, "steps": first + done, "sums": sums, "seconds": time.monotonic() - start}
                torch.manual_seed(noise_seed(config, epoch, done, rank))
        point = {"epoch": epoch + 1, "step": first + plan.steps, "seconds": round(time.monotonic() - start, 2)}
        point |= {name: total / plan.steps for name, total in sums.items()}
        stopped = False
        if early_stopping is not None and early_stopping.is_due(epoch + 1):
            point |= early_stopping.judge(cast(Retriever, average.module), epoch + 1)
            stopped = early_stopping.exhausted
        state = {**first_state(), "epoch": epoch + 1, "steps": first + plan.steps, "curve": [*state["curve"], point], "stopped": stopped}
        yield state


def noise_seed(config: Config, epoch: int, done: int, rank: int) -> int:
    """Seed of dropout from a place on where a run may resume: it then draws the same as one that was not disturbed."""
    if done:
        return int(np.random.SeedSequence((config.seed, epoch, done, rank)).generate_state(1)[0])
    return (config.seed * 10_007 + epoch) * 1_009 + rank
