"""Prompts that are computed from where a history has grown, against prompts that are computed whole."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.retriever.beam_search import search
from components.retriever.contract import History
from components.retriever.prefix import PrefixCache, prefill
from components.semantic_ids.trie import build_trie
from tests.unit.components.retriever.slow import tiny_model

SIDS = [[i, j] for i in range(4) for j in range(4)]


def history(*items, level=3):
    return History(np.array(items, dtype=np.int64), np.full(len(items), level, dtype=np.int64))


@pytest.fixture
def model():
    return tiny_model(SIDS, n_codes=4)


@pytest.fixture
def computed(model):
    """Positions that each call of the backbone computed, padding included."""
    counts = []
    model.backbone.register_forward_pre_hook(lambda _, args, kwargs: counts.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True)
    return counts


def assert_same(found, expected):
    torch.testing.assert_close(found.length_B, expected.length_B)
    torch.testing.assert_close(found.last_BD, expected.last_BD, rtol=1e-4, atol=1e-5)
    for row, length in enumerate(expected.length_B.tolist()):
        torch.testing.assert_close(found.hidden_BSD[row, :length], expected.hidden_BSD[row, :length], rtol=1e-4, atol=1e-5)
        for mine, theirs in zip([*found.keys, *found.values], [*expected.keys, *expected.values], strict=True):
            torch.testing.assert_close(mine[row, :, :length], theirs[row, :, :length], rtol=1e-4, atol=1e-5)


pasts = st.lists(st.integers(0, 15), max_size=8)


@given(
    st.lists(st.tuples(pasts, pasts, st.sampled_from("abc")), min_size=1, max_size=3, unique_by=lambda user: user[2]),
    st.sampled_from(["merged", "tokens"]),
)
@settings(max_examples=60, deadline=None)
def test_any_history_after_any_other_gives_what_it_gives_alone(visits, representation):
    model = tiny_model(SIDS, n_codes=4, history=representation)
    cache = PrefixCache(capacity=2)
    users = [user for _, _, user in visits]
    prefill(model, [history(*first) for first, _, _ in visits], cache, users)
    then = [history(*first[: len(second)], *second) for first, second, _ in visits]
    assert_same(prefill(model, then, cache, users), prefill(model, then))


@pytest.mark.parametrize("representation", ["merged", "tokens"])
def test_without_a_rank_head_the_last_layer_runs_over_the_last_positions_only(representation):
    model = tiny_model(SIDS, n_codes=4, history=representation)
    pasts = [history(1, 2, 3), history(), history(7, 7, 5, 0, 9)]
    rows = []
    model.backbone.layers[-1].mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    part, whole = prefill(model, pasts, for_rank_head=False), prefill(model, pasts)
    assert rows == [1, whole.hidden_BSD.shape[1]]
    assert part.hidden_BSD is None
    torch.testing.assert_close(part.last_BD, whole.last_BD, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip([*part.keys, *part.values], [*whole.keys, *whole.values], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_only_what_is_new_is_computed(model, computed):
    cache = PrefixCache(capacity=4)
    prefill(model, [history(1, 2, 3, 4, 5)], cache, ["u"])
    prefill(model, [history(1, 2, 3, 4, 5, 6, 7)], cache, ["u"])
    assert computed == [6, 2]


def test_the_same_history_again_computes_one_position_of_padding(model, computed):
    cache = PrefixCache(capacity=4)
    for _ in range(2):
        prefill(model, [history(1, 2)], cache, ["u"])
    assert computed == [3, 1]


def test_another_beginning_is_computed_from_where_it_differs(model, computed):
    cache = PrefixCache(capacity=4)
    prefill(model, [history(1, 2, 3, 4)], cache, ["u"])
    prefill(model, [history(1, 2, 9, 4)], cache, ["u"])
    assert computed == [5, 2]


def test_another_feedback_on_the_same_item_is_not_the_same_event(model, computed):
    cache = PrefixCache(capacity=4)
    prefill(model, [history(1, 2, level=3)], cache, ["u"])
    prefill(model, [history(1, 2, level=4)], cache, ["u"])
    assert computed == [3, 2]


def test_users_do_not_share_prompts(model, computed):
    cache = PrefixCache(capacity=4)
    prefill(model, [history(1, 2)], cache, ["u"])
    prefill(model, [history(1, 2)], cache, ["v"])
    assert computed == [3, 3]


def test_another_model_does_not_read_what_the_first_one_computed():
    cache, other = PrefixCache(capacity=4), tiny_model(SIDS, n_codes=4, seed=1)
    prefill(tiny_model(SIDS, n_codes=4), [history(1, 2)], cache, ["u"])
    assert_same(prefill(other, [history(1, 2)], cache, ["u"]), prefill(other, [history(1, 2)]))


def test_the_user_asked_for_longest_ago_is_forgotten(model, computed):
    cache = PrefixCache(capacity=2)
    for user in ("a", "b", "a", "c"):
        prefill(model, [history(1, 2)], cache, [user])
    assert len(cache) == 2
    prefill(model, [history(1, 2)], cache, ["a"])
    prefill(model, [history(1, 2)], cache, ["b"])
    assert computed[-2:] == [1, 3]


def test_beams_behind_a_grown_prompt_equal_beams_behind_a_whole_one(model):
    trie = build_trie(np.array(SIDS), np.zeros(16), n_codes=4)
    cache, then = PrefixCache(capacity=4), [history(3, 1, 4, 1), history(5)]
    prefill(model, [history(3, 1), history(5)], cache, ["u", "v"])
    settings_ = {"beams": [4, 16], "lambdas": [4, 4], "score": "sum"}
    grown = search(model, prefill(model, then, cache, ["u", "v"]), trie, **settings_)
    whole = search(model, prefill(model, then), trie, **settings_)
    torch.testing.assert_close(grown.scores_BW, whole.scores_BW, rtol=1e-4, atol=1e-4)
    assert torch.equal(grown.leaves_BW, whole.leaves_BW)
