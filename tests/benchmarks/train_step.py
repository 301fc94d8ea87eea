"""One optimizer step against `transformers.Trainer`: `python -m tests.benchmarks.train_step [--quick] [--device cpu|cuda]`.

The same Qwen2, users and targets for all: each item of a history is a target behind the items before it, and AdamW with
clipped gradients takes one step on the next-token loss of all of them.

- Ours: `components.training.loop.train_step`, all targets of a user in one packed row.
- The peer, as sequence recommenders are commonly trained: a sequence for each target. At full strength: sequences of like
  length share a batch, logits are made at the predicting positions alone, gradients are accumulated to the same step.
- The same positions: the Trainer on as many tokens as our rows have, as a plain language model with a label everywhere. It
  learns nothing like the same (no requests, no levels, no losses between items), but shows what a step costs beside.

Then, on the CPU, the throughput of two DDP workers over that of one, gloo processes with one thread each. Only on idle cores can
the second worker gain; the CPU time of a worker beside it says what the exchange of gradients costs.

Shapes: B sequences, N positions, M levels, D hidden width.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen2ForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from components.retriever.model import Retriever
from components.retriever.packing import Batch, Row, collate
from components.training.loop import build_optimizer, train_step
from infra.config import Config, load_config
from tests.benchmarks.packing import TOLERANCE, tiny_model
from tests.benchmarks.timing import announce, clock_for, console, finish, milliseconds, parse, table, times

_USERS, _ITEMS_A_USER = 8, 50
_SEQUENCES_A_BATCH = 16  # the fastest of 8, 16, 40 and 100


def configuration() -> Config:
    """The next-token loss alone, which is all that the Trainer has."""
    return load_config(
        overrides=[
            "training.loss.alpha=0",
            "training.loss.rsp_weight=0",
            "decoding.score=iap",
            "training.loss.ntp_level_weights={3: 1.0}",
            "training.warmup_fraction=0",
        ]
    )


def user_rows(model: Retriever, users: int, items: int, seed: int = 0) -> list[Row]:
    """Users who clicked so many random items, one a request; each is a target, the last one no history."""
    rng = np.random.default_rng(seed)
    order = np.arange(items)
    rows = []
    for _ in range(users):
        clicked = rng.integers(0, len(model.sid_codes), items)
        rows.append(Row(clicked[:-1], np.full(items - 1, 3), clicked, np.full(items, 3), order, order))
    return rows


def language_model(model: Retriever) -> Qwen2ForCausalLM:
    """Transformers' own model with the retriever's weights, input and output embedding one table."""
    config = type(model.backbone.config).from_dict({**model.backbone.config.to_dict(), "tie_word_embeddings": True})
    config._attn_implementation = "sdpa"
    peer = Qwen2ForCausalLM(config)
    peer.model.load_state_dict(model.backbone.state_dict())
    peer.tie_weights()
    return peer


def sequences(model: Retriever, rows: Sequence[Row]) -> list[dict[str, list[int]]]:
    """One a target, in the order of length: [BOS], the codewords before it, its own but the last; labels are its codewords."""
    found, sid_codes = [], model.sid_codes.cpu()
    for row in rows:
        tokens = (sid_codes[row.target_items] + model.first_token + torch.arange(model.n_levels) * model.n_codes).tolist()
        read = [model.first_token - 1]
        for own in tokens:
            found.append({"input_ids": [*read, *own[:-1]], "labels": own})
            read = [*read, *own]
    return sorted(found, key=lambda sequence: len(sequence["input_ids"]))


def padded(items: Sequence[dict[str, list[int]]]) -> dict[str, Tensor | int]:
    """A batch for the Trainer, padded on the left, so that the predicting positions are the last ones of every sequence."""
    longest = max(len(item["input_ids"]) for item in items)
    missing = [longest - len(item["input_ids"]) for item in items]
    labels = torch.tensor([item["labels"] for item in items])
    batch: dict[str, Tensor | int] = {
        "input_ids": torch.tensor([[0] * n + item["input_ids"] for n, item in zip(missing, items, strict=True)]),
        "labels": labels,
        "shift_labels": labels,
        "logits_to_keep": labels.shape[1],
    }
    if any(missing):
        batch["attention_mask"] = torch.tensor([[0] * n + [1] * (longest - n) for n in missing])
    return batch


def whole(items: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A batch of plain language modelling: a label everywhere."""
    tokens = torch.tensor([item["input_ids"] for item in items])
    return {"input_ids": tokens, "labels": tokens}


def logits_difference(model: Retriever, rows: Sequence[Row]) -> float:
    """Largest difference between the logits of packed rows and those of the peer's padded sequences, targets taken in turn."""
    device = model.sid_codes.device
    peer, batch = language_model(model).to(device), collate(rows).to(device)
    found = sequences(model, rows)
    with torch.no_grad():
        packed = model.target_logits(model.encode(batch, model.sid_codes[batch.target_items_BP]), batch)
        inputs = padded(found)
        read = {name: inputs[name].to(device) for name in ("input_ids", "attention_mask") if name in inputs}
        theirs = peer(**read, logits_to_keep=inputs["logits_to_keep"]).logits
    # Sorted by length: first all users' first targets, then all second ones; the sort keeps the users in order.
    ours = [logits.transpose(0, 1).flatten(0, 1) for logits in packed]
    starts = [model.first_token + level * model.n_codes for level in range(model.n_levels)]
    differences = [
        (x - theirs[:, m, start : start + model.n_codes]).abs().max() for m, (x, start) in enumerate(zip(ours, starts, strict=True))
    ]
    return float(torch.stack(differences).max())


