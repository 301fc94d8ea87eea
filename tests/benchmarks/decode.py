"""Beam search against transformers' own and against prefill once with replicated keys and values.

    python -m tests.benchmarks.decode [--quick] [--device cpu|cuda]

The task: the 256 best SIDs of 2 levels x 4,096 codewords after a prompt of 512 positions, with a Qwen2 of 4 layers and
width 128 and random weights. All sides begin at the user's history and end at SIDs with their scores, in float32. Then
the throughput of users in a batch over users one by one, and with `--device cuda` the latency at Qwen2.5-0.5B's shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from components.retriever.beam_search import beam_search
from components.retriever.contract import History
from components.retriever.decoding_trie import DecodingTrie
from components.retriever.model import Retriever
from components.retriever.recommender import RetrieverRecommender
from components.semantic_ids.trie import build_trie
from infra.sections import DecodingConfig, RetrieverConfig
from tests.benchmarks.decode_peers import causal_lm, dense_trie, found_by_us, generate, replicated, same_up_to_ties, trie_callback
from tests.benchmarks.timing import Side, announce, clock_for, finish, interleave, milliseconds, parse, table, times

HEADLINE = 256


@dataclass(frozen=True)
class Shape:
    """Sizes: the model, the prompt in positions ([BOS] and one an item), two levels of codewords, the catalogue, the rank head."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ff: int
    positions: int
    codes: int
    items: int
    rank_heads: int
    rank_mlp: int


ANCHOR = Shape(128, 4, 4, 2, 512, positions=512, codes=4096, items=100_000, rank_heads=4, rank_mlp=128)
QUICKSTART = Shape(64, 2, 2, 2, 256, positions=51, codes=256, items=1_682, rank_heads=2, rank_mlp=64)
QWEN_05B = Shape(896, 24, 14, 2, 4864, positions=2000, codes=8192, items=1_000_000, rank_heads=8, rank_mlp=896)


@dataclass(frozen=True)
class Task:
    """A model with random weights, its catalogue, and users."""

    model: Retriever
    sids_N2: npt.NDArray[np.int64]
    trie: DecodingTrie
    histories: list[History]


