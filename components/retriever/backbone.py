"""The decoder under the retriever: a tiny Qwen2 from a config, or a Qwen2, Qwen3 or Llama from Hugging Face with codewords added."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, Qwen2Config, Qwen2Model

from components.retriever import attention
from infra import storage
from infra.errors import ConfigError, ServiceError
from infra.sections import RetrieverConfig

_FAMILIES = ("qwen2", "qwen3", "llama")


def build_backbone(config: RetrieverConfig, *, n_codewords: int, architecture: str | None = None) -> tuple[nn.Module, int, str]:
    """The backbone, the token id of its first codeword, and its architecture.

    The codewords of all levels follow one another in the vocabulary; the id before the first one is [BOS].

    Args:
        config: `backbone` is `tiny`, the Hugging Face name, folder or s3:// folder of a Qwen2, Qwen3 or Llama.
        n_codewords: M x K.
        architecture: what an earlier call returned: the backbone is built from it, with fresh weights and without its
            folder. None loads the folder's weights.

    Raises:
        ServiceError: the model cannot be loaded.
        ConfigError: it is of a family that is not supported, or attends through a sliding window.
    """
    if config.backbone == "tiny":
        model = Qwen2Model(
            Qwen2Config(
                hidden_size=config.hidden_size,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads,
                intermediate_size=config.ff_size,
                vocab_size=1 + n_codewords,
                max_position_embeddings=32_768,
                attn_implementation=attention.NAME,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        _add_residual_dropout(model, config.dropout)
        return model, 1, ""
    if architecture is not None:
        backbone_config = AutoConfig.for_model(**json.loads(architecture))
        model = AutoModel.from_config(backbone_config, attn_implementation=attention.NAME, dtype=torch.float32)
    else:
        model = _load_pretrained(config.backbone)
        _check_family(model.config, config.backbone)
        architecture = model.config.to_json_string()
    first = 1 + int(model.get_input_embeddings().num_embeddings)
    model.resize_token_embeddings(first + n_codewords, mean_resizing=True)
    return model, first, architecture


def _check_family(config: Any, name: str) -> None:
    """Decoding runs the layers on its own, which holds for decoders that are built alike."""
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    if config.model_type in _FAMILIES and set(layers) == {"full_attention"} and not getattr(config, "use_sliding_window", False):
        return
    raise ConfigError(
        f"a decoder of type {config.model_type} with {' and '.join(sorted(set(layers)))} is not supported",
        where=f"retriever.backbone={name}",
        mend=f"take one of {', '.join(_FAMILIES)} without a sliding window",
    )


def _load_pretrained(name: str) -> Any:
    try:
        with storage.local_copy(name) if "://" in name else _as_is(name) as source:
            return AutoModel.from_pretrained(source, attn_implementation=attention.NAME, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ServiceError(
            f"the backbone cannot be loaded: {str(error).splitlines()[0]}",
            where=f"retriever.backbone={name}",
            mend="give the folder of a Hugging Face decoder, its s3:// URI, or a name while online",
        ) from error


class _as_is:  # noqa: N801 - reads like storage.local_copy beside it
    """A name or local folder, in the form of `storage.local_copy`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> Path | str:
        return self.name

    def __exit__(self, *_: object) -> None:
        return None


def _add_residual_dropout(model: Qwen2Model, dropout: float) -> None:
    """Dropout on what attention and MLP add to the residual stream; Qwen2 has none of its own, small data needs it."""

    def drop(module: nn.Module, _: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (nn.functional.dropout(output[0], dropout, module.training), *output[1:])
        return nn.functional.dropout(output, dropout, module.training)

    for layer in model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


def run_decoding(model: nn.Module, embeddings_BND: Tensor, positions_BN: Tensor, decoding: attention.Decoding) -> Tensor:
    """Hidden states of new positions, whose attention is left to `decoding`.

    Returns:
        hidden_BND after the final norm.
    """
    output = model(inputs_embeds=embeddings_BND, position_ids=positions_BN, use_cache=False, decoding=decoding)
    return torch.as_tensor(output.last_hidden_state)


def run_prompt(model: nn.Module, embeddings_BSD: Tensor, length_B: Tensor) -> tuple[attention.PromptPass, Tensor]:
    """Keys and values of all positions, and hidden_BD of each row's last one alone.

    The last layer is worth its keys and values only, but for the last position: its attention and MLP run over that one.
    """
    decoder: Any = model
    decoding = attention.PromptPass(whole_layers=len(decoder.layers) - 1)
    position_S = torch.arange(embeddings_BSD.shape[1], device=length_B.device)
    rotary, hidden, final = decoder.rotary_emb(embeddings_BSD, position_S[None]), embeddings_BSD, decoder.layers[-1]
    for layer in decoder.layers[:-1]:
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, decoding=decoding)
    final.self_attn(hidden_states=final.input_layernorm(hidden), attention_mask=None, position_embeddings=rotary, decoding=decoding)
    last_B1 = length_B[:, None] - 1
    hidden = hidden.gather(1, last_B1[..., None].expand(-1, -1, hidden.shape[-1]))
    rotary = decoder.rotary_emb(hidden, last_B1)
    last_pass = attention.LastPass(decoding, position_S < length_B[:, None])
    hidden = final(hidden, attention_mask=None, position_embeddings=rotary, decoding=last_pass)
    return decoding, torch.as_tensor(decoder.norm(hidden))[:, 0]