class _StepTimes(TrainerCallback):
    def __init__(self, device: str) -> None:
        self.clock, self._start = clock_for(device), 0.0
        self.seconds: list[float] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        self._start = self.clock()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.seconds.append(self.clock() - self._start)


def trainer_step(model: Retriever, data: list[dict[str, list[int]]], collator: Any, *, per_batch: int, steps: int) -> list[float]:
    """Seconds of each of the Trainer's optimizer steps over all of `data`, without the loading of data."""
    device = model.sid_codes.device.type
    watch, batches = _StepTimes(device), -(-len(data) // per_batch)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=per_batch,
            gradient_accumulation_steps=batches,
            train_sampling_strategy="sequential",
            max_grad_norm=1.0,
            use_cpu=device == "cpu",
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(language_model(model), arguments, data_collator=collator, train_dataset=data, callbacks=[watch])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return watch.seconds


def our_steps(model: Retriever, rows: Sequence[Row], *, steps: int) -> list[float]:
    """Seconds of each of our optimizer steps over all of `rows`."""
    config, clock, seconds = configuration(), clock_for(model.sid_codes.device.type), []
    model.rank_head.requires_grad_(requires_grad=False)
    optimizer, schedule = build_optimizer(model, config, steps)
    batch = collate(rows)
    for _ in range(steps):
        start = clock()
        train_step(model, [batch], optimizer, schedule, config)
        seconds.append(clock() - start)
    return seconds


def _against_trainer(rounds: int, steps: int, device: str) -> float:
    model = tiny_model().to(device)
    rows = user_rows(model, _USERS, _ITEMS_A_USER)
    batch, targets = collate(rows), sequences(model, rows)
    positions = (1 + model.width * batch.items_BH.shape[1]) + batch.target_items_BP.shape[1]
    plain = [{"input_ids": (np.arange(positions) % model.n_codes).tolist()} for _ in range(_USERS)]
    found: dict[str, list[float]] = {"ours": [], "a sequence a target": [], "the same positions": []}
    for _ in range(rounds):  # in turns, each first step left out
        found["ours"] += our_steps(tiny_model().to(device), rows, steps=4 * steps)[1:]
        found["a sequence a target"] += trainer_step(model, targets, padded, per_batch=_SEQUENCES_A_BATCH, steps=steps)[1:]
        found["the same positions"] += trainer_step(model, plain, whole, per_batch=_USERS, steps=4 * steps)[1:]
    seconds = {name: float(np.median(values)) for name, values in found.items()}
    read = {
        "ours": _USERS * positions,
        "a sequence a target": sum(len(sequence["input_ids"]) for sequence in targets),
        "the same positions": _USERS * positions,
    }
    shown = [[name, f"{read[name]:,}", milliseconds(took), times(took / seconds["ours"])] for name, took in seconds.items()]
    table(f"one step, {len(targets)} targets of {_USERS} users", ["", "positions", "step", "against ours"], shown)
    return seconds["a sequence a target"] / seconds["ours"]


def _ddp_worker(rank: int, world_size: int, folder: str, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world_size}", rank=rank, world_size=world_size)
    model, config = tiny_model(), configuration()
    batch: Batch = collate(user_rows(model, _USERS, _ITEMS_A_USER, seed=rank))
    model.rank_head.requires_grad_(requires_grad=False)
    optimizer, schedule = build_optimizer(model, config, steps)
    ddp = DistributedDataParallel(model, forward_sync_buffers=False)
    seconds = []
    for _ in range(steps):
        dist.barrier()
        start, busy = time.perf_counter(), time.process_time()
        train_step(ddp, [batch], optimizer, schedule, config)
        seconds.append((time.perf_counter() - start, time.process_time() - busy))
    if rank == 0:
        np.save(Path(folder) / "seconds.npy", np.median(seconds[1:], axis=0))
    dist.destroy_process_group()


def _scaling(rounds: int, steps: int) -> float:
    """Users a second of two workers over those of one; each worker has the same number of users a step."""
    found: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for _ in range(rounds):
        for world_size, took in found.items():
            with tempfile.TemporaryDirectory() as folder:
                spawn(_ddp_worker, args=(world_size, folder, steps), nprocs=world_size)
                wall, busy = np.load(Path(folder) / "seconds.npy").tolist()
                took.append((wall, busy))
    best = {n: min(took) for n, took in found.items()}
    shown = [[f"{n} worker(s)", milliseconds(wall), milliseconds(busy), f"{n * _USERS / wall:,.1f}"] for n, (wall, busy) in best.items()]
    table("DDP, the least disturbed run", ["", "step, wall time", "CPU time of a worker", "users a second"], shown)
    return 2 * best[1][0] / best[2][0]


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__, device=True)
    announce(arguments.device)
    model = tiny_model().to(arguments.device)
    worst = logits_difference(model, user_rows(model, 2, 6))
    console.print(f"largest difference between logits of the two models: {worst:.1e}", highlight=False)
    ratio = _against_trainer(rounds=1 if arguments.quick else 5, steps=4, device=arguments.device)
    speedup: float | None = None  # of CPU workers: it says nothing of a GPU
    if arguments.device == "cpu":
        speedup = _scaling(rounds=1 if arguments.quick else 3, steps=10 if arguments.quick else 20)
    finish({"bench": "train_step", "vs_trainer": ratio, "ddp2_speedup": speedup, "exact": worst < TOLERANCE}, arguments)


if __name__ == "__main__":
    main()
