"""Train the retriever on Ray Train: DDP workers, a checkpoint every few epochs or steps, resumed after a failure.

`python -m components.training.job --config run.yaml --sessions URI --semantic_ids URI` is what `ray job submit` runs.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from infra import storage
from infra.cluster import kill_local_actors, ray_session, unwrap
from infra.config import Config
from infra.errors import ConfigError, DataError, RankGRError, TrainingError, describe, raise_described
from infra.logs import get_logger
from infra.progress import remote_progress
from infra.sections import TrainingConfig
from infra.steps import Run, StepResult, content_of, job_main, run_step, step_folder

if TYPE_CHECKING:
    from torch import nn

    from components.training.early_stopping import EarlyStopping

# What brings torch is imported where it is used: a finished step is skipped without it.
STEP = "training"
CODE = (
    "components/training",
    "components/retriever",
    "components/semantic_ids/table.py",
    "components/semantic_ids/trie.py",
    "infra/records.py",
)
WEIGHTS, CURVE = "model.safetensors", "loss_curve.json"
_RUN = "checkpoints"
_TELL_EVERY = 5
_WAKE_S = 0.5
_END_S = 30


def train_retriever(config: Config, sessions_uri: str, sids_uri: str, out_uri: str) -> dict[str, Any]:
    """Train and write `model.safetensors` and `loss_curve.json` below `out_uri`.

    Needs a Ray connection. An interrupted run in the same folder goes on from its last checkpoint.

    Returns:
        parameters, rows, steps, workers, the last losses and, with `patience`, the last HR and which epoch is released.

    Raises:
        TrainingError: a loss that is not finite, or workers that failed more than `max_failures` times.
    """
    import ray.train
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    training = config.training
    if storage.exists(storage.join(out_uri, _RUN, "checkpoint_manager_snapshot.json")):
        get_logger(STEP).info("an interrupted run is continued from its last checkpoint")
    arguments = {"config": config.to_json(), "sessions": sessions_uri, "sids": sids_uri}
    # Ray's own S3 driver takes other settings from the environment than ours.
    storage_fs, storage_path = (None, out_uri) if storage.is_local(out_uri) else storage.arrow_filesystem(out_uri)
    with remote_progress(step=STEP, unit="steps") as progress:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={**arguments, "progress": progress},
            torch_config=TorchConfig(backend="nccl" if training.use_gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=training.workers, use_gpu=training.use_gpu, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(
                name=_RUN,
                storage_path=storage_path,
                storage_filesystem=storage_fs,
                failure_config=FailureConfig(max_failures=training.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
            ),
        )
        try:
            result = _fit(trainer)
        except ray.train.TrainingFailedError as error:
            ours = unwrap(error)
            if isinstance(ours, RankGRError):
                raise ours from None
            last = [line for line in str(error).splitlines() if line.strip()][-1]
            raise TrainingError(f"training failed: {last}", where="Ray Train", mend="see Ray's logs; run again to resume") from error
    if result.return_value:
        raise_described(result.return_value)
    assert result.checkpoint is not None and result.metrics is not None
    with result.checkpoint.as_directory() as folder:
        storage.write_bytes(storage.join(out_uri, WEIGHTS), (Path(folder) / WEIGHTS).read_bytes())
    metrics = dict(result.metrics)
    storage.write_json(storage.join(out_uri, CURVE), metrics.pop("curve"))
    storage.remove(storage.join(out_uri, _RUN))
    return metrics


def _fit(trainer: Any) -> Any:
    """`trainer.fit()` off the main thread: there, Ray Train would make Ctrl-C a clean exit with status 0."""
    outcome: list[Any] = []
    ended = threading.Event()

    def run() -> None:
        try:
            outcome.append(trainer.fit())
        except BaseException as error:
            outcome.append(error)
        finally:
            ended.set()

    try:
        threading.Thread(target=run, daemon=True).start()
        # Not `join`: interrupted, it takes the thread for ended (Python 3.11). With a limit: the kernel may hand a signal to any
        # thread, and Python sees it when the main one wakes up.
        while not ended.wait(_WAKE_S):
            pass
    except KeyboardInterrupt:
        # A thread that still waits for Ray while Ray shuts down makes Ray end the process, in its own way: it goes first.
        # More than once: a process that renames itself just then has no name to be found by.
        deadline = time.monotonic() + _END_S
        while not ended.wait(_WAKE_S) and time.monotonic() < deadline:
            kill_local_actors("TrainController")
        raise
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _worker(arguments: Mapping[str, Any]) -> dict[str, str] | None:
    """What each DDP worker runs; errors that every worker meets alike are returned, not raised: no retry would help."""
    try:
        _train(arguments)
    except (ConfigError, DataError, TrainingError) as error:
        return describe(error)
    return None


def _train(arguments: Mapping[str, Any]) -> None:
    import ray.train
    import ray.train.torch
    import torch

    from components.training.checkpoint import load_checkpoint, save_checkpoint
    from components.training.data import plan_batches, training_rows
    from components.training.early_stopping import EarlyStopping
    from components.training.loop import build_average, build_model, build_optimizer, first_state, run_epochs
    from components.training.warm_start import start_from_bundle

    config = Config.from_json(arguments["config"])
    training, context = config.training, ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(training.threads_per_worker)
    timelines = storage.read_table(storage.join(arguments["sessions"], "timelines"))
    rows = training_rows(timelines, config)
    if not rows:
        raise DataError("no event is left to train on", where=arguments["sessions"], mend="give more data, or another split")
    sids = storage.read_table(storage.join(arguments["sids"], "sids.parquet"))
    early = EarlyStopping(config, timelines, sids, rank=rank, world_size=world_size) if training.patience else None
    # On its device before optimizer and average are made: a checkpoint is loaded to where the weights are.
    model = build_model(config, sids, codebooks_of(config, arguments["sids"])).to(ray.train.torch.get_device())
    if training.start_from:
        start_from_bundle(model, sids, config)
    steps = plan_batches(rows, config, world_size=world_size).steps
    optimizer, schedule = build_optimizer(model, config, steps)
    average = build_average(model, config)
    state = first_state()
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state = load_checkpoint(Path(folder), model, average, optimizer, schedule, early)
        get_logger(STEP).info("resumed", epoch=state["epoch"], steps=state["steps"])
    # Our buffers are constants (SIDs); by default DDP would send them with every step.
    ddp = ray.train.torch.prepare_model(model, parallel_strategy_kwargs={"forward_sync_buffers": False})

    def tell(done: int, total: int, figures: dict[str, Any]) -> None:
        if rank == 0 and (done % _TELL_EVERY == 0 or done == total):
            arguments["progress"].set.remote(done, total, figures)

    if rank == 0:
        arguments["progress"].set.remote(state["steps"], training.epochs * steps, {})
    places = {"rank": rank, "world_size": world_size}
    for reached in run_epochs(ddp, average, rows, optimizer, schedule, config, state, **places, tell=tell, early_stopping=early):
        if _is_checkpoint_due(reached, training):
            with tempfile.TemporaryDirectory() as folder:
                if rank == 0:
                    save_checkpoint(Path(folder), model, average, optimizer, schedule, reached, early)
                saved = ray.train.Checkpoint.from_directory(folder) if rank == 0 else None
                figures = _metrics(model, reached, early, rows=len(rows), workers=world_size)
                ray.train.report(figures, checkpoint=saved)


def codebooks_of(config: Config, sids_uri: str) -> npt.NDArray[np.float32] | None:
    """The codebooks [M, K, F] that the SIDs came from, for `codeword_init: codebooks`; None where nothing starts from them."""
    from components.semantic_ids.job import read_codebooks

    return None if config.retriever.codeword_init == "random" else np.asarray(read_codebooks(sids_uri), dtype=np.float32)


def _is_checkpoint_due(state: Mapping[str, Any], training: TrainingConfig) -> bool:
    is_within_an_epoch = bool(state["sums"])
    is_the_end = state["epoch"] == training.epochs or state["stopped"]
    return is_within_an_epoch or is_the_end or state["epoch"] % training.checkpoint_every_epochs == 0


def _metrics(model: nn.Module, state: Mapping[str, Any], early: EarlyStopping | None, *, rows: int, workers: int) -> dict[str, Any]:
    curve = state["curve"]
    last = curve[-1] if curve else {}
    return {
        "epochs": state["epoch"],
        "steps": state["steps"],
        "rows": rows,
        "workers": workers,
        "parameters": sum(p.numel() for p in model.parameters()),
        **{name: value for name, value in last.items() if name in ("loss", "ntp", "ldpo", "bce") or name.startswith("hr@")},
        **({"released_epoch": early.best_epoch} if early else {}),
        "curve": curve,
    }


def step(run: Run, sessions: str, semantic_ids: str) -> StepResult:
    """The step `training`: timelines and SIDs to weights."""
    config = run.config

    def work(out_uri: str) -> dict[str, Any]:
        with ray_session(config.cluster):
            return train_retriever(config, sessions, semantic_ids, out_uri)

    identity = _identity(config, content_of(sessions), content_of(semantic_ids))
    return run_step(run, STEP, work, **identity, resumable=True)


def finished(config: Config, sessions: str, semantic_ids: str) -> storage.Manifest | None:
    """What the step made before with these settings of timelines and SIDs with this content; None if it has not."""
    return storage.read_manifest(step_folder(config.workspace, STEP, **_identity(config, sessions, semantic_ids)))


def _identity(config: Config, sessions: str, semantic_ids: str) -> dict[str, Any]:
    """What decides whether the step is the same work."""
    settings = {
        "training": config.training.model_dump(),
        "retriever": config.retriever.model_dump(),
        "positive_level": config.split.positive_level,
        "seed": config.seed,
        "validated_with": config.decoding.model_dump() if config.training.patience else None,
    }
    return {"settings": settings, "inputs": {"sessions": sessions, "semantic_ids": semantic_ids}, "code": CODE}


if __name__ == "__main__":
    job_main(step, ("sessions", "semantic_ids"))
