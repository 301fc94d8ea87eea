import pytest
import torch

from components.retriever import rank_head
from components.retriever.packing import collate
from components.retriever.rank_head import RankHead
from tests.unit.components.retriever import slow
from tests.unit.components.retriever.slow import row, tiny_model

B, S, D, K, Q, C = 2, 5, 8, 6, 3, 4


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    visible = torch.arange(S) <= torch.tensor([[0, 2, 4], [4, 1, 0]])[..., None]
    return torch.randn(K, D), torch.randint(K, (B, Q, C)), torch.randn(B, S, D), visible


def head_of(heads):
    torch.manual_seed(heads)
    head = RankHead(D, heads=heads, mlp=7, dropout=0.0)
    torch.nn.init.normal_(head.mlp[-1].weight)  # a fresh head says 0 of everything
    return head


def test_a_fresh_head_corrects_nothing(inputs):
    codebook, codes, history, visible = inputs
    head = RankHead(D, heads=2, mlp=7, dropout=0.0)
    assert not head(codebook, codes, history, visible, torch.randn(B, Q, 1, D)).any()


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("own", [0, 1, 2])
def test_the_shared_attention_equals_one_attention_for_each_candidate(inputs, heads, own):
    codebook, codes, history, visible = inputs
    head, own_states = head_of(heads), torch.randn(B, Q, own, D)
    scores = head(codebook, codes, history, visible, own_states)
    assert scores.shape == (B, Q, C)
    for b in range(B):
        for q in range(Q):
            states = [*history[b][visible[b, q]], *own_states[b, q]]
            for c in range(C):
                expected = slow.rank_score(head, codebook[codes[b, q, c]], states)
                torch.testing.assert_close(scores[b, q, c], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("own", [0, 1, 2])
def test_attention_taken_once_for_all_beams_equals_one_attention_for_each_candidate(inputs, heads, own):
    codebook, codes, history, visible = inputs
    head, own_states, of_row = head_of(heads), torch.randn(B, Q, own, D), visible[:, 1]
    scores = head.score(head.prepare(codebook, history, of_row), codes, own_states)
    for b in range(B):
        for w in range(Q):
            states = [*history[b][of_row[b]], *own_states[b, w]]
            for c in range(C):
                expected = slow.rank_score(head, codebook[codes[b, w, c]], states)
                torch.testing.assert_close(scores[b, w, c], expected, rtol=1e-5, atol=1e-5)


def test_the_number_of_beams_and_users_handled_at_once_does_not_matter(inputs, monkeypatch):
    codebook, codes, history, visible = inputs
    head, own = head_of(2), torch.randn(B, Q, 1, D)
    at_once = head.score(head.prepare(codebook, history, visible[:, 2]), codes, own)
    monkeypatch.setattr(rank_head, "_HIDDEN_AT_ONCE", {"cpu": 1})
    monkeypatch.setattr(rank_head, "_SCORES_AT_ONCE", {"cpu": 1})
    one_by_one = head.score(head.prepare(codebook, history, visible[:, 2]), codes, own)
    torch.testing.assert_close(one_by_one, at_once, rtol=1e-6, atol=1e-6)


def test_very_large_scores_stay_finite(inputs):
    codebook, codes, history, visible = inputs
    scores = head_of(2)(codebook * 1e3, codes, history * 1e3, visible, torch.randn(B, Q, 1, D) * 1e3)
    assert torch.isfinite(scores).all()


def test_very_large_scores_stay_finite_behind_a_shared_history(inputs):
    codebook, codes, history, visible = inputs
    head = head_of(2)
    shared = head.prepare(codebook * 1e3, history * 1e3, visible[:, 0])
    assert torch.isfinite(head.score(shared, codes, torch.randn(B, Q, 1, D) * 1e3)).all()


def test_hidden_history_has_no_effect(inputs):
    codebook, codes, history, visible = inputs
    head, own = head_of(2), torch.randn(B, Q, 1, D)
    before = head(codebook, codes, history, visible, own)
    changed = history.clone()
    changed[:, 3:] += 100.0
    after = head(codebook, codes, changed, visible, own)
    unaffected = ~visible[:, :, 3]
    assert torch.equal(after[unaffected], before[unaffected])
    assert not torch.isclose(after[~unaffected], before[~unaffected]).any()


def scores_of(model, packed, sids, level):
    batch = collate([packed])
    encoded = model.encode(batch, torch.tensor([sids]))
    targets = torch.arange(len(sids))[None]
    return model.rank_scores(encoded, batch, targets, torch.arange(model.n_codes).expand(1, len(sids), -1), level)[0]


def test_items_after_a_targets_request_have_no_effect_on_its_scores():
    model = tiny_model([[0, 1], [2, 3], [1, 1]], n_codes=4)
    targets, sids = [(0, 3, 1, 0), (1, 3, 2, 1)], [[0, 1], [2, 3]]
    for level in range(2):
        one = scores_of(model, row([0, 1], [3, 3], targets), sids, level)
        other = scores_of(model, row([0, 2], [3, 4], targets), sids, level)
        torch.testing.assert_close(one[0], other[0], rtol=1e-6, atol=1e-6)
        assert not torch.allclose(one[1], other[1])


def test_the_second_level_looks_at_the_targets_own_first_codeword_and_the_first_does_not():
    model = tiny_model([[0, 1], [2, 3], [1, 1]], n_codes=4)
    packed = row([0, 1], [3, 3], [(0, 3, 2, 0)])
    first, second = (lambda level, sid: scores_of(model, packed, [sid], level)[0]), 1
    assert torch.equal(first(0, [0, 1]), first(0, [3, 1]))
    assert not torch.allclose(first(second, [0, 1]), first(second, [3, 1]))
    assert torch.equal(first(second, [0, 1]), first(second, [0, 2]))
