"""The rank head over many beams against attention for each (beam, codeword).

    python -m tests.benchmarks.rank_head [--quick] [--device cpu|cuda]

100 beams behind one history of 512 positions, 256 candidate codewords each out of 1,024, width 128. Both sides score
all candidates with the same weights. The peer projects codewords and history once, and then attends from every (beam,
codeword) to the history and the beam's own hidden state, in matrix products beam by beam or all at once; the faster
one counts. (`scaled_dot_product_attention` cannot be the peer: the head also reads the sum under the softmax, which it
keeps to itself. It is shown for the part that it can do.) Ours is `RankHead.prepare` and `RankHead.score`.

Shapes: S history positions, D width, K codewords, W beams, C candidates a beam, L own hidden states, G heads, E = D / G.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from components.retriever.rank_head import RankHead
from tests.benchmarks.timing import Side, announce, clock_for, finish, interleave, milliseconds, parse, table, times


@dataclass(frozen=True)
class Work:
    """One level's scoring for one user, whose row is left out of the shapes."""

    head: RankHead
    codebook_KD: Tensor
    codes_WC: Tensor
    history_SD: Tensor
    own_WLD: Tensor


def build_work(
    *, beams: int = 100, codes: int = 256, codebook: int = 1024, positions: int = 512, width: int = 128, heads: int = 2, device: str = "cpu"
) -> Work:
    """Random weights and states large enough for attention to be uneven; seeded."""
    torch.manual_seed(0)
    head = RankHead(width, heads=heads, mlp=128, dropout=0.0).eval()
    for parameter in head.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=width**-0.5)
    candidates = torch.stack([torch.randperm(codebook)[:codes] for _ in range(beams)])
    states = (torch.randn(codebook, width), candidates, torch.randn(positions, width), torch.randn(beams, 1, width))
    return Work(head.to(device), *(x.to(device) for x in states))


@torch.inference_mode()
def factorised(work: Work) -> Tensor:
    """Logits_WC by the product's decoder path."""
    visible = torch.ones(1, len(work.history_SD), dtype=torch.bool, device=work.history_SD.device)
    shared = work.head.prepare(work.codebook_KD, work.history_SD[None], visible)
    return work.head.score(shared, work.codes_WC[None], work.own_WLD[None])[0]


@dataclass(frozen=True)
class Projected:
    """What even the naive way computes once: codewords, queries, keys and values in heads."""

    codeword_KD: Tensor
    query_GKE: Tensor
    key_GSE: Tensor
    value_GSE: Tensor
    own_key_WGLE: Tensor
    own_value_WGLE: Tensor


