"""The beams are those of transformers' own beam search under a trie callback, on random and on trained weights."""

import numpy as np
import pytest
import torch

from components.retriever.beam_search import beam_search
from components.retriever.contract import History
from components.retriever.packing import collate
from components.semantic_ids.trie import build_trie
from infra.sections import LossConfig
from tests.benchmarks.decode_peers import causal_lm, found_by_us, generate, same_up_to_ties, trie_callback
from tests.unit.components.retriever import slow

K = 8
ITEMS = 40


def random_sids(levels, seed=0):
    """Few first codewords, so that beams share prefixes, and items that share leaves."""
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.integers(0, 5, ITEMS), *(rng.integers(0, K, ITEMS) for _ in range(levels - 1))])


def histories():
    rng = np.random.default_rng(1)
    return [History(rng.integers(0, ITEMS, n), rng.integers(1, 5, n)) for n in (0, 1, 4, 8)]


def train(model, sids, steps=10):
    """A few steps of the joint loss on random timelines."""
    rng = np.random.default_rng(2)
    rows = []
    for _ in range(6):
        targets = [(int(rng.integers(ITEMS)), 3 + t % 2, int(rng.integers(0, 6)), t) for t in range(4)]
        rows.append(slow.row(rng.integers(0, ITEMS, 5), rng.integers(1, 5, 5), targets))
    batch, loss = collate(rows), LossConfig(train_lambdas=[4] * sids.shape[1])
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(batch, loss)["loss"].backward()
        optimizer.step()
    return model.eval()


def world(layout, levels, weights):
    sids = random_sids(levels)
    model = slow.tiny_model(sids.tolist(), n_codes=K, seed=levels, history=layout)
    return sids, train(model, sids) if weights == "trained" else model


def ours(model, past, trie, beams):
    return found_by_us(beam_search(model, [past], trie, beams=[beams] * model.n_levels, lambdas=[K] * model.n_levels, score="iap"))


@pytest.mark.parametrize("weights", ["random", "trained"])
@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize("layout", ["merged", "tokens"])
def test_beams_under_a_trie_are_those_of_generate_with_a_trie_callback(layout, levels, weights):
    sids, model = world(layout, levels, weights)
    trie, lm = build_trie(sids, np.zeros(ITEMS), n_codes=K), causal_lm(model)
    callback = trie_callback(sids, first_token=model.first_token, n_codes=K)
    for past in histories():
        for beams in (2, 6, trie.n_leaves):
            expected = generate(lm, model, past, beams=beams, callback=callback)
            assert same_up_to_ties(ours(model, past, trie, beams), expected), f"history of {len(past.items)}, {beams} beams"


@pytest.mark.parametrize("weights", ["random", "trained"])
@pytest.mark.parametrize("levels", [2, 3])
def test_beams_without_a_trie_are_those_of_generate_without_a_callback(levels, weights):
    _, model = world("merged", levels, weights)
    lm = causal_lm(model)
    for past in histories():
        for beams in (3, 16):
            assert same_up_to_ties(ours(model, past, None, beams), generate(lm, model, past, beams=beams)), f"{beams} beams"


def test_a_batch_of_histories_gives_the_beams_of_generate_for_each():
    sids, model = world("merged", 3, "random")
    trie, lm = build_trie(sids, np.zeros(ITEMS), n_codes=K), causal_lm(model)
    callback = trie_callback(sids, first_token=model.first_token, n_codes=K)
    together = beam_search(model, histories(), trie, beams=[6] * 3, lambdas=[K] * 3, score="iap")
    for row, past in enumerate(histories()):
        assert same_up_to_ties(found_by_us(together, row), generate(lm, model, past, beams=6, callback=callback)), f"row {row}"
