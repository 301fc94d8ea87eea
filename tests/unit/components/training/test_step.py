"""One optimizer step: accumulated over batches, in bfloat16, with activations computed again."""

from dataclasses import fields

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from components.retriever.packing import Batch, Row, collate
from components.training.data import training_rows
from components.training.loop import build_model, build_optimizer, train_step
from tests.unit.components.training.small import configuration, sids, timelines

# Levels weigh differently, and no row has more predictions than the rank head takes: nothing random is left in a step.
LOSSES = ("training.loss.ntp_level_weights={2: 0.3, 3: 1.0}", "training.loss.rsp_predictions=64", "training.loss.alpha=0.7")


def rows(config):
    """Rows of unlike length; the last one has a single target, a click, so that it gives LDPO nothing."""
    found = training_rows(timelines(users=7), config)
    last = Row(**{f.name: getattr(found[-1], f.name)[:1] for f in fields(Row)})
    return [*found[:-1], last]


def gradients(split, *settings, wrap=lambda model: model):
    """Losses and gradients of one step on the rows, cut into batches of these sizes."""
    config = configuration("training.grad_clip=1e9", *LOSSES, *settings)
    model = build_model(config, sids())
    optimizer, schedule = build_optimizer(model, config, 1)
    left, batches = rows(config), []
    for size in split:
        batches.append(collate(left[:size]))
        left = left[size:]
    figures = train_step(wrap(model), batches, optimizer, schedule, config)
    return figures, {name: p.grad for name, p in model.named_parameters()}


def assert_alike(one, other, *, rtol=1e-4, atol=1e-6):
    assert one[0] == pytest.approx(other[0], rel=rtol)
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("split", [[4, 3], [1, 5, 1], [1] * 7])
def test_batches_of_a_step_count_as_one_batch(split):
    assert_alike(gradients(split), gradients([7]))


def test_a_plain_mean_over_the_batches_would_be_another_step():
    config = configuration(*LOSSES)
    model = build_model(config, sids())
    big, *parts = (
        float(model(collate(rows(config)[cut]), config.training.loss)["loss"].detach()) for cut in (slice(7), slice(6), slice(6, 7))
    )
    assert abs(sum(parts) / 2 - big) > 0.1


def test_a_batch_without_positives_adds_nothing_to_the_rank_head():
    config = configuration(*LOSSES)
    model = build_model(config, sids())
    shown = rows(config)[0]
    shown = Row(
        shown.items,
        shown.levels,
        *(column[1::2] for column in (shown.target_items, shown.target_levels, shown.target_prefix, shown.target_request)),
    )
    counts = model.loss_counts(collate([shown]), config.training.loss)
    assert counts.tolist() == [pytest.approx(0.3 * len(shown.target_items)), 0, 0, 0]


def test_counts_are_those_of_the_targets():
    """Two requests: clicks on 0 and 4 (the same first code) with an exposure of 1; a click on 2 alone."""
    config = configuration(*LOSSES)
    batch = Batch(
        items_BH=torch.tensor([[3]]),
        levels_BH=torch.tensor([[3]]),
        history_B=torch.tensor([1]),
        target_items_BP=torch.tensor([[0, 4, 1, 2, 0]]),
        target_levels_BP=torch.tensor([[3, 3, 2, 3, 0]]),
        target_prefix_BP=torch.tensor([[0, 0, 0, 1, 0]]),
        target_request_BP=torch.tensor([[0, 0, 0, 1, 0]]),
        target_valid_BP=torch.tensor([[True, True, True, True, False]]),
    )
    # NTP: 3 clicks and 0.3. LDPO: 2 clicks with something below. BCE: a prediction a request, then one a first code.
    assert build_model(config, sids()).loss_counts(batch, config.training.loss).tolist() == pytest.approx([3.3, 2, 2, 2])


def test_workers_exchange_gradients_once_a_step(monkeypatch, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        exchanged = []

        def wrap(model):
            ddp = DistributedDataParallel(model, forward_sync_buffers=False)
            ddp.register_comm_hook(None, lambda _, bucket: exchanged.append(bucket) or _done(bucket.buffer()))
            return ddp

        accumulated = gradients([4, 2, 1], wrap=wrap)
        assert len(exchanged) == 1
        assert_alike(accumulated, gradients([7]))
    finally:
        torch.distributed.destroy_process_group()


def _done(tensor: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(tensor)
    return future


def test_activations_computed_again_give_the_same_gradients():
    settings = ("retriever.layers=2", "retriever.dropout=0.3")
    assert_alike(gradients([7], "training.gradient_checkpointing=true", *settings), gradients([7], *settings), rtol=0, atol=0)


def test_a_layer_is_computed_again_in_the_backward_pass_only_where_asked():
    calls = []
    for setting in ("true", "false"):
        config = configuration(*LOSSES, f"training.gradient_checkpointing={setting}")
        model = build_model(config, sids())
        seen = []
        model.backbone.layers[0].mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        model(collate(rows(config)), config.training.loss)["loss"].backward()
        calls.append(len(seen))
    assert calls == [2, 1]


def test_bfloat16_keeps_weights_and_gradients_in_single_precision_and_stays_near():
    half, single = gradients([7], "training.precision=bf16"), gradients([7])
    assert all(gradient.dtype == torch.float32 for gradient in half[1].values())
    assert half[0] == pytest.approx(single[0], rel=0.02)
    assert half[0] != single[0]
    one, other = (torch.cat([g.flatten() for g in found[1].values()]) for found in (half, single))
    assert float(torch.nn.functional.cosine_similarity(one, other, dim=0)) > 0.999


def test_products_run_in_bfloat16_and_losses_do_not():
    config = configuration(*LOSSES, "training.precision=bf16")
    model = build_model(config, sids())
    kinds = {}
    model.backbone.layers[0].mlp.register_forward_hook(lambda _, __, out: kinds.update(mlp=out.dtype))
    original = model.target_logits
    model.target_logits = lambda *a: kinds.update(logits=(found := original(*a))[0].dtype) or found
    optimizer, schedule = build_optimizer(model, config, 1)
    train_step(model, [collate(rows(config))], optimizer, schedule, config)
    assert kinds == {"mlp": torch.bfloat16, "logits": torch.float32}
