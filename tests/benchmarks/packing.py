"""Packed rows against separate ones: `python -m tests.benchmarks.packing [--quick] [--device cpu|cuda]`.

1. K targets behind one history of T tokens: one packed row (RankGR Eq. 6-7) against one batch of K plain causal rows, run
   through the `transformers` model itself.
2. Users of KuaiRand: all requests of a user in one row against one row a request, the packing of the paper. Both sides take
   batches of rows of like length with the same number of positions, padding included.

Each run is forward and backward of the same cross-entropy over the same targets; `exact` says that the gradients agree.
The data set is looked for in RANKGR_DATA, by default ../shared/data.

Shapes: B rows, P targets, M levels, K codewords, N positions, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from components.retriever.model import Retriever
from components.retriever.packing import Batch, Row, collate, rows_of_timeline
from components.sessions.check import check_events, event_columns
from components.sessions.sources import pieces_of, read_piece
from components.sessions.timelines import build_timelines, temporal_cuts
from components.training.data import epoch_batches, plan_batches
from infra import records as r
from infra.config import Config, load_config
from infra.sections import RetrieverConfig
from tests.benchmarks.data import data_folder
from tests.benchmarks.timing import Side, announce, clock_for, console, finish, interleave, milliseconds, parse, table, times

TOLERANCE = 1e-4
SHAPES = {"t512k8": (512, 8), "t256k16": (256, 16)}
_TINY = {"hidden_size": 128, "layers": 4, "heads": 4, "kv_heads": 2, "ff_size": 512, "rank_heads": 1, "dropout": 0.0}
_CODES, _ITEMS = 2048, 5000
_KUAIRAND = "kuairand_pure_14d"
_USER_TOKENS = 4096


def tiny_model(n_codes: int = _CODES, **sizes: object) -> Retriever:
    """A Qwen2 with 2 x n_codes codewords; histories of codewords and nothing else, as a plain language model reads them."""
    config = RetrieverConfig.model_validate({**_TINY, **sizes, "history": "tokens", "history_levels": False})
    torch.manual_seed(0)
    return Retriever(config, np.random.default_rng(0).integers(0, n_codes, (_ITEMS, 2)), n_codes=n_codes)


def shared_history(tokens: int, targets: int) -> Row:
    """A history of so many tokens, two an item, and targets of one request behind it."""
    rng = np.random.default_rng(1)
    items, ones = rng.integers(0, _ITEMS, tokens // 2), np.ones(targets, dtype=np.int64)
    return Row(items, np.full(len(items), 3), rng.integers(0, _ITEMS, targets), 3 * ones, len(items) * ones, 0 * ones)


def packed_loss(model: Retriever, batch: Batch) -> Tensor:
    """Ours: sum over targets and levels of -log p."""
    codes_BPM = model.sid_codes[batch.target_items_BP]
    logits = model.target_logits(model.encode(batch, codes_BPM), batch)
    valid = batch.target_valid_BP
    return torch.stack([F.cross_entropy(x[valid], codes_BPM[..., m][valid], reduction="sum") for m, x in enumerate(logits)]).sum()


def separate_loss(model: Retriever, row: Row) -> Tensor:
    """The peer: each target behind a copy of the history in a row of its own, under the model's own causal mask."""
    device = model.sid_codes.device
    codes_KM = model.sid_codes[torch.from_numpy(row.target_items).to(device)]
    level = torch.arange(model.n_levels, device=device)
    history = model.token_ids(model.sid_codes[torch.from_numpy(row.items).to(device)], level).flatten()
    bos = history.new_full((1,), model.first_token - 1)
    read = model.token_ids(codes_KM[:, :-1], level[:-1])
    tokens_KN = torch.cat([torch.cat([bos, history]).expand(len(read), -1), read], dim=1)
    hidden_KMD = model.backbone(input_ids=tokens_KN, use_cache=False).last_hidden_state[:, -model.n_levels :]
    losses = [F.cross_entropy(hidden_KMD[:, m] @ model.codebook(m).T, codes_KM[:, m], reduction="sum") for m in level.tolist()]
    return torch.stack(losses).sum()


def backward(model: Retriever, losses: Iterable[Callable[[], Tensor]]) -> None:
    """Forward and backward, batch after batch, gradients added up."""
    model.zero_grad(set_to_none=True)
    for loss in losses:
        loss().backward()  # type: ignore[no-untyped-call]


