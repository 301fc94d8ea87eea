"""RQ-VAE: what a small one must reach on made-up clusters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from components.semantic_ids.quantize import codebook_tensors
from components.semantic_ids.rq_vae import RQVAE
from components.semantic_ids.shards import Codebook, Codes, LocalShards, Matrix
from infra.errors import DataError, TrainingError
from infra.sections import RqVaeConfig

N_CLUSTERS, AN_CLUSTER, WIDTH = 8, 60, 16
SMALL = RqVaeConfig(latent_dim=8, hidden_dims=[32], epochs=20, batch=64, learning_rate=3e-3)


def clusters(*, spread: float = 0.3, sizes: list[int] | None = None) -> tuple[Matrix, np.ndarray]:
    """Rows around far centres, of short length, and the number of each row's cluster."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(N_CLUSTERS), sizes or [AN_CLUSTER] * N_CLUSTERS)
    centres = rng.normal(size=(N_CLUSTERS, WIDTH))
    rows = centres[labels] + spread * rng.normal(size=(len(labels), WIDTH))
    order = rng.permutation(len(labels))
    return (0.05 * rows[order]).astype(np.float32), labels[order]


ROWS, LABELS = clusters()


def fitted(rows: Matrix = ROWS, *, codes: int = 8, seed: int = 0, **settings: Any) -> tuple[RQVAE, Codes]:
    quantizer = RQVAE(2, codes, SMALL.model_copy(update=settings), seed=seed)
    return quantizer, quantizer.fit(LocalShards(rows, rows=200))


def error(quantizer: RQVAE, rows: Matrix = ROWS) -> float:
    """Reconstruction error as a share of that of predicting the mean."""
    return float(np.mean((quantizer.reconstruct(quantizer.encode(rows)) - rows) ** 2) / np.mean((rows - rows.mean(0)) ** 2))


def utilisation(codes_NM: Codes, codes: int) -> list[float]:
    return [len(np.unique(column)) / codes for column in codes_NM.T]


def perplexity(column: Codes) -> float:
    share = np.bincount(column) / len(column)
    return float(np.exp(-(share[share > 0] * np.log(share[share > 0])).sum()))


@pytest.fixture(scope="module")
def trained() -> tuple[RQVAE, Codes]:
    return fitted()


def test_codes_are_int32_in_range_one_a_level(trained: tuple[RQVAE, Codes]) -> None:
    codes = trained[1]
    assert codes.shape == (len(ROWS), 2)
    assert codes.dtype == np.int32
    assert codes.min() >= 0 and codes.max() < 8


def test_fit_returns_the_codes_of_encode(trained: tuple[RQVAE, Codes]) -> None:
    quantizer, codes = trained
    # Matrix products of other sizes may round differently, which decides ties.
    assert (quantizer.encode(ROWS) == codes).mean() > 0.999


def test_items_of_a_cluster_share_their_first_code(trained: tuple[RQVAE, Codes]) -> None:
    first = trained[1][:, 0]
    most = [np.bincount(first[label == LABELS]).max() for label in range(N_CLUSTERS)]
    assert sum(most) / len(ROWS) > 0.95


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_reconstruction_is_far_better_than_the_mean(codebook: str) -> None:
    assert error(fitted(codebook=codebook)[0]) < 0.2


def test_training_lowers_the_reconstruction_error(trained: tuple[RQVAE, Codes]) -> None:
    assert error(trained[0]) < 0.5 * error(fitted(epochs=1)[0])


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_codewords_are_used_where_items_vary_enough(codebook: str) -> None:
    codes = fitted(codes=32, codebook=codebook)[1]
    assert min(utilisation(codes, 32)) >= 0.9


def test_sinkhorn_makes_the_last_level_more_even_on_skewed_items() -> None:
    rows, _ = clusters(spread=0.1, sizes=[400, 30, 10, 10, 10, 10, 5, 5])
    plain, even = (perplexity(fitted(rows, sinkhorn=sinkhorn)[1][:, -1]) for sinkhorn in (False, True))
    assert even > plain


