"""Attention of the backbone: a prompt that all its beams share, computed whole or from where it has grown.

Hugging Face decoders look their attention function up by name; ours is registered as `NAME`. Without `decoding` it is
plain scaled-dot-product attention. With it, keys and values of the prompt are kept once per user, and each beam brings
only those of its own codewords: softmax over both parts together is exact, and nothing of the prompt is ever copied.

Shapes: B rows (users), S prompt positions, N new positions, W beams, L codewords a beam has behind it, H heads of the
queries, J heads of keys and values, E width of a head, D hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "rankgr_shared_prefix"
# Scores of one chunk of users are held at once: as many as stay in a core's cache, or as keep a GPU busy.
_SCORES_PER_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 28}


class Decoding(Protocol):
    """What takes the place of attention while decoding."""

    def attend(self, layer: int, query_BHNE: Tensor, key_BJNE: Tensor, value_BJNE: Tensor, scaling: float) -> Tensor:
        """The attended values, [B, N, H, E]."""
        ...


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    decoding: Decoding | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that the backbone calls in each layer."""
    if decoding is not None:
        return decoding.attend(int(module.layer_idx), query, key, value, float(kwargs["scaling"])), None  # type: ignore[arg-type]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]


AttentionInterface.register(NAME, attention)


@dataclass(frozen=True)
class Prefix:
    """The prompts of some users, computed: all that decoding reads of them.

    Attributes:
        keys: per layer, [B, J, S, E], rotary positions applied.
        values: per layer, [B, J, S, E].
        last_BD: hidden state of each row's last position, after the final norm.
        length_B: positions that each row really has; what lies behind them is padding.
        hidden_BSD: hidden states of all positions, which the rank head reads; None if they were not asked for.
    """

    keys: list[Tensor]
    values: list[Tensor]
    last_BD: Tensor
    length_B: Tensor
    hidden_BSD: Tensor | None

    def visible(self) -> Tensor:
        """visible_BS, true where a row has a position."""
        return torch.arange(self.keys[0].shape[2], device=self.length_B.device) < self.length_B[:, None]

    def rows(self, index_R: Tensor) -> Prefix:
        """Some of the users."""
        keys, values = ([x[index_R] for x in layers] for layers in (self.keys, self.values))
        hidden = None if self.hidden_BSD is None else self.hidden_BSD[index_R]
        return Prefix(keys, values, self.last_BD[index_R], self.length_B[index_R], hidden)

    def row(self, index: int) -> Prefix:
        """One user's part, without padding."""
        n, part = int(self.length_B[index]), slice(index, index + 1)
        keys, values = ([x[part, :, :n].clone() for x in layers] for layers in (self.keys, self.values))
        hidden = None if self.hidden_BSD is None else self.hidden_BSD[part, :n].clone()
        return Prefix(keys, values, self.last_BD[part].clone(), self.length_B[part].clone(), hidden)


class PromptPass:
    """Causal attention over prompts from their first position on; keeps keys and values.

    Rows are padded on the right, where causality hides the padding.

    Args:
        whole_layers: the layers behind them only keep keys and values, and their output means nothing.
    """

    def __init__(self, whole_layers: int | None = None) -> None:
        self._whole_layers = whole_layers
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def attend(self, layer: int, query_BHNE: Tensor, key_BJNE: Tensor, value_BJNE: Tensor, scaling: float) -> Tensor:
        """See `Decoding`."""
        assert layer == len(self.keys)
        self.keys.append(key_BJNE)
        self.values.append(value_BJNE)
        if self._whole_layers is not None and layer >= self._whole_layers:
            return query_BHNE.transpose(1, 2)
        grouped = query_BHNE.shape[1] != key_BJNE.shape[1]
        out = F.scaled_dot_product_attention(query_BHNE, key_BJNE, value_BJNE, is_causal=True, scale=scaling, enable_gqa=grouped)
        return out.transpose(1, 2)


class LastPass:
    """Attention of one position a row to the keys and values that are kept of all.

    Args:
        prompt: that kept them.
        visible_BS: false for padding.
    """

    def __init__(self, prompt: PromptPass, visible_BS: Tensor) -> None:
        self._prompt, self._visible = prompt, visible_BS

    def attend(self, layer: int, query_BHNE: Tensor, key_BJNE: Tensor, value_BJNE: Tensor, scaling: float) -> Tensor:  # noqa: ARG002
        """See `Decoding`; what the position itself brings is among what is kept."""
        keys, values = self._prompt.keys[layer], self._prompt.values[layer]
        return masked_attention(query_BHNE, keys, values, self._visible[:, None, None], scaling).transpose(1, 2)