def build_task(shape: Shape, *, users: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Task:
    """Random SIDs without collisions, random weights large enough for scores to differ, random histories; seeded."""
    rng = np.random.default_rng(0)
    paths = rng.choice(shape.codes**2, size=shape.items, replace=False)
    sids = np.column_stack([paths // shape.codes, paths % shape.codes])
    config = RetrieverConfig(
        hidden_size=shape.hidden,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        ff_size=shape.ff,
        dropout=0.0,
        max_history=max(shape.positions - 1, 1),
        rank_heads=shape.rank_heads,
        rank_mlp=shape.rank_mlp,
    )
    torch.manual_seed(0)
    model = Retriever(config, sids, n_codes=shape.codes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=min(0.1, shape.hidden**-0.5))
    length = shape.positions - 1
    histories = [History(rng.integers(0, shape.items, length), rng.integers(1, 5, length)) for _ in range(users)]
    trie = DecodingTrie(build_trie(sids, np.zeros(shape.items, dtype=np.int64), n_codes=shape.codes), device)
    return Task(model.eval().to(device, dtype), sids, trie, histories)


@dataclass(frozen=True)
class Comparison:
    """Seconds of each side at one width of beams, and whether all found the same."""

    seconds: dict[str, float]
    exact: bool

    def over(self, peer: str) -> float:
        """How many times faster than a peer we are."""
        return self.seconds[peer] / self.seconds["ours"]


def compare(task: Task, beams: int, *, constrained: bool, rounds: int, slow_rounds: int, device: str = "cpu") -> Comparison:
    """Time and check all sides for the first user; `slow_rounds` is for `generate`."""
    model, history, codes = task.model, task.histories[0], task.model.n_codes
    lm = causal_lm(model)
    trie = task.trie if constrained else None
    callback = trie_callback(task.sids_N2, first_token=model.first_token, n_codes=codes) if constrained else None
    dense = dense_trie(task.sids_N2, n_codes=codes, device=device) if constrained else None

    def ours() -> object:
        return beam_search(model, [history], trie, beams=[beams, beams], lambdas=[codes, codes], score="iap")

    def peer_replicated() -> object:
        return replicated(lm, model, history, beams=beams, trie=dense)

    found = []  # of generate: its only warm-up is small, for a second run would double the time of the benchmark
    generate(lm, model, history, beams=2, callback=callback)

    def peer_generate() -> None:
        found.append(generate(lm, model, history, beams=beams, callback=callback))

    mine = found_by_us(beam_search(model, [history], trie, beams=[beams, beams], lambdas=[codes, codes], score="iap"))
    copied = replicated(lm, model, history, beams=beams, trie=dense)
    sides = {"ours": Side(ours, rounds), "replicated": Side(peer_replicated, rounds), "generate": Side(peer_generate, slow_rounds)}
    seconds = interleave(sides, clock_for(device))
    return Comparison(seconds, same_up_to_ties(mine, copied) and same_up_to_ties(mine, found[0]))


def against_peers(task: Task, device: str, *, quick: bool) -> tuple[Comparison, bool]:
    """Print a table per task; returns the headline's figures and whether every row was exact."""
    headline, exact = None, True
    for constrained in (False, True):
        rows = []
        for beams in _widths(quick=quick, constrained=constrained):
            slow_rounds = 1 if quick or beams > HEADLINE else 2
            result = compare(task, beams, constrained=constrained, rounds=5 if quick else 15, slow_rounds=slow_rounds, device=device)
            exact = exact and result.exact
            if beams == HEADLINE and not constrained:
                headline = result
            figures = [milliseconds(result.seconds[side]) for side in ("generate", "replicated", "ours")]
            rows.append([f"B = {beams}", *figures, times(result.over("generate")), times(result.over("replicated")), str(result.exact)])
        what = f"a trie of {task.trie.n_leaves:,} items" if constrained else "every SID legal"
        columns = ["beams", "generate", "prefill once + replicated KV", "ours", "vs generate", "vs replicated", "exact"]
        table(f"One user, 2 levels x {task.model.n_codes:,} codewords, {len(task.histories[0].items) + 1} positions, {what}", columns, rows)
    assert headline is not None
    return headline, exact


def _widths(*, quick: bool, constrained: bool) -> list[int]:
    if quick:
        return [32] if constrained else [32, HEADLINE]
    return [32, 128, HEADLINE, 512]


def batch_over_single(together: Callable[[], object], one_by_one: Callable[[], object], device: str, *, rounds: int) -> tuple[float, float]:
    """(seconds of the users in a batch, of the same users one by one); both are warmed up."""
    together()
    one_by_one()
    seconds = interleave({"batch": Side(together, rounds), "single": Side(one_by_one, rounds)}, clock_for(device))
    return seconds["batch"], seconds["single"]


def slates(task: Task, device: str, *, rounds: int) -> tuple[float, float]:
    """Whole slates at the quickstart's sizes, rank head on: histories in, 50 items out, seen ones left out."""
    decoding = DecodingConfig(beams=[100, 200], lambdas=[256, 64], score="sum", users_per_batch=len(task.histories))
    recommender = RetrieverRecommender(task.model, task.trie.trie, decoding)

    def recommend(histories: list[History]) -> object:
        return recommender.recommend(histories, 50, exclude_seen=True)

    return batch_over_single(
        lambda: recommend(task.histories), lambda: [recommend([history]) for history in task.histories], device, rounds=rounds
    )


def wide_beams(task: Task, device: str, *, rounds: int) -> tuple[float, float]:
    """The anchor's task under its trie, for several users."""

    def search(histories: list[History]) -> object:
        codes = task.model.n_codes
        return beam_search(task.model, histories, task.trie, beams=[HEADLINE] * 2, lambdas=[codes] * 2, score="iap")

    return batch_over_single(
        lambda: search(task.histories), lambda: [search([history]) for history in task.histories], device, rounds=rounds
    )


def batches(anchor: Task, device: str, *, quick: bool) -> tuple[float, float]:
    """Print the table of batches; returns (throughput of 16 over one by one, seconds a user in the batch) at the quickstart's sizes."""
    users = len(anchor.histories)
    small = slates(build_task(QUICKSTART, users=users, device=device), device, rounds=5 if quick else 15)
    rows = [_batch_row("slate: quickstart, beams 100/200, lambdas 256/64, rank head", users, *small)]
    if not quick:
        rows.append(_batch_row(f"SIDs: prompt 512, 4,096 codewords, B = {HEADLINE}", users, *wide_beams(anchor, device, rounds=3)))
    table(f"{users} users", ["work", "one by one, a user", "in a batch, a user", "throughput"], rows)
    return small[1] / small[0], small[0] / users


def _batch_row(what: str, users: int, batch: float, single: float) -> list[str]:
    return [what, milliseconds(single / users), milliseconds(batch / users), times(single / batch)]


def on_the_device(shape: Shape, beams: list[int], lambdas: list[int], device: str, *, rounds: int) -> dict[str, float]:
    """RankGR's own setting with rank heads on: median latency of one request, and requests a second in batches."""
    rows, figures = [], {}
    for dtype in (torch.float32, torch.bfloat16):
        task = build_task(shape, users=4, device=device, dtype=dtype)
        for name, trie in (("every SID legal", None), (f"{shape.items:,} items", task.trie)):
            for users in (1, len(task.histories)):
                seconds = _latency(task, trie, users, beams, lambdas, device, rounds=rounds)
                precision = str(dtype).removeprefix("torch.")
                rows.append([f"{precision}, {name}, {users} user(s)", milliseconds(seconds), f"{users / seconds:,.0f}"])
                figures[f"p50_ms_{precision}_{'trie' if trie else 'free'}_{users}"] = seconds * 1e3
    table(f"Width {shape.hidden}, {shape.layers} layers, {shape.positions} positions, beams {beams}", ["work", "p50", "requests/s"], rows)
    return figures


def _latency(task: Task, trie: DecodingTrie | None, users: int, beams: list[int], lambdas: list[int], device: str, *, rounds: int) -> float:
    def search() -> object:
        return beam_search(task.model, task.histories[:users], trie, beams=beams, lambdas=lambdas, score="rsp")

    search()
    search()
    return interleave({"ours": Side(search, rounds)}, clock_for(device))["ours"]


def main() -> None:
    """Print the tables and the result."""
    arguments = parse(__doc__, device=True)
    quick, device = arguments.quick, arguments.device
    announce(device)
    task = build_task(ANCHOR, users=16, device=device)
    headline, exact = against_peers(task, device, quick=quick)
    ratio, seconds_a_user = batches(task, device, quick=quick)
    figures = on_the_device(QWEN_05B, [500, 1400], [1400, 1400], device, rounds=5 if quick else 20) if device == "cuda" else {}
    result = {
        "bench": "decode",
        "vs_generate": headline.over("generate"),
        "vs_replicated": headline.over("replicated"),
        "batch16_vs_single": ratio,
        "ms_per_user_batch16": seconds_a_user * 1e3,
        **figures,
        "exact": exact,
    }
    finish(result, arguments)


if __name__ == "__main__":
    main()
