"""Two DDP workers on a real Ray cluster, one of them killed: the run resumes and ends where it would have ended."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from components.retriever.bundle import restore_model
from components.retriever.model import Retriever
from components.retriever.packing import Batch
from components.semantic_ids.table import codes_of
from components.training.data import epoch_batches, plan_batches, training_rows
from components.training.early_stopping import EarlyStopping
from components.training.job import train_retriever
from components.training.loop import build_model, build_optimizer
from infra import storage
from infra.errors import DataError
from tests.unit.components.training.small import configuration, sids, timelines, write_inputs

USERS, WORKERS, EPOCHS, STEPS = 60, 2, 4, 8  # 60 rows make 15 batches of 2 for each worker, 8 steps of two batches
# Nothing random is left within a step: no dropout, and no row has more predictions than the rank head takes.
CONFIG = configuration(
    f"training.workers={WORKERS}",
    f"training.epochs={EPOCHS}",
    "training.rows_per_batch=2",
    "training.accumulation_steps=2",
    "training.checkpoint_every_steps=5",
    "training.checkpoint_every_epochs=1",
    "training.loss.rsp_predictions=64",
)
LOSSES = ("loss", "ntp", "ldpo", "bce")


def averaged_by_hand(*, epochs: int) -> list[dict[str, float]]:
    """Mean losses of the first worker's batches, of DDP in one process: gradients averaged by hand."""
    rows = training_rows(timelines(users=USERS), CONFIG)
    model = build_model(CONFIG, sids())
    plan = plan_batches(rows, CONFIG, world_size=WORKERS)
    optimizer, schedule = build_optimizer(model, CONFIG, plan.steps)
    curve = []
    for epoch in range(epochs):
        workers = [epoch_batches(plan, epoch=epoch, seed=0, rank=rank) for rank in range(WORKERS)]
        first = []
        for batches in zip(*workers, strict=True):
            parts = [losses_of_a_worker(model, of_worker) for of_worker in batches]
            optimizer.zero_grad()
            (sum(part["loss"] for part in parts) / WORKERS).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG.training.grad_clip)
            optimizer.step()
            schedule.step()
            first.append({name: float(parts[0][name].detach()) for name in LOSSES})
        curve.append({name: sum(step[name] for step in first) / len(first) for name in LOSSES})
    return curve


def losses_of_a_worker(model: Retriever, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Of all batches of a step, by their counts."""
    counts = torch.stack([model.loss_counts(batch, CONFIG.training.loss) for batch in batches])
    found = [model(batch, CONFIG.training.loss, count / counts.sum(0)) for batch, count in zip(batches, counts, strict=True)]
    return {name: sum(part[name] for part in found) for name in LOSSES}


def is_a_worker(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # it ended since it was listed
        return False


def kill_a_worker_after_the_first_checkpoint(folder: Path, killed: list[dict[str, Any]], stop: threading.Event) -> None:
    while not stop.wait(0.02):
        # Ray lists a checkpoint here once it counts; the folder is there earlier.
        if (folder / "checkpoints" / "checkpoint_manager_snapshot.json").exists():
            states = sorted(folder.glob("checkpoints/checkpoint_*/state.json"))
            workers = [p for p in psutil.Process().children(recursive=True) if is_a_worker(p)]
            if states and workers:
                killed.append(storage.read_json(str(states[0]))["state"])
                workers[-1].kill()
                return


def test_a_run_with_a_killed_worker_ends_as_if_nothing_had_happened(ray_cluster: str, tmp_path: Path) -> None:
    sessions, table = write_inputs(tmp_path, users=USERS)
    out = tmp_path / "out"
    killed: list[dict[str, Any]] = []
    stop = threading.Event()
    killer = threading.Thread(target=kill_a_worker_after_the_first_checkpoint, args=(out, killed, stop))
    killer.start()
    try:
        figures = train_retriever(CONFIG, sessions, table, str(out))
    finally:
        stop.set()
        killer.join()

    assert killed, "the run ended before its first checkpoint was seen"
    assert sorted(path.name for path in out.iterdir()) == ["loss_curve.json", "model.safetensors"]
    curve = storage.read_json(str(out / "loss_curve.json"))
    assert curve[: killed[0]["epoch"]] == killed[0]["curve"]  # to the seconds: these epochs were not run again
    assert [point["epoch"] for point in curve] == list(range(1, EPOCHS + 1))
    train_retriever(CONFIG, sessions, table, str(tmp_path / "undisturbed"))
    expected = storage.read_json(str(tmp_path / "undisturbed" / "loss_curve.json"))
    for point, losses in zip(curve, expected, strict=True):
        assert {name: point[name] for name in LOSSES} == pytest.approx({name: losses[name] for name in LOSSES}, abs=1e-6)
    trained = load_file(out / "model.safetensors")
    for name, tensor in load_file(tmp_path / "undisturbed" / "model.safetensors").items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-6)
    # Sums in another order drift apart with the steps: gradients averaged by hand are compared over the first epoch.
    by_hand = averaged_by_hand(epochs=1)
    assert {name: curve[0][name] for name in LOSSES} == pytest.approx(by_hand[0], abs=1e-4)

    model = restore_model(CONFIG, codes_of(sids()), trained)
    assert figures["parameters"] == sum(p.numel() for p in model.parameters())
    assert (figures["rows"], figures["workers"], figures["epochs"], figures["steps"]) == (USERS, WORKERS, EPOCHS, EPOCHS * STEPS)
    assert {name: figures[name] for name in LOSSES} == {name: curve[-1][name] for name in LOSSES}


def test_workers_stop_together_and_the_best_weights_are_released(ray_cluster: str, tmp_path: Path) -> None:
    """With the settings of a large model: bfloat16, activations computed again, batches by tokens."""
    large = ("training.precision=bf16", "training.gradient_checkpointing=true", "training.tokens_per_batch=80")
    early = ("training.patience=1", "training.validation_k=3", "decoding.exclude_seen=false")
    config = configuration(f"training.workers={WORKERS}", "training.epochs=8", *large, *early)
    sessions, table = write_inputs(tmp_path, users=USERS)
    figures = train_retriever(config, sessions, table, str(tmp_path / "out"))
    rates = [point["hr@3"] for point in storage.read_json(str(tmp_path / "out" / "loss_curve.json"))]
    assert figures["epochs"] == len(rates)
    assert figures["released_epoch"] == 1 + rates.index(max(rates))
    assert len(rates) in (figures["released_epoch"] + 1, 8)
    released = restore_model(config, codes_of(sids()), load_file(tmp_path / "out" / "model.safetensors"))
    alone = EarlyStopping(config, timelines(users=USERS), sids())
    assert alone.judge(released, 1)["hr@3"] == pytest.approx(max(rates))


def test_an_error_that_no_retry_would_mend_is_raised_as_it_is(ray_cluster: str, tmp_path: Path) -> None:
    sessions, table = write_inputs(tmp_path, users=1, events=1)  # its only click is for validation
    with pytest.raises(DataError, match="no event is left") as caught:
        train_retriever(configuration("training.workers=1"), sessions, table, str(tmp_path / "out"))
    assert caught.value.where == sessions