def gradient(model: Retriever) -> Tensor:
    """All gradients of the backbone and its inputs as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def difference(one: Tensor, other: Tensor) -> float:
    """Relative to the larger of the two."""
    return float((one - other).norm() / torch.maximum(one.norm(), other.norm()))


def compare(model: Retriever, ours: Sequence[Callable[[], Tensor]], peer: Sequence[Callable[[], Tensor]]) -> float:
    """Relative difference of the gradients of two ways to the same loss."""
    found = []
    for losses in (ours, peer):
        backward(model, losses)
        found.append(gradient(model))
    return difference(*found)


def requests_of(row: Row) -> list[Row]:
    """One row a request, each with the history that its targets see."""
    starts = np.flatnonzero(np.diff(row.target_request, prepend=-1))
    rows = []
    for start, end in zip(starts, [*starts[1:], len(row.target_items)], strict=True):
        seen, targets = slice(int(row.target_prefix[start])), slice(start, end)
        columns = (row.target_items, row.target_levels, row.target_prefix, row.target_request)
        rows.append(Row(row.items[seen], row.levels[seen], *(column[targets] for column in columns)))
    return rows


def kuairand_config(folder: Path) -> Config:
    """The preset `kuairand`, batches by tokens."""
    logs, items = (str(folder / name) for name in ("interactions.parquet", "items.parquet"))
    data = [f"data.logs={logs}", f"data.items={items}", "data.columns.signals={}"]
    return load_config(preset="kuairand", overrides=[*data, f"training.tokens_per_batch={_USER_TOKENS}", "retriever.dropout=0.0"])


def kuairand_timelines(config: Config) -> tuple[pa.Table, dict[str, int]]:
    """Timelines as the step `sessions` makes them, in one process; and the number of each item."""
    data = config.data
    columns = list(dict.fromkeys(event_columns(data).values()))
    checked = [check_events(part, data) for piece in pieces_of(data.logs) for part in read_piece(piece, columns, uri=data.logs)]
    events = pl.DataFrame(pl.from_arrow(pa.concat_tables(checked))).filter(pl.col(r.REASON).is_null())
    number = {item: index for index, item in enumerate(sorted(events[r.ITEM_ID].unique().to_list()))}
    indexed = events.with_columns(pl.col(r.ITEM_ID).replace_strict(number, return_dtype=pl.Int32).alias(r.ITEM_INDEX))
    columns = [r.USER_ID, r.ITEM_INDEX, r.REQUEST_ID, r.TIMESTAMP, r.LEVEL]
    cuts = temporal_cuts(int(events[r.TIMESTAMP].max()), config.split)  # type: ignore[arg-type]
    return build_timelines(indexed.select(columns), data, config.split, cuts)[0], number


def user_rows(config: Config, timelines: pa.Table, earlier: dict[str, list[int]]) -> list[Row]:
    """Rows of the training phase behind a user's earlier positives, which are history and no targets."""
    rows = []
    for timeline in timelines.to_pylist():
        count = int(np.searchsorted(timeline["phases"], r.Phase.VALID))
        before = earlier.get(timeline["user_id"], [])
        n = len(before)
        items = np.array([*before, *timeline["items"][:count]], dtype=np.int64)
        levels = np.array([*[r.Level.CLICK] * n, *timeline["levels"][:count]], dtype=np.int64)
        requests = np.array([*range(n), *(n + request for request in timeline["requests"][:count])], dtype=np.int64)
        cut = rows_of_timeline(
            items,
            levels,
            requests,
            history_min_level=config.retriever.history_min_level,
            target_min_level=1,
            max_history=config.retriever.max_history,
        )
        for row in cut:
            own = row.target_request >= n
            if own.any():
                columns = (row.target_items, row.target_levels, row.target_prefix, row.target_request)
                rows.append(Row(row.items, row.levels, *(column[own] for column in columns)))
    return rows


def earlier_positives(folder: Path, number: dict[str, int]) -> dict[str, list[int]]:
    """What each user liked before the log begins, in the order of time, as far as it is in the catalogue."""
    frame = pl.read_parquet(folder / "prior_positive_histories.parquet", columns=["user_id", "watch_seq"])
    pairs = zip(frame["user_id"].to_list(), frame["watch_seq"].to_list(), strict=True)
    return {str(user): [number[str(item)] for item in items if str(item) in number] for user, items in pairs}


