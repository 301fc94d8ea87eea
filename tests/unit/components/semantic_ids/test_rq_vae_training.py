"""Steps of the RQ-VAE: by hand, and by parts against a slow and obvious loop over whole minibatches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.semantic_ids.rq_vae_training import (
    OPEN,
    Autoencoder,
    Model,
    TrainedCodebooks,
    Trainer,
    even_prices,
    minibatches,
    quantize,
)
from components.semantic_ids.shards import Ints, LocalShards, Matrix, add_up
from infra.sections import RqVaeConfig

SMALL = RqVaeConfig(latent_dim=4, hidden_dims=[12], batch=32, learning_rate=3e-3)
RNG = np.random.default_rng(0)
ROWS = (RNG.normal(size=(6, 10))[RNG.integers(6, size=100)] + 0.3 * RNG.normal(size=(100, 10))).astype(np.float32)
CODEWORDS = RNG.normal(scale=0.3, size=(2, 6, 4)).astype(np.float32)
SIZES = np.full((2, 6), 32 / 6, np.float32)


class Apart(LocalShards):
    """Each shard has a process of its own, or so it seems."""

    def together(self, compute: Callable[[Matrix], Any], rows: Mapping[int, Ints]) -> list[Any]:
        """A call for each shard."""
        return [result for shard in sorted(rows) for result in super(Apart, self).together(compute, {shard: rows[shard]})]


def line(*places: float) -> Tensor:
    return torch.tensor(places, dtype=torch.float32)[:, None]


def on_a_line(codewords: list[list[float]]) -> Matrix:
    """Codewords, a list of them for each level."""
    return np.array(codewords, np.float32)[:, :, None]


def books(codewords: list[list[float]], sizes: list[list[float]] | None = None, **settings: Any) -> TrainedCodebooks:
    codewords_MKL = on_a_line(codewords)
    sizes_MK = np.ones(codewords_MKL.shape[:2], np.float32) if sizes is None else np.array(sizes, np.float32)
    return TrainedCodebooks(codewords_MKL, sizes_MK, SMALL.model_copy(update=settings))


def learn(trained: TrainedCodebooks, *latents: float) -> None:
    found = quantize(line(*latents), trained.codewords_MKL.detach())
    trained.learn(found.counts_MK, found.offsets_MKL, len(latents))


def revive(trained: TrainedCodebooks, *latents: float) -> None:
    trained.revive(lambda: line(*latents).numpy(), np.random.default_rng(0))


# By hand.


def test_a_row_becomes_the_sum_of_the_nearest_codeword_of_each_residual() -> None:
    found = quantize(line(9.5, 1.8), torch.from_numpy(on_a_line([[0, 10], [-1, 2]])))
    # 9.5: 10, then -0.5 is nearest to -1; 1.8: 0, then 2.
    assert found.sums_nL[:, 0].tolist() == [9, 2]


def test_what_every_level_leaves_is_squared_and_summed() -> None:
    found = quantize(line(9.5, 1.8), torch.from_numpy(on_a_line([[0, 10], [-1, 2]])))
    # Left over: -0.5 and 1.8 after the first level, 0.5 and -0.2 after the second.
    assert found.squares.item() == pytest.approx(0.25 + 3.24 + 0.25 + 0.04)


def test_a_codeword_knows_how_many_rows_took_it_and_what_it_leaves_of_them() -> None:
    found = quantize(line(1, 3, 11), torch.from_numpy(on_a_line([[0, 10]])))
    assert found.counts_MK.tolist() == [[2, 1]]
    assert found.offsets_MKL[0, :, 0].tolist() == [4, 1]


def test_a_moving_average_goes_its_share_of_the_way_to_the_mean_of_the_rows() -> None:
    trained = books([[0, 10]], [[2, 1]], ema_decay=0.5)
    learn(trained, 1, 3)
    # Two rows a batch before and now: half-way from 0 to their mean, 2. Nobody took 10.
    assert trained.codewords_MKL[0, :, 0].tolist() == [1, 10]


def test_a_codeword_that_many_batches_leave_out_stays_where_it_is() -> None:
    trained = books([[0, 10]])
    for _ in range(3000):
        learn(trained, 0)
    assert trained.codewords_MKL[0, :, 0].tolist() == [0, 10]


def test_the_codebook_loss_pulls_codewords_towards_their_rows() -> None:
    trained = books([[0, 10]], codebook="gradient")
    learn(trained, 1, 3)
    # d/de of mean((x - e)^2) at e = 0: -2 (1 + 3) / 2.
    assert trained.codewords_MKL.grad is not None
    assert trained.codewords_MKL.grad[0, :, 0].tolist() == [-4, 0]


def test_only_codewords_that_nobody_took_are_revived() -> None:
    trained = books([[0, 100]], codebook="gradient")
    learn(trained, 1, 2)
    revive(trained, 3, 3)
    assert trained.codewords_MKL[0, :, 0].tolist() == [0, 3]


def test_a_revived_codeword_lies_on_what_its_level_left_over() -> None:
    trained = books([[0, 10], [0, 50]], codebook="gradient")
    learn(trained, 0, 10)
    revive(trained, 4, 14)
    assert trained.codewords_MKL[1, :, 0].tolist() == [0, 4]


def test_a_codeword_that_was_taken_in_an_earlier_epoch_only_is_revived() -> None:
    trained = books([[0, 10]], codebook="gradient")
    learn(trained, 0, 10)
    revive(trained)
    learn(trained, 0, 0)
    revive(trained, 3, 3)
    assert trained.codewords_MKL[0, :, 0].tolist() == [0, 3]


def test_prices_give_every_codeword_its_share_of_rows_that_all_prefer_one() -> None:
    # All are far nearer to 0 than to 10; the last two mind 10 least.
    places, codewords = line(0, 0.2, 0.4, 0.6), line(0, 10)
    assert ((places - codewords.T) ** 2 + even_prices(places, codewords)).argmin(1).tolist() == [0, 0, 1, 1]


def test_rows_that_are_all_alike_have_finite_prices() -> None:
    assert torch.isfinite(even_prices(torch.zeros(3, 1), torch.zeros(2, 1))).all()


def test_the_reconstruction_reaches_the_encoder_through_the_codewords() -> None:
    network = Autoencoder([10, 12, 4], 0)
    _, _, _, first, *_ = Model(network, 1.0, torch.zeros(1, 2, 4)).part(ROWS, batch=len(ROWS), commitment=0)
    assert np.abs(first).max() > 0


# Minibatches.


def batches_of(shards: LocalShards, batch: int = 4) -> list[dict[int, Ints]]:
    return list(minibatches(shards, batch, np.random.default_rng(0)))


def test_an_epoch_has_every_row_once_in_minibatches_across_shards() -> None:
    batches = batches_of(LocalShards(np.zeros((25, 1), np.float32), rows=10))
    assert [sum(map(len, rows.values())) for rows in batches] == [4] * 6 + [1]
    assert sorted(10 * shard + row for rows in batches for shard, numbers in rows.items() for row in numbers) == list(range(25))


def test_many_shards_have_every_row_once_and_few_are_open_at_a_time() -> None:
    shards = Watched(np.zeros((20 * 50 - 3, 1), np.float32), rows=50)
    batches = batches_of(shards, 16)
    assert sorted(50 * shard + row for rows in batches for shard, numbers in rows.items() for row in numbers) == list(range(997))
    assert shards.most_held == OPEN
    assert shards.held == set()


class Watched(LocalShards):
    """Knows which shards are in memory."""

    held, most_held = set[int](), 0

    def each(self, method: str, arguments: Any) -> list[Any]:
        """A call for each."""
        if method == "hold":
            self.held = {shard for shard, (held,) in enumerate(arguments) if held}
            self.most_held = max(self.most_held, len(self.held))
        return super().each(method, arguments)


@pytest.mark.parametrize("processes", [2, 4])
def test_every_process_has_its_share_of_a_minibatch(processes: int) -> None:
    shards = LocalShards(np.zeros((16 * 100, 1), np.float32), rows=100)
    for rows in batches_of(shards, 80):
        shares = np.bincount([shard * processes // 16 for shard, numbers in rows.items() for _ in numbers], minlength=processes)
        assert shares.min() > 0.4 * 80 / processes


# By parts.


@pytest.mark.parametrize("with_codebooks", [False, True])
@pytest.mark.parametrize("cuts", [[50], [1, 99], [10, 20, 70]])
def test_gradients_by_parts_are_the_gradient_of_the_whole(cuts: list[int], with_codebooks: bool) -> None:
    model = Model(Autoencoder([10, 12, 4], 0), 2.0, torch.from_numpy(CODEWORDS) if with_codebooks else None)
    options = {"batch": len(ROWS), "commitment": 0.25}
    whole = model.part(ROWS, **options)
    for one, other in zip(add_up(model.part(rows, **options) for rows in np.split(ROWS, cuts)), whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sinkhorn", [False, True])
@pytest.mark.parametrize("codebook", ["ema", "gradient"])
@pytest.mark.parametrize("kind", [LocalShards, Apart])
def test_steps_by_parts_are_those_of_a_plain_loop(kind: type[LocalShards], codebook: str, sinkhorn: bool) -> None:
    settings = SMALL.model_copy(update={"codebook": codebook, "sinkhorn": sinkhorn})
    # Of fewer rows than codewords some are spread over two alike, and noise decides: every minibatch has more.
    shards, rng = kind(ROWS[:96], rows=30), np.random.default_rng(0)
    batches = [rows for _ in range(3) for rows in minibatches(shards, settings.batch, rng)]
    trainer = Trainer(Autoencoder([10, 12, 4], 0), 1.0, settings)
    plain = copy.deepcopy(trainer.network)
    trainer.begin(TrainedCodebooks(CODEWORDS, SIZES.copy(), settings))
    for rows in batches:
        trainer.step(shards, rows, 0)
    whole = [np.concatenate([30 * shard + numbers for shard, numbers in rows.items()]) for rows in batches]
    codewords = plain_loop(plain, [torch.from_numpy(ROWS[rows]) for rows in whole], settings)
    assert trainer.codebooks is not None
    assert not np.allclose(codewords, CODEWORDS, atol=1e-3)
    np.testing.assert_allclose(trainer.codebooks.codewords_MKL.detach(), codewords, atol=1e-5)
    for weight, other in zip(trainer.network.parameters(), plain.parameters(), strict=True):
        np.testing.assert_allclose(weight.detach(), other.detach(), atol=1e-5)


def plain_loop(network: Autoencoder, batches: list[Tensor], settings: RqVaeConfig) -> Matrix:
    """Train on whole minibatches, gradients of codewords by autograd, moving averages of counts and sums; returns the codewords."""
    codewords_MKL, by_gradient = nn.Parameter(torch.from_numpy(CODEWORDS).clone()), settings.codebook == "gradient"
    counts_MK = torch.from_numpy(SIZES.copy())
    sums_MKL = counts_MK[:, :, None] * codewords_MKL.detach()
    optimizer = torch.optim.Adam([*network.parameters(), *([codewords_MKL] if by_gradient else [])], lr=settings.learning_rate)
    for rows_BD in batches:
        latents_BL = network.encoder(rows_BD)
        residual_BL, loss = latents_BL, torch.zeros(())
        averages_MKL = codewords_MKL.detach().clone()
        for level in range(2):
            distances_BK = torch.cdist(residual_BL.detach(), codewords_MKL[level].detach()) ** 2
            codes_B = transported(distances_BK) if settings.sinkhorn and level == 1 else distances_BK.argmin(1)
            chosen_BL = codewords_MKL[level][codes_B]
            loss = loss + settings.commitment * F.mse_loss(residual_BL, chosen_BL.detach())
            loss = loss + by_gradient * F.mse_loss(chosen_BL, residual_BL.detach())
            taken_BK = F.one_hot(codes_B, 6).float()
            decay = settings.ema_decay
            counts_MK[level] = decay * counts_MK[level] + (1 - decay) * taken_BK.sum(0)
            sums_MKL[level] = decay * sums_MKL[level] + (1 - decay) * taken_BK.T @ residual_BL.detach()
            averages_MKL[level] = sums_MKL[level] / counts_MK[level][:, None]
            residual_BL = residual_BL - chosen_BL.detach()
        straight_through_BL = latents_BL + ((latents_BL - residual_BL) - latents_BL).detach()
        loss = loss + F.mse_loss(network.decoder(straight_through_BL), rows_BD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not by_gradient:
            codewords_MKL.data = averages_MKL
    return codewords_MKL.detach().numpy()


def transported(distances_BK: Tensor) -> Tensor:
    """What each row takes most of, once columns and rows of the plan were evened out in turn."""
    costs_BK = (distances_BK - distances_BK.amin(1, keepdim=True)).double()
    plan_BK = torch.exp(-300 * costs_BK / costs_BK.max())
    for _ in range(50):
        plan_BK = plan_BK / plan_BK.sum(0, keepdim=True)
        plan_BK = plan_BK / plan_BK.sum(1, keepdim=True)
    return plan_BK.argmax(1)
