"""RQ-VAE: steps by hand, and what a small one must reach on made-up clusters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from components.semantic_ids.quantize import codebook_tensors
from components.semantic_ids.rq_vae import RQVAE, _batches, _evenly, _step, _TrainedCodebooks
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


def trained_codebooks(codewords: list[list[float]], sizes: list[list[float]] | None = None, **settings: Any) -> _TrainedCodebooks:
    """Codewords on a line, a list of them for each level."""
    codewords_MKL = np.array(codewords, np.float32)[:, :, None]
    sizes_MK = np.ones(codewords_MKL.shape[:2], np.float32) if sizes is None else np.array(sizes, np.float32)
    return _TrainedCodebooks(codewords_MKL, sizes_MK, SMALL.model_copy(update=settings))


def line(*places: float) -> torch.Tensor:
    return torch.tensor(places, dtype=torch.float32)[:, None]


@pytest.fixture(scope="module")
def trained() -> tuple[RQVAE, Codes]:
    return fitted()


# One step of the codebooks, by hand.


def test_a_row_becomes_the_sum_of_the_nearest_codeword_of_each_residual() -> None:
    quantized, _ = trained_codebooks([[0, 10], [-1, 2]]).quantize(line(9.5, 1.8))
    # 9.5: 10, then -0.5 is nearest to -1; 1.8: 0, then 2.
    assert quantized[:, 0].tolist() == [9, 2]


def test_the_commitment_is_the_weighted_squared_residual_of_every_level() -> None:
    _, loss = trained_codebooks([[0, 10], [-1, 2]], commitment=0.5).quantize(line(9.5, 1.8))
    # Left over: -0.5 and 1.8 after the first level, 0.5 and -0.2 after the second.
    assert loss.item() == pytest.approx(0.5 * ((0.25 + 3.24) / 2 + (0.25 + 0.04) / 2))


def test_a_moving_average_goes_its_share_of_the_way_to_the_mean_of_the_rows() -> None:
    books = trained_codebooks([[0, 10]], [[2, 1]], ema_decay=0.5)
    books.quantize(line(1, 3))
    # Two rows a batch before and now: half-way from 0 to their mean, 2. Nobody took 10.
    assert books.codewords_MKL[0, :, 0].tolist() == [1, 10]


def test_a_codeword_that_many_batches_leave_out_stays_where_it_is() -> None:
    books = trained_codebooks([[0, 10]])
    for _ in range(3000):
        books._average(0, line(0.0), torch.tensor([0]))
    assert books.codewords_MKL[0, :, 0].tolist() == [0, 10]


def test_the_codebook_loss_pulls_codewords_towards_their_rows_alone() -> None:
    books = trained_codebooks([[0, 10]], codebook="gradient", commitment=0)
    latents = line(1, 3).requires_grad_()
    _, loss = books.quantize(latents)
    loss.backward()
    # d/de of mean((x - e)^2) at e = 0: -2 (1 + 3) / 2.
    assert books.codewords_MKL.grad[0, :, 0].tolist() == [-4, 0]
    assert latents.grad.abs().sum() == 0


def revive(books: _TrainedCodebooks, *latents: float) -> None:
    books.revive(lambda: line(*latents).numpy(), np.random.default_rng(0))


def test_only_codewords_that_nobody_took_are_revived() -> None:
    books = trained_codebooks([[0, 100]], codebook="gradient")
    books.quantize(line(1, 2))
    revive(books, 3, 3)
    assert books.codewords_MKL[0, :, 0].tolist() == [0, 3]


def test_a_revived_codeword_lies_on_what_its_level_left_over() -> None:
    books = trained_codebooks([[0, 10], [0, 50]], codebook="gradient")
    books.quantize(line(0, 10))
    revive(books, 4, 14)
    assert books.codewords_MKL[1, :, 0].tolist() == [0, 4]


def test_a_codeword_that_was_taken_in_an_earlier_epoch_only_is_revived() -> None:
    books = trained_codebooks([[0, 10]], codebook="gradient")
    books.quantize(line(0, 10))
    revive(books)
    books.quantize(line(0, 0))
    revive(books, 3, 3)
    assert books.codewords_MKL[0, :, 0].tolist() == [0, 3]


def test_transport_gives_every_codeword_its_share_of_rows_that_all_prefer_one() -> None:
    # All are far nearer to 0 than to 10; the last two mind 10 least.
    places = torch.tensor([0, 0.2, 0.4, 0.6])[:, None]
    assert _evenly((places - torch.tensor([[0, 10]])) ** 2).tolist() == [0, 0, 1, 1]


def test_transport_of_rows_that_are_all_alike_is_no_error() -> None:
    assert _evenly(torch.zeros(3, 2)).tolist() == [0, 0, 0]


def test_the_reconstruction_reaches_the_encoder_through_the_codewords() -> None:
    network = fitted(epochs=1)[0].network
    before = network.encoder[0].weight.detach().clone()
    books = _TrainedCodebooks(np.zeros((1, 2, 8), np.float32), np.ones((1, 2), np.float32), SMALL.model_copy(update={"commitment": 0}))
    _step(network, books, torch.optim.SGD(network.parameters(), lr=0.1), torch.ones(4, WIDTH), 0)
    assert not torch.equal(network.encoder[0].weight, before)


def test_an_epoch_has_every_row_once_in_batches_across_shards() -> None:
    rows = np.arange(25, dtype=np.float32)[:, None]
    batches = list(_batches(LocalShards(rows, rows=10), 4, np.random.default_rng(0)))
    assert [len(batch) for batch in batches] == [4] * 6 + [1]
    assert sorted(np.concatenate(batches)[:, 0].tolist()) == rows[:, 0].tolist()


# A small one, trained.


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
