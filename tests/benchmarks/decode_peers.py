"""Beam search as people write it with transformers: the peers of our decoder, with public functions only.

Both start from the prompt's embeddings, as our decoder does, and both return the best W SIDs with their scores.

Shapes: N prompt positions, D hidden width, W beams, M levels, K codewords a level, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList
from transformers.generation import PrefixConstrainedLogitsProcessor

from components.retriever.beam_search import Beams
from components.retriever.contract import History
from components.retriever.model import Retriever

TOLERANCE = 1e-4
Callback = Callable[[int, Tensor], list[int]]


@dataclass(frozen=True)
class Found:
    """The W best SIDs of one user, best first."""

    codes_WM: Tensor
    scores_W: Tensor


def found_by_us(beams: Beams, row: int = 0) -> Found:
    """One user's row of our search; beams that reached no SID are left out."""
    alive = beams.scores_BW[row] > float("-inf")
    return Found(beams.codes_BWM[row][alive], beams.scores_BW[row][alive])


def same_up_to_ties(one: Found, other: Found, tolerance: float = TOLERANCE) -> bool:
    """Whether two searches found the same SIDs in the same order with the same scores.

    SIDs whose scores are closer than `tolerance` may change places, at the last place with one that was not returned.
    """
    if one.scores_W.shape != other.scores_W.shape:
        return False
    first, second = (found.scores_W.double().cpu().numpy() for found in (one, other))
    of_one = dict(zip(map(tuple, one.codes_WM.tolist()), first, strict=True))
    of_other = dict(zip(map(tuple, other.codes_WM.tolist()), second, strict=True))
    if len(of_one) != len(first) or len(of_other) != len(second) or (np.abs(first - second) > tolerance).any():
        return False
    both = of_one.keys() & of_other.keys()
    at_the_edge = [scores[sid] - min(scores.values()) for scores in (of_one, of_other) for sid in scores.keys() - both]
    return all(abs(of_one[sid] - of_other[sid]) <= tolerance for sid in both) and all(gap <= tolerance for gap in at_the_edge)


def prompt_of(model: Retriever, history: History) -> Tensor:
    """Embeddings_1ND of one user's prompt."""
    items, levels = (torch.as_tensor(x, dtype=torch.int64, device=model.sid_codes.device)[None] for x in (history.items, history.levels))
    return model.history_embeddings(items, levels)


def causal_lm(model: Retriever) -> Any:
    """The retriever's backbone as a language model whose output layer is the token table (Eq. 4)."""
    config: Any = copy.deepcopy(model.backbone.config)
    config.tie_word_embeddings = True
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    lm.model.load_state_dict(model.backbone.state_dict())
    lm.tie_weights()
    return lm.eval().to(device=model.embedding.weight.device, dtype=model.embedding.weight.dtype)


class LevelSoftmax(LogitsProcessor):  # type: ignore[misc]
    """The softmax over the codewords of the level that comes next (Eq. 4), where generate takes it over the vocabulary."""

    def __init__(self, first_token: int, n_codes: int) -> None:
        self.first_token, self.n_codes = first_token, n_codes

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # The prompt is given as embeddings, so that the ids are the codewords generated so far.
        start = self.first_token + input_ids.shape[1] * self.n_codes
        level = slice(start, start + self.n_codes)
        processed = torch.full_like(scores, float("-inf"))
        processed[:, level] = F.log_softmax(scores[:, level], dim=-1)
        return processed


def trie_callback(codes_NM: npt.NDArray[np.integer], *, first_token: int, n_codes: int) -> Callback:
    """A `prefix_allowed_tokens_fn`: a dictionary from the tokens so far to the ready list of those that may follow."""
    table = prefix_table(codes_NM + first_token + n_codes * np.arange(codes_NM.shape[1]))
    return lambda _, sent: table[tuple(sent.tolist())]


def prefix_table(tokens_NM: npt.NDArray[np.integer]) -> dict[tuple[int, ...], list[int]]:
    """Every prefix of the rows with what follows it, in rising order."""
    table: dict[tuple[int, ...], list[int]] = {}
    rows = np.unique(tokens_NM, axis=0)
    for length in range(rows.shape[1]):
        prefixes = np.unique(rows[:, : length + 1], axis=0)
        is_first = np.ones(len(prefixes), dtype=bool)
        is_first[1:] = (prefixes[1:, :length] != prefixes[:-1, :length]).any(axis=1)
        edges = [*np.flatnonzero(is_first).tolist(), len(prefixes)]
        last = prefixes[:, length].tolist()
        for start, end in pairwise(edges):
            table[tuple(prefixes[start, :length].tolist())] = last[start:end]
    return table


@torch.inference_mode()
def generate(lm: Any, model: Retriever, history: History, *, beams: int, callback: Callback | None = None) -> Found:
    """transformers' own beam search, constrained by a callback or not at all."""
    processors = LogitsProcessorList([LevelSoftmax(model.first_token, model.n_codes)])
    if callback is not None:  # behind the softmax, since Eq. 4 does not know of the trie
        processors.append(PrefixConstrainedLogitsProcessor(callback, beams))
    prompt = prompt_of(model, history)
    out = lm.generate(
        inputs_embeds=prompt,
        attention_mask=torch.ones(prompt.shape[:2], dtype=torch.int64, device=prompt.device),
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=model.n_levels,
        do_sample=False,
        use_cache=True,
        length_penalty=0.0,
        early_stopping=False,
        logits_processor=processors,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    level = torch.arange(model.n_levels, device=prompt.device)
    return Found(out.sequences - model.first_token - level * model.n_codes, out.sequences_scores)


@dataclass(frozen=True)
class DenseTrie:
    """Two levels as dense tables of what is *not* allowed: a mask is one gather. 16 MB at 4,096 codewords a level."""

    first_K: Tensor
    second_KK: Tensor


def dense_trie(codes_N2: npt.NDArray[np.integer], *, n_codes: int, device: str) -> DenseTrie:
    """The trie of a SID table of two levels."""
    first, second = torch.ones(n_codes, dtype=torch.bool), torch.ones(n_codes, n_codes, dtype=torch.bool)
    codes = torch.as_tensor(codes_N2, dtype=torch.int64)
    first[codes[:, 0]] = False
    second[codes[:, 0], codes[:, 1]] = False
    return DenseTrie(first.to(device), second.to(device))


@torch.inference_mode()
def replicated(lm: Any, model: Retriever, history: History, *, beams: int, trie: DenseTrie | None = None) -> Found:
    """The prompt once, its keys and values copied for every beam, one more pass: two levels, the level's output layer only."""
    out = lm.model(inputs_embeds=prompt_of(model, history), use_cache=True)
    logp_K = F.log_softmax((out.last_hidden_state[0, -1] @ model.codebook(0).T).float(), dim=-1)
    if trie is not None:
        logp_K.masked_fill_(trie.first_K, float("-inf"))
    scores_W, first_W = logp_K.topk(min(beams, model.n_codes))
    cache = out.past_key_values
    cache.batch_repeat_interleave(len(first_W))
    hidden_WD = lm.model(input_ids=model.token_ids(first_W, 0)[:, None], past_key_values=cache, use_cache=True).last_hidden_state[:, 0]
    logp_WK = F.log_softmax((hidden_WD @ model.codebook(1).T).float(), dim=-1)
    if trie is not None:
        logp_WK.masked_fill_(trie.second_KK[first_W], float("-inf"))
    best, chosen = (logp_WK + scores_W[:, None]).flatten().topk(beams)
    return Found(torch.stack([first_W[chosen // model.n_codes], chosen % model.n_codes], dim=1), best)