def project(work: Work) -> Projected:
    """The head's own layers; queries are scaled (Eq. 14)."""
    head = work.head

    def split(x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], head.heads, x.shape[-1] // head.heads).transpose(-2, -3)

    codeword_KD = head.norm(work.codebook_KD)
    query_GKE = split(head.query(codeword_KD)) / math.sqrt(work.codebook_KD.shape[1] // head.heads)
    key_GSE, value_GSE = (split(layer(work.history_SD)) for layer in (head.key, head.value))
    own_key_WGLE, own_value_WGLE = (split(layer(work.own_WLD)) for layer in (head.key, head.value))
    return Projected(codeword_KD, query_GKE, key_GSE, value_GSE, own_key_WGLE, own_value_WGLE)


@torch.inference_mode()
def beam_by_beam(work: Work) -> Tensor:
    """Logits_WC with one attention a beam over its history and own states, all its candidates at once."""
    of = project(work)
    positions = len(work.history_SD) + work.own_WLD.shape[1]
    logits = []
    for codes_C, own_key_GLE, own_value_GLE in zip(work.codes_WC, of.own_key_WGLE, of.own_value_WGLE, strict=True):
        key_GTE, value_GTE = torch.cat([of.key_GSE, own_key_GLE], dim=1), torch.cat([of.value_GSE, own_value_GLE], dim=1)
        score_GCT = of.query_GKE[:, codes_C] @ key_GTE.transpose(-1, -2)
        mass_GC = score_GCT.logsumexp(-1)
        attended_GCE = score_GCT.sub_(mass_GC[..., None]).exp_() @ value_GTE
        features = [attended_GCE.transpose(0, 1).flatten(1), of.codeword_KD[codes_C], mass_GC.T - math.log(positions)]
        logits.append(work.head.mlp(torch.cat(features, dim=-1)).squeeze(-1))
    return torch.stack(logits)


@torch.inference_mode()
def all_at_once(work: Work) -> Tensor:
    """The same for all beams in one batch of matrix products."""
    of = project(work)
    beams, positions = len(work.codes_WC), len(work.history_SD) + work.own_WLD.shape[1]
    key_WGTE = torch.cat([of.key_GSE.expand(beams, -1, -1, -1), of.own_key_WGLE], dim=2)
    value_WGTE = torch.cat([of.value_GSE.expand(beams, -1, -1, -1), of.own_value_WGLE], dim=2)
    score_WGCT = of.query_GKE[:, work.codes_WC].transpose(0, 1) @ key_WGTE.transpose(-1, -2)
    mass_WGC = score_WGCT.logsumexp(-1)
    attended_WGCE = score_WGCT.sub_(mass_WGC[..., None]).exp_() @ value_WGTE
    features = [attended_WGCE.transpose(1, 2).flatten(2), of.codeword_KD[work.codes_WC], mass_WGC.transpose(1, 2) - math.log(positions)]
    return torch.as_tensor(work.head.mlp(torch.cat(features, dim=-1)).squeeze(-1))


@torch.inference_mode()
def attention_alone(work: Work) -> Tensor:
    """Attended_WGCE by `scaled_dot_product_attention`: no sum under the softmax, no MLP."""
    of = project(work)
    beams = len(work.codes_WC)
    key_WGTE = torch.cat([of.key_GSE.expand(beams, -1, -1, -1), of.own_key_WGLE], dim=2)
    value_WGTE = torch.cat([of.value_GSE.expand(beams, -1, -1, -1), of.own_value_WGLE], dim=2)
    return F.scaled_dot_product_attention(of.query_GKE[:, work.codes_WC].transpose(0, 1), key_WGTE, value_WGTE, scale=1.0)


NAIVE = {"beam by beam": beam_by_beam, "all at once": all_at_once}


def largest_difference(work: Work) -> float:
    """Of our logits from those of both peers."""
    ours = factorised(work)
    return max(float((peer(work) - ours).abs().max()) for peer in NAIVE.values())


def compare(work: Work, *, rounds: int) -> dict[str, float]:
    """Seconds of each side."""
    sides = {name: Side(lambda peer=peer: peer(work), rounds) for name, peer in NAIVE.items()}  # type: ignore[misc]
    sides["SDPA, attention alone"] = Side(lambda: attention_alone(work), rounds)
    sides["ours"] = Side(lambda: factorised(work), rounds, repeats=3)
    return interleave(sides, clock_for(work.history_SD.device.type))


def main() -> None:
    """Print the table and the result."""
    arguments = parse(__doc__, device=True)
    announce(arguments.device)
    rows, ratios, differences = [], {}, {}
    for heads in (2,) if arguments.quick else (1, 2, 4):
        work = build_work(heads=heads, device=arguments.device)
        differences[heads] = largest_difference(work)
        seconds = compare(work, rounds=5 if arguments.quick else 15)
        ratios[heads] = min(seconds[name] for name in NAIVE) / seconds["ours"]
        figures = [milliseconds(value) for value in seconds.values()]
        rows.append([str(heads), *figures, times(ratios[heads]), f"{differences[heads]:.1e}"])
    title = "100 beams x 256 of 1,024 codewords, 512 positions, width 128"
    table(title, ["heads", *seconds, "vs the faster peer", "largest difference"], rows)
    finish({"bench": "rank_head", "vs_naive": ratios[2], "max_abs_diff": max(differences.values())}, arguments)


if __name__ == "__main__":
    main()
