"""What the benchmarks compare is equal: their own exactness checks at tiny sizes, and that these checks can fail."""

import dataclasses

import pytest
import torch

from tests.benchmarks import decode, rank_head, trie
from tests.unit.components.retriever import slow

TINY = decode.Shape(hidden=32, layers=2, heads=2, kv_heads=1, ff=64, positions=9, codes=16, items=60, rank_heads=2, rank_mlp=16)


@pytest.mark.parametrize("constrained", [False, True], ids=["every SID legal", "under a trie"])
@pytest.mark.parametrize("beams", [4, 24])
def test_all_decoders_of_the_benchmark_find_the_same_sids(beams, constrained):
    task = decode.build_task(TINY, users=1)
    assert decode.compare(task, beams, constrained=constrained, rounds=1, slow_rounds=1).exact


def test_a_peer_that_reads_another_history_is_not_exact(monkeypatch):
    task = decode.build_task(TINY, users=2)
    replicated = decode.replicated
    monkeypatch.setattr(decode, "replicated", lambda lm, model, _, **kwargs: replicated(lm, model, task.histories[1], **kwargs))
    assert not decode.compare(task, 8, constrained=True, rounds=1, slow_rounds=1).exact


def test_the_catalogue_of_a_task_has_no_collisions():
    task = decode.build_task(TINY, users=1)
    assert len({tuple(sid) for sid in task.sids_N2.tolist()}) == TINY.items


def test_the_gather_and_the_callbacks_allow_the_same_codewords():
    step = trie.build_step(items=80, codes=16, beams=6)
    processors = trie.callback_processors(step)
    assert [trie.same_constraint(step, processor) for processor in processors.values()] == [True, True]


def test_a_callback_over_another_catalogue_is_not_the_same():
    step = trie.build_step(items=80, codes=16, beams=6)
    first = int(step.first_W[0])
    follows = sorted(step.sids_N2[step.sids_N2[:, 0] == first][:, 1].tolist())
    missing = next(code for code in range(16) if code not in follows)
    changed = step.sids_N2.copy()
    changed[(changed == [first, follows[0]]).all(axis=1)] = [first, missing]
    processor = trie.callback_processors(dataclasses.replace(step, sids_N2=changed))["callback, lists"]
    assert not trie.same_constraint(step, processor)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("way", [rank_head.factorised, *rank_head.NAIVE.values()], ids=["ours", *rank_head.NAIVE])
def test_every_way_to_score_candidates_equals_one_codeword_at_a_time(way, heads):
    work = rank_head.build_work(beams=3, codes=4, codebook=6, positions=5, width=8, heads=heads)
    with torch.no_grad():
        expected = [
            [float(slow.rank_score(work.head, work.codebook_KD[code], [*work.history_SD, *own])) for code in codes]
            for codes, own in zip(work.codes_WC, work.own_WLD, strict=True)
        ]
    torch.testing.assert_close(way(work), torch.tensor(expected), rtol=1e-4, atol=1e-5)
