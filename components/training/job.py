"""Train the retriever on Ray Train: DDP workers, a checkpoint every few epochs, resumed after a failure.

`python -m components.training.job --config run.yaml --sessions URI --sids URI --out URI` is what `ray job submit` runs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from components.retriever.bundle import codes_of
from components.retriever.model import Retriever
from components.training.checkpoint import WEIGHTS, load_checkpoint, save_checkpoint
from components.training.data import epoch_batches, steps_per_epoch, training_rows
from infra import storage
from infra.cluster import ray_session
from infra.config import Config
from infra.errors import DataError, ServiceError, TrainingError
from infra.logs import get_logger
from infra.progress import remote_progress
from infra.steps import Run, StepResult, content_of, job_main, run_step

STEP = "training"
CODE = ("components/training", "components/retriever", "components/semantic_ids")
CURVE = "loss_curve.json"
_RUN = "checkpoints"
_TELL_EVERY = 5


def train_retriever(config: Config, sessions_uri: str, sids_uri: str, out_uri: str) -> dict[str, Any]:
    """Train and write `model.safetensors` and `loss_curve.json` below `out_uri`.

    Needs a Ray connection. An interrupted run in the same folder goes on from its last checkpoint.

    Returns:
        parameters, rows, steps, workers and the last losses.

    Raises:
        TrainingError: a loss that is not finite, or workers that failed more than `max_failures` times.
    """
    import ray.train
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    training = config.training
    arguments = {"config": config.to_json(), "sessions": sessions_uri, "sids": sids_uri}
    with remote_progress(step=STEP, unit="steps") as progress:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={**arguments, "progress": progress},
            torch_config=TorchConfig(backend="nccl" if training.use_gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=training.workers, use_gpu=training.use_gpu, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(
                name=_RUN,
                storage_path=_absolute(out_uri),
                failure_config=FailureConfig(max_failures=training.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
            ),
        )
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _cause(error) from error
    assert result.checkpoint is not None and result.metrics is not None
    with result.checkpoint.as_directory() as folder:
        storage.write_bytes(storage.join(out_uri, WEIGHTS), (Path(folder) / WEIGHTS).read_bytes())
    metrics = dict(result.metrics)
    storage.write_json(storage.join(out_uri, CURVE), metrics.pop("curve"))
    storage.remove(storage.join(out_uri, _RUN))
    return metrics


def _worker(arguments: Mapping[str, Any]) -> None:
    """What each DDP worker runs."""
    import ray.train
    import ray.train.torch

    config = Config.from_json(arguments["config"])
    training, context = config.training, ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(training.threads_per_worker)
    rows = training_rows(storage.read_table(storage.join(arguments["sessions"], "timelines")), config)
    if not rows:
        raise DataError("no event is left to train on", where=arguments["sessions"], mend="give more data, or another split")
    model = build_model(config, arguments["sids"])
    optimizer, schedule = build_optimizer(
        model, config, steps_per_epoch(len(rows), rows_per_batch=training.rows_per_batch, world_size=world_size)
    )
    state: dict[str, Any] = {"epoch": 0, "curve": []}
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state = load_checkpoint(Path(folder), model, optimizer)
        schedule.last_epoch = state["steps"]
        get_logger(STEP).info("resumed", epoch=state["epoch"])
    ddp = ray.train.torch.prepare_model(model)
    steps = steps_per_epoch(len(rows), rows_per_batch=training.rows_per_batch, world_size=world_size)
    total = training.epochs * steps
    for epoch in range(state["epoch"], training.epochs):
        # Seeded by the epoch, so that a resumed run draws the same dropout as one that was not disturbed.
        torch.manual_seed((config.seed * 10_007 + epoch) * 1_009 + rank)
        batches = epoch_batches(
            rows, rows_per_batch=training.rows_per_batch, epoch=epoch, seed=config.seed, rank=rank, world_size=world_size
        )
        start = time.monotonic()
        losses = []
        for index, batch in enumerate(batches, epoch * steps + 1):
            losses.append(train_step(ddp, batch, optimizer, schedule, config))
            if rank == 0 and (index % _TELL_EVERY == 0 or index == total):
                figures = {"epoch": epoch + 1, "loss": round(losses[-1]["loss"], 3)}
                arguments["progress"].set.remote(index, total, figures)
        mean = {name: sum(step[name] for step in losses) / len(losses) for name in losses[0]}
        state["curve"].append({"epoch": epoch + 1, "step": (epoch + 1) * steps, "seconds": round(time.monotonic() - start, 2), **mean})
        state |= {"epoch": epoch + 1, "steps": (epoch + 1) * steps}
        last = epoch + 1 == training.epochs
        if last or (epoch + 1) % training.checkpoint_every_epochs == 0:
            _report(model, optimizer, state, rows=len(rows), workers=world_size, is_first=rank == 0)


def build_model(config: Config, sids_uri: str) -> Retriever:
    """A retriever with fresh weights for a SID table, seeded."""
    sids = storage.read_table(storage.join(sids_uri, "sids.parquet"))
    torch.manual_seed(config.seed)
    model = Retriever(config.retriever, codes_of(sids), n_codes=config.semantic_ids.codes, positive_level=config.split.positive_level)
    if config.training.loss.rsp_weight == 0:
        model.rank_head.requires_grad_(requires_grad=False)
    return model.train()


def build_optimizer(model: nn.Module, config: Config, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
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

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_step(
    ddp: nn.Module,
    batch: Any,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    config: Config,
) -> dict[str, float]:
    """One optimizer step; returns the losses as numbers.

    Raises:
        TrainingError: the loss is NaN or infinite.
    """
    device = next(ddp.parameters()).device
    parts = ddp(batch.to(device), config.training.loss)
    figures = {name: float(value) for name, value in parts.items()}
    if not all(abs(value) < float("inf") for value in figures.values()):
        raise TrainingError(f"the loss is not finite: {figures}", where="training", mend="lower training.learning_rate")
    optimizer.zero_grad(set_to_none=True)
    parts["loss"].backward()
    nn.utils.clip_grad_norm_(ddp.parameters(), config.training.grad_clip)
    optimizer.step()
    schedule.step()
    return figures


def _report(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], *, rows: int, workers: int, is_first: bool) -> None:
    import ray.train

    curve = state["curve"]
    metrics = {
        "epochs": state["epoch"],
        "steps": state["steps"],
        "rows": rows,
        "workers": workers,
        "parameters": sum(p.numel() for p in model.parameters()),
        **{name: curve[-1][name] for name in curve[-1] if name in ("loss", "ntp", "ldpo", "bce")},
        "curve": curve,
    }
    if not is_first:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), model, optimizer, state)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _absolute(uri: str) -> str:
    return str(Path(uri).resolve()) if storage.is_local(uri) else uri


def _cause(error: BaseException) -> Exception:
    """The error of ours behind a failure of Ray Train, or a `TrainingError` that quotes it."""
    seen: BaseException | None = error
    text = str(error)
    while seen is not None:
        for candidate in (seen, *getattr(seen, "worker_failures", {}).values()):
            inner = getattr(candidate, "cause", candidate)
            if isinstance(inner, (DataError, ServiceError, TrainingError)):
                return inner
        seen = seen.__cause__
    last = [line for line in text.splitlines() if line.strip()][-1:]
    return TrainingError(f"training failed: {' '.join(last)}", where="Ray Train", mend="see the log above; run again to resume")


def step(run: Run, sessions: str, semantic_ids: str) -> StepResult:
    """The step `training`: timelines and SIDs to weights."""
    config = run.config

    def work(out_uri: str) -> dict[str, Any]:
        with ray_session(config.cluster):
            return train_retriever(config, sessions, semantic_ids, out_uri)

    settings = {
        "training": config.training.model_dump(),
        "retriever": config.retriever.model_dump(),
        "positive_level": config.split.positive_level,
        "seed": config.seed,
    }
    inputs = {"sessions": content_of(sessions), "semantic_ids": content_of(semantic_ids)}
    return run_step(run, STEP, work, settings=settings, inputs=inputs, code=CODE, resumable=True)


if __name__ == "__main__":
    job_main(step, ("sessions", "semantic_ids"))
