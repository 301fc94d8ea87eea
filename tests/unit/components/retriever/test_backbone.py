import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from transformers import AutoModel, GPT2Config, LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model, Qwen3Config, Qwen3Model

from components.retriever.bundle import restore_model
from components.retriever.model import Retriever
from components.retriever.packing import collate
from components.training.checkpoint import trained_state
from infra.config import Config
from infra.errors import ConfigError, IntegrityError, ServiceError
from infra.sections import LossConfig, RetrieverConfig
from tests.unit.components.retriever.slow import codeword_logits, hidden_states, row

TEXT_VOCABULARY, WIDTH, CODES = 50, 24, np.array([[0, 1], [2, 3], [1, 1]])
BATCH = collate([row([0, 1], [3, 2], [(2, 3, 1, 0), (1, 2, 2, 1)]), row([], [], [(0, 4, 0, 0)])])
LOSS = LossConfig(train_lambdas=[4, 4])


@pytest.fixture
def pretrained(tmp_path):
    """A decoder on disk, in half precision as published ones are."""
    torch.manual_seed(7)
    model = Qwen2Model(
        Qwen2Config(
            vocab_size=TEXT_VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=16, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(tmp_path / "decoder")
    return tmp_path / "decoder"


def retriever(backbone, **settings):
    torch.manual_seed(0)
    return Retriever(RetrieverConfig(backbone=str(backbone), dropout=0.0, **settings), CODES, n_codes=4).eval()


def test_the_tiny_backbone_has_the_sizes_of_the_configuration():
    model = retriever("tiny", hidden_size=32, layers=3, heads=4, kv_heads=2, ff_size=48)
    assert model.first_token == 1
    assert model.embedding.weight.shape == (1 + 2 * 4, 32)
    assert len(model.backbone.layers) == 3
    assert model.backbone.layers[0].self_attn.k_proj.weight.shape == (16, 32)
    assert model.backbone.layers[0].mlp.up_proj.weight.shape == (48, 32)


def test_the_tiny_backbone_drops_out_in_training_only():
    torch.manual_seed(0)
    model = Retriever(RetrieverConfig(hidden_size=16, dropout=0.5), CODES, n_codes=4)
    losses = {float(model(BATCH, LossConfig(alpha=0.0, rsp_weight=0.0))["ntp"]) for _ in range(3)}
    assert len(losses) == 3
    model.eval()
    assert len({float(model(BATCH, LOSS)["ntp"]) for _ in range(3)}) == 1


def test_codewords_are_added_behind_the_text_vocabulary(pretrained):
    model = retriever(pretrained)
    assert model.first_token == TEXT_VOCABULARY + 1  # [BOS] is in between
    assert model.embedding.weight.shape == (TEXT_VOCABULARY + 1 + 2 * 4, WIDTH)
    text = Qwen2Model.from_pretrained(pretrained, dtype=torch.float32).get_input_embeddings().weight
    assert torch.equal(model.embedding.weight[:TEXT_VOCABULARY], text)


def test_text_tokens_are_never_scored(pretrained):
    model = retriever(pretrained)
    encoded = model.encode(BATCH, model.sid_codes[BATCH.target_items_BP])
    assert [logits.shape for logits in model.target_logits(encoded, BATCH)] == [(2, 2, 4)] * 2
    with torch.no_grad():
        before = model(BATCH, LOSS)["loss"]
        model.embedding.weight[:TEXT_VOCABULARY] += 5.0
        assert model(BATCH, LOSS)["loss"] == before


def test_codewords_and_backbone_are_trained_in_single_precision(pretrained):
    model = retriever(pretrained)
    model(BATCH, LOSS)["loss"].backward()
    table = model.embedding.weight.grad
    assert table.dtype == torch.float32
    assert (table[TEXT_VOCABULARY:].abs().sum(1) > 0).all()
    assert float(table[:TEXT_VOCABULARY].abs().max()) == 0
    assert all(p.grad is not None and p.dtype == torch.float32 for p in model.parameters())


def test_the_weights_alone_restore_the_model_when_the_folder_is_gone(pretrained):
    config = Config.model_validate({"retriever": {"backbone": str(pretrained)}, "semantic_ids": {"codes": 4}})
    model = retriever(pretrained)
    weights = load(save(trained_state(model)))
    shutil.rmtree(pretrained)
    restored = restore_model(config, CODES, weights)
    assert all(p.dtype == torch.float32 for p in restored.parameters())
    for name, value in restored(BATCH, LOSS).items():
        assert torch.equal(value, model(BATCH, LOSS)[name])


@pytest.mark.parametrize(("trained_on", "configured"), [("tiny", "decoder"), ("decoder", "tiny")])
def test_weights_of_another_kind_of_backbone_are_refused(pretrained, trained_on, configured):
    folder = {"tiny": "tiny", "decoder": str(pretrained)}
    config = Config.model_validate({"retriever": {"backbone": folder[configured]}, "semantic_ids": {"codes": 4}})
    with pytest.raises(IntegrityError, match="another kind of backbone"):
        restore_model(config, CODES, trained_state(retriever(folder[trained_on])))


def test_a_missing_folder_is_an_error_that_names_the_setting(tmp_path):
    with pytest.raises(ServiceError, match="cannot be loaded") as caught:
        retriever(tmp_path / "nowhere")
    assert caught.value.where == f"retriever.backbone={tmp_path / 'nowhere'}"


def test_a_folder_without_a_model_is_an_error_that_names_the_setting(tmp_path):
    with pytest.raises(ServiceError, match=r"retriever\.backbone="):
        retriever(tmp_path)


def test_pickled_weights_are_not_read(pretrained):
    (pretrained / "model.safetensors").unlink()
    torch.save({}, pretrained / "pytorch_model.bin")
    with pytest.raises(ServiceError, match="cannot be loaded"):
        retriever(pretrained)


def test_rank_heads_that_do_not_divide_the_width_are_an_error_that_names_both(pretrained):
    with pytest.raises(ConfigError, match=r"rank_heads=5 does not divide the width of the backbone, 24"):
        retriever(pretrained, rank_heads=5, hidden_size=40, heads=1, kv_heads=1)


SIZES = {
    "vocab_size": TEXT_VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = {"qwen2": (Qwen2Model, Qwen2Config), "qwen3": (Qwen3Model, Qwen3Config), "llama": (LlamaModel, LlamaConfig)}


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    """A decoder of each family on disk, with the heads of its own width where the family knows such."""
    model, config = FAMILIES[request.param]
    torch.manual_seed(3)
    settings = {"head_dim": 8} if request.param == "qwen3" else {}
    model(config(**SIZES, **settings)).save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


@pytest.mark.parametrize("history", ["merged", "tokens"])
def test_packed_rows_of_every_family_have_the_logits_of_separate_ones(family, history):
    model = retriever(family, history=history)
    rows = [row([0, 1, 2], [3, 2, 4], [(2, 3, 1, 0), (1, 2, 2, 1), (0, 3, 3, 2)]), row([], [], [(0, 4, 0, 0)])]
    batch = collate(rows)
    logits = model.target_logits(model.encode(batch, model.sid_codes[batch.target_items_BP]), batch)
    for r, packed in enumerate(rows):
        for t, (item, prefix) in enumerate(zip(packed.target_items, packed.target_prefix, strict=True)):
            own = model.sid_codes[item].tolist()[:-1]
            states = hidden_states(model, packed.items[:prefix], packed.levels[:prefix], own)
            for level, expected in enumerate(codeword_logits(model, *states)):
                torch.testing.assert_close(logits[level][r, t], expected, rtol=1e-4, atol=1e-5)


def test_every_family_keeps_its_vocabulary_and_comes_back_from_its_weights_alone(family):
    config = Config.model_validate({"retriever": {"backbone": str(family)}, "semantic_ids": {"codes": 4}})
    model = retriever(family)
    assert model.first_token == TEXT_VOCABULARY + 1
    text = FAMILIES[family.name][0].from_pretrained(family, dtype=torch.float32).get_input_embeddings().weight
    assert torch.equal(model.embedding.weight[:TEXT_VOCABULARY], text)
    weights = load(save(trained_state(model)))
    shutil.rmtree(family)
    restored = restore_model(config, CODES, weights)
    assert type(restored.backbone) is FAMILIES[family.name][0]
    for name, value in restored(BATCH, LOSS).items():
        assert torch.equal(value, model(BATCH, LOSS)[name])


def test_every_family_trains_through_activations_computed_again(family):
    gradients = []
    for again in (False, True):
        model = retriever(family).train()
        if again:
            model.backbone.activation_checkpointing_enable()
        model(BATCH, LOSS)["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "unsupported",
    [
        GPT2Config(vocab_size=50, n_embd=24, n_layer=1, n_head=2),
        Qwen2Config(
            vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16,
            use_sliding_window=True, sliding_window=4, max_window_layers=1, bos_token_id=None, eos_token_id=None,
        ),
    ],
    ids=["another family", "a sliding window"],
)  # fmt: skip
def test_a_decoder_that_would_be_decoded_wrongly_is_refused(tmp_path, unsupported):
    AutoModel.from_config(unsupported).save_pretrained(tmp_path / "decoder")
    with pytest.raises(ConfigError, match="not supported") as caught:
        retriever(tmp_path / "decoder")
    assert "qwen2, qwen3, llama" in str(caught.value)