def test_a_restored_quantizer_encodes_equally(trained: tuple[RQVAE, Codes]) -> None:
    restored = RQVAE.restore(trained[0].tensors())
    np.testing.assert_array_equal(restored.encode(ROWS), trained[0].encode(ROWS))


def test_a_restored_quantizer_reconstructs_equally(trained: tuple[RQVAE, Codes]) -> None:
    restored = RQVAE.restore(trained[0].tensors())
    np.testing.assert_array_equal(restored.reconstruct(trained[1]), trained[0].reconstruct(trained[1]))


def test_a_restored_quantizer_knows_its_widths() -> None:
    quantizer, _ = fitted(epochs=1, latent_dim=4, hidden_dims=[12, 6])
    settings = RQVAE.restore(quantizer.tensors()).settings
    assert (settings.latent_dim, settings.hidden_dims) == (4, [12, 6])


def test_all_tensors_are_float32(trained: tuple[RQVAE, Codes]) -> None:
    assert {tensor.dtype for tensor in trained[0].tensors().values()} == {np.dtype(np.float32)}


def test_prices_are_zero(trained: tuple[RQVAE, Codes]) -> None:
    assert not trained[0].tensors()["prices"].any()


def test_codes_are_nearest_codewords_in_the_latent_space(trained: tuple[RQVAE, Codes]) -> None:
    quantizer = replace(trained[0])
    latents = quantizer.project(ROWS[:2])
    quantizer.codebooks = (Codebook.free(latents[::-1].copy()),)
    assert quantizer.encode(ROWS[:2])[:, 0].tolist() == [1, 0]


def test_no_rows_have_no_codes(trained: tuple[RQVAE, Codes]) -> None:
    assert trained[0].encode(ROWS[:0]).shape == (0, 2)


def test_equal_seeds_give_equal_tensors() -> None:
    one, again = (fitted(epochs=3)[0].tensors() for _ in range(2))
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor, again[name])


def test_other_seeds_give_other_codebooks() -> None:
    one, other = (codebook_tensors(fitted(epochs=3, seed=seed)[0].codebooks)["codebooks"] for seed in (1, 2))
    assert not np.array_equal(one, other)


def test_the_length_of_the_features_does_not_matter() -> None:
    # Powers of two change no digit of the quotients.
    np.testing.assert_array_equal(fitted(ROWS * 1024, epochs=3)[1], fitted(epochs=3)[1])


def test_an_earlier_fit_hands_on_the_numbers_of_its_clusters(trained: tuple[RQVAE, Codes]) -> None:
    codes = RQVAE(2, 8, SMALL, seed=5).fit(LocalShards(ROWS), before_NM=trained[1])
    assert (codes[:, 0] == trained[1][:, 0]).mean() > 0.9


def test_every_epoch_is_told() -> None:
    told: list[tuple[int, int]] = []
    RQVAE(2, 8, SMALL.model_copy(update={"epochs": 3})).fit(LocalShards(ROWS), tell=lambda *progress: told.append(progress))
    assert told == [(0, 0), (0, 1), (0, 2)]


def test_items_that_are_all_zero_are_no_error() -> None:
    quantizer, _ = fitted(np.zeros((20, 3), np.float32), epochs=2)
    assert np.isfinite(quantizer.reconstruct(quantizer.encode(np.zeros((1, 3), np.float32)))).all()


def test_training_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    fitted(epochs=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_too_few_items_name_the_setting() -> None:
    with pytest.raises(DataError, match="7 items cannot fill 8 codewords") as caught:
        fitted(ROWS[:7])
    assert caught.value.where == "semantic_ids.codes"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    rows = ROWS.copy()
    rows[3, 1] = value
    with pytest.raises(DataError, match="not finite"):
        fitted(rows)


def test_a_loss_that_is_not_finite_ends_the_training_and_names_the_rate() -> None:
    with pytest.raises(TrainingError, match=r"loss is (inf|nan)") as caught:
        fitted(learning_rate=1e20)
    assert "semantic_ids.rq_vae.learning_rate" in caught.value.mend