class GrowingPass:
    """Attention of prompts' new positions to their old ones and to one another.

    Args:
        past: per row, an earlier prefix whose first `old_B` positions still hold, or None.
        old_B: positions of each row that are not computed again.
        length: S of the result.
        position_BN: of the new positions; those of padding are `length`.
    """

    def __init__(self, past: list[Prefix | None], old_B: Tensor, length: int, position_BN: Tensor) -> None:
        self._past, self._old, self._length, self._position = past, old_B, length, position_BN
        self._allowed = (torch.arange(length, device=position_BN.device) <= position_BN[..., None])[:, None]
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def attend(self, layer: int, query_BHNE: Tensor, key_BJNE: Tensor, value_BJNE: Tensor, scaling: float) -> Tensor:
        """See `Decoding`."""
        self.keys.append(self.merge([None if p is None else p.keys[layer] for p in self._past], key_BJNE))
        self.values.append(self.merge([None if p is None else p.values[layer] for p in self._past], value_BJNE))
        return masked_attention(query_BHNE, self.keys[-1], self.values[-1], self._allowed, scaling).transpose(1, 2)

    def merge(self, old: list[Tensor | None], new_BJNE: Tensor) -> Tensor:
        """Old positions and new ones in their places, [B, J, S, E]."""
        b, j, _, e = new_BJNE.shape
        merged = new_BJNE.new_zeros(b, j, self._length + 1, e)  # the last place takes what padding computes
        for row, (part, count) in enumerate(zip(old, self._old.tolist(), strict=True)):
            if part is not None:
                merged[row, :, :count] = part[0, :, :count]
        merged.scatter_(2, self._position[:, None, :, None].expand_as(new_BJNE), new_BJNE)
        return merged[:, :, : self._length]


class BeamPass:
    """Attention of each beam's newest codeword to the shared prompt and to the beam's own codewords.

    Args:
        prefix: the prompts.
    """

    def __init__(self, prefix: Prefix) -> None:
        self._prefix = prefix
        self._keys: list[Tensor] = []  # per layer, [B, J, W, L, E]
        self._values: list[Tensor] = []
        self._padding = None if bool((prefix.length_B == prefix.keys[0].shape[2]).all()) else ~prefix.visible()

    def reorder(self, parent_BW: Tensor) -> None:
        """Let the beams be continuations of the given earlier ones."""
        self._keys, self._values = ([_take_beams(x, parent_BW) for x in layers] for layers in (self._keys, self._values))

    def attend(self, layer: int, query_BHNE: Tensor, key_BJNE: Tensor, value_BJNE: Tensor, scaling: float) -> Tensor:
        """See `Decoding`; the N new positions are the W beams."""
        keys, values = key_BJNE[..., None, :], value_BJNE[..., None, :]
        if layer < len(self._keys):
            self._keys[layer] = keys = torch.cat([self._keys[layer], keys], dim=3)
            self._values[layer] = values = torch.cat([self._values[layer], values], dim=3)
        else:
            self._keys.append(keys)
            self._values.append(values)
        (b, h, w, e), j, s = query_BHNE.shape, keys.shape[1], self._prefix.keys[0].shape[2]
        query_BJGWE = (query_BHNE * scaling).view(b, j, h // j, w, e)
        out_BHWE = torch.empty_like(query_BHNE)
        step = max(_SCORES_PER_CHUNK.get(query_BHNE.device.type, 1 << 20) // (h * w * s), 1)
        for start in range(0, b, step):
            rows = slice(start, start + step)
            out_BHWE[rows] = self._attend_rows(layer, rows, query_BJGWE[rows], keys[rows], values[rows]).view(-1, h, w, e)
        return out_BHWE.transpose(1, 2)

    def _attend_rows(self, layer: int, rows: slice, query_BJGWE: Tensor, key_BJWLE: Tensor, value_BJWLE: Tensor) -> Tensor:
        flat_BJXE = query_BJGWE.flatten(2, 3)
        to_prompt_BJXS = flat_BJXE @ self._prefix.keys[layer][rows].transpose(-1, -2)
        if self._padding is not None:
            to_prompt_BJXS.masked_fill_(self._padding[rows, None, None], float("-inf"))
        to_own_BJGWL = (query_BJGWE[..., None, :] @ key_BJWLE[:, :, None].transpose(-1, -2)).squeeze(-2)
        to_own_BJXL = to_own_BJGWL.flatten(2, 3)
        weights = torch.cat([to_prompt_BJXS, to_own_BJXL], dim=-1).softmax(dim=-1, dtype=torch.float32).to(flat_BJXE.dtype)
        s = to_prompt_BJXS.shape[-1]
        attended = (weights[..., :s] @ self._prefix.values[layer][rows]).view_as(query_BJGWE)
        own_BJGWL = weights[..., s:].view_as(to_own_BJGWL)
        return attended + (own_BJGWL[..., None, :] @ value_BJWLE[:, :, None]).squeeze(-2)


def masked_attention(query_BHNE: Tensor, key_BJSE: Tensor, value_BJSE: Tensor, mask_B1NS: Tensor, scaling: float) -> Tensor:
    """Scaled-dot-product attention of few positions under a mask, [B, H, N, E]; grouped heads on any device."""
    share = query_BHNE.shape[1] // key_BJSE.shape[1]
    if share > 1 and query_BHNE.is_cuda:  # there, kernels that take a mask do not take fewer heads of keys
        key_BJSE, value_BJSE, share = key_BJSE.repeat_interleave(share, 1), value_BJSE.repeat_interleave(share, 1), 1
    return F.scaled_dot_product_attention(query_BHNE, key_BJSE, value_BJSE, attn_mask=mask_B1NS, scale=scaling, enable_gqa=share > 1)


def _take_beams(x_BJWLE: Tensor, parent_BW: Tensor) -> Tensor:
    _, j, _, n, e = x_BJWLE.shape
    return x_BJWLE.gather(2, parent_BW[:, None, :, None, None].expand(-1, j, -1, n, e))
