"""A retriever that starts from codebooks knows what its SIDs know."""

import numpy as np
import pytest
import torch

from components.retriever.codeword_init import start_from_codebooks
from tests.unit.components.retriever.slow import tiny_model

SIDS = [(0, 1), (0, 2), (1, 0), (2, 3), (3, 3), (3, 0)]


@pytest.fixture
def books():
    return np.random.default_rng(0).normal(size=(2, 4, 10)).astype(np.float32) * np.array([2.0, 1.0], np.float32)[:, None, None]


def test_distances_between_items_are_those_of_their_reconstructions(books):
    model = tiny_model(SIDS, n_codes=4)
    start_from_codebooks(model, books)
    items = sum(model.codebook(level)[model.sid_codes[:, level]] for level in range(2)).detach()
    features = torch.tensor(np.array([books[0, a] + books[1, b] for a, b in SIDS]))
    expected = torch.cdist(features, features)
    ratio = torch.cdist(items, items)[expected > 0] / expected[expected > 0]
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-4)


def test_the_first_level_has_norm_one_half_on_average(books):
    model = tiny_model(SIDS, n_codes=4)
    start_from_codebooks(model, books)
    assert model.codebook(0).norm(dim=1).mean().item() == pytest.approx(0.5, rel=1e-5)


def test_the_merger_starts_near_the_sum_of_the_codewords(books):
    model = tiny_model(SIDS, n_codes=4)
    before = model.token_merger.weight.detach().clone()
    start_from_codebooks(model, books)
    identity = torch.eye(16)
    torch.testing.assert_close(model.token_merger.weight.detach(), before / 10 + torch.cat([identity, identity], dim=1))


def test_features_narrower_than_the_model_leave_the_rest_zero(books):
    model = tiny_model(SIDS, n_codes=4, history="tokens")
    start_from_codebooks(model, books[:, :, :3])
    assert model.codebook(1)[:, 3:].abs().max() == 0