def batches_of(rows: Sequence[Row], config: Config, device: str = "cpu") -> list[Batch]:
    """An epoch's batches, as training makes them."""
    return [batch.to(device) for (batch,) in epoch_batches(plan_batches(rows, config), epoch=0, seed=0)]


def positions(rows: Sequence[Row]) -> int:
    """Positions with two levels and merged histories, without padding."""
    return sum(1 + len(row.items) + len(row.target_items) for row in rows)


def _targets_behind_one_history(rounds: int, device: str) -> dict[str, float]:
    model, ratios, shown, worst = tiny_model().to(device), {}, [], 0.0
    for name, (tokens, targets) in SHAPES.items():
        row = shared_history(tokens, targets)
        batch = collate([row]).to(device)
        ours, peer = [lambda batch=batch: packed_loss(model, batch)], [lambda row=row: separate_loss(model, row)]
        worst = max(worst, compare(model, ours, peer))
        sides = {
            "ours": Side(lambda ours=ours: backward(model, ours), rounds, repeats=3),
            "peer": Side(lambda peer=peer: backward(model, peer), rounds),
        }
        seconds = interleave(sides, clock_for(device))
        ratios[name] = seconds["peer"] / seconds["ours"]
        shown.append([f"T {tokens}, K {targets}", milliseconds(seconds["peer"]), milliseconds(seconds["ours"]), times(ratios[name])])
    table("K targets behind one history, forward + backward", ["", "K separate rows", "one packed row", "ratio"], shown)
    return {**ratios, "difference": worst}


def _users(folder: Path, users: int, rounds: int, device: str) -> dict[str, float]:
    config = kuairand_config(folder)
    timelines, number = kuairand_timelines(config)
    sample = timelines.take(np.sort(np.random.default_rng(0).choice(len(timelines), min(users, len(timelines)), replace=False)))
    torch.manual_seed(0)
    codes = np.random.default_rng(0).integers(0, config.semantic_ids.codes, (len(number), 2))
    model = Retriever(config.retriever, codes, n_codes=config.semantic_ids.codes).to(device)
    found, shown, worst = {}, [], 0.0
    for name, earlier in (("with earlier positives", earlier_positives(folder, number)), ("the log alone", {})):
        whole = user_rows(config, sample, earlier)
        single = [request for row in whole for request in requests_of(row)]
        sides = {}
        for side, rows in (("ours", whole), ("peer", single)):
            sides[side] = [lambda batch=batch: packed_loss(model, batch) for batch in batches_of(rows, config, device)]
        worst = max(worst, compare(model, sides["ours"], sides["peer"]))
        timed = {side: Side(lambda losses=losses: backward(model, losses), rounds) for side, losses in sides.items()}
        seconds = interleave(timed, clock_for(device))
        found[name] = seconds["peer"] / seconds["ours"]
        shown.append(
            [
                f"{name}: {len(whole):,} rows, {len(single):,} requests",
                milliseconds(seconds["peer"]),
                milliseconds(seconds["ours"]),
                times(positions(single) / positions(whole)),
                times(found[name]),
            ]
        )
    columns = ["", "one row a request", "whole-user rows", "positions", "ratio"]
    table(f"KuaiRand, {len(sample):,} users, forward + backward of all targets", columns, shown)
    return {"user_rows": found["with earlier positives"], "difference": worst}


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__, device=True)
    announce(arguments.device)
    result = _targets_behind_one_history(5 if arguments.quick else 15, arguments.device)
    worst = result.pop("difference")
    try:
        folder = data_folder(_KUAIRAND)
    except FileNotFoundError as error:
        console.print(f"no figure for whole-user rows: {error}")
    else:
        users = _users(folder, 500 if arguments.quick else 4000, 3 if arguments.quick else 5, arguments.device)
        worst = max(worst, users.pop("difference"))
        result |= users
    console.print(f"largest relative difference of gradients: {worst:.1e}", highlight=False)
    finish({"bench": "packing", **result, "exact": worst < TOLERANCE}, arguments)


if __name__ == "__main__":
    main()
