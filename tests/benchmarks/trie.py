"""The trie constraint of one decoding step against the callback per beam of transformers.

    python -m tests.benchmarks.trie [--quick] [--device cpu|cuda]

256 beams stand behind their first codeword and have logits over the 4,096 codewords of the second level. What is asked
for: the allowed (beam, codeword, logit). The peer is `PrefixConstrainedLogitsProcessor` with a dictionary from prefix to
the ready list of what may follow: lists are what its interface asks for, and the headline. It happens to take tensors
too, which saves it a conversion per beam; that is shown beside. Ours is the gather of `DecodingTrie.children`.

Shapes: W beams, K codewords a level, C children of the node that has most of them, N items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.generation import PrefixConstrainedLogitsProcessor

from components.retriever.decoding_trie import DecodingTrie
from components.semantic_ids.trie import build_trie
from tests.benchmarks.decode_peers import prefix_table
from tests.benchmarks.timing import Side, announce, clock_for, finish, interleave, milliseconds, parse, table, times

BEAMS = 256
CODES = 4096
PEERS = ("callback, lists", "callback, tensors")


@dataclass(frozen=True)
class Step:
    """One step of decoding: where the beams stand and what the model says.

    Attributes:
        sids_N2: of the catalogue, no two alike.
        trie: of the catalogue.
        first_W: first codeword of each beam.
        nodes_1W: the same as node numbers, as one row of beams [1, W].
        logits_WK: over the second level.
    """

    sids_N2: npt.NDArray[np.int64]
    trie: DecodingTrie
    first_W: Tensor
    nodes_1W: Tensor
    logits_WK: Tensor


def build_step(*, items: int, codes: int = CODES, beams: int = BEAMS, device: str = "cpu") -> Step:
    """Random SIDs, beams behind random first codewords that lead to items, random logits; seeded."""
    rng = np.random.default_rng(0)
    paths = rng.choice(codes**2, size=items, replace=False)
    sids = np.column_stack([paths // codes, paths % codes])
    trie = build_trie(sids, np.zeros(items, dtype=np.int64), n_codes=codes)
    nodes = rng.choice(len(trie.codes[0]), size=beams, replace=False)
    torch.manual_seed(0)
    first, logits = torch.from_numpy(trie.codes[0][nodes]), torch.randn(beams, codes)
    return Step(sids, DecodingTrie(trie, device), first.to(device), torch.from_numpy(nodes)[None].to(device), logits.to(device))


def callback_processors(step: Step) -> dict[str, PrefixConstrainedLogitsProcessor]:
    """The peer in its two forms."""
    lists = prefix_table(step.sids_N2)
    tensors = {prefix: torch.tensor(following, device=step.logits_WK.device) for prefix, following in lists.items()}
    beams = len(step.first_W)
    callbacks = (lambda _, sent: lists[tuple(sent.tolist())], lambda _, sent: tensors[tuple(sent.tolist())])
    return {name: PrefixConstrainedLogitsProcessor(callback, beams) for name, callback in zip(PEERS, callbacks, strict=True)}


@torch.inference_mode()
def by_callback(step: Step, processor: PrefixConstrainedLogitsProcessor) -> Tensor:
    """Logits_WK, -inf where a codeword leads to no item."""
    return torch.as_tensor(processor(step.first_W[:, None], step.logits_WK))


@torch.inference_mode()
def by_gather(step: Step) -> tuple[Tensor, Tensor]:
    """(codes_WC, logits_WC) of the children; -inf for padding."""
    codes_1WC, _, valid_1WC = step.trie.children(1, step.nodes_1W)
    return codes_1WC[0], step.logits_WK.gather(1, codes_1WC[0]).masked_fill_(~valid_1WC[0], float("-inf"))


def same_constraint(step: Step, processor: PrefixConstrainedLogitsProcessor) -> bool:
    """Whether both ways allow the same (beam, codeword, logit)."""
    masked_WK = by_callback(step, processor)
    codes_WC, logits_WC = by_gather(step)
    alive_WC = logits_WC > float("-inf")
    beam, slot = alive_WC.nonzero(as_tuple=True)
    ours = torch.stack([beam.double(), codes_WC[beam, slot].double(), logits_WC[beam, slot].double()], dim=1)
    row, code = (masked_WK > float("-inf")).nonzero(as_tuple=True)
    peer = torch.stack([row.double(), code.double(), masked_WK[row, code].double()], dim=1)
    return sorted(map(tuple, ours.tolist())) == sorted(map(tuple, peer.tolist()))


def compare(items: int, *, rounds: int, device: str = "cpu") -> tuple[dict[str, float], bool]:
    """Seconds of each side for a catalogue, and whether they agree."""
    step = build_step(items=items, device=device)
    processors = callback_processors(step)
    exact = all(same_constraint(step, processor) for processor in processors.values())
    sides = {name: Side(lambda p=processor: by_callback(step, p), rounds, repeats=3) for name, processor in processors.items()}  # type: ignore[misc]
    sides["ours"] = Side(lambda: by_gather(step), rounds, repeats=100)
    return interleave(sides, clock_for(device)), exact


def main() -> None:
    """Print the table and the result."""
    arguments = parse(__doc__, device=True)
    announce(arguments.device)
    rows, all_exact = [], True
    headline: dict[str, float] = {}
    for items in (100_000,) if arguments.quick else (100_000, 1_000_000):
        seconds, exact = compare(items, rounds=10 if arguments.quick else 25, device=arguments.device)
        ratios = {name: seconds[name] / seconds["ours"] for name in PEERS}
        headline = headline or ratios
        all_exact = all_exact and exact
        rows.append([f"{items:,}", *map(milliseconds, seconds.values()), *map(times, ratios.values()), str(exact)])
    columns = ["items", *seconds, *(f"vs {name}" for name in PEERS), "exact"]
    table(f"One step, {BEAMS} beams, {CODES:,} x 2 codewords", columns, rows)
    lists, tensors = headline.values()
    finish({"bench": "trie", "vs_callback": lists, "vs_callback_with_tensors": tensors, "exact": all_exact}, arguments)


if __name__ == "__main__":
    main()
