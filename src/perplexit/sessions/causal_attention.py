"""Causal attention on the CPU: by blocks of queries, each with the keys that it can see.

PyTorch's kernel computes whole blocks of up to 512 keys and masks what lies ahead: half of all
scores in a window of 512, a quarter at 1024. 16-bit queries, keys and values are widened: its
float32 kernel is the faster one, and its sums are better.

Shape suffixes: B = batch, H = query heads, G = key/value heads, T = ids, S = keys, D = head size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_by_query_blocks"
_QUERIES = 128
_LONGEST = 1024  # of windows that gain; longer ones spend their time in whole blocks of keys


def use_causal_blocks(model: nn.Module) -> bool:
    """Have a model of transformers that runs on `sdpa` run on this; whether it does now."""
    any_model: Any = model
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return False
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    try:
        any_model.set_attn_implementation(NAME)
    except (ValueError, NotImplementedError):
        return False
    return getattr(config, "_attn_implementation", None) == NAME


def use_sdpa(model: nn.Module) -> None:
    """Have it run on `sdpa` again."""
    any_model: Any = model
    any_model.set_attn_implementation("sdpa")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers' own `sdpa` gives, of shape BTHD."""
    states = query, key, value
    if _is_plain(module, states, options):
        scaling = options.get("scaling")
        if attention_mask is None and 1 < query.shape[2] == key.shape[2] <= _LONGEST:
            return causal_attention(*states, scaling).transpose(1, 2), None
        if _can_fold(states, attention_mask):
            return folded_attention(*states, attention_mask, scaling).transpose(1, 2), None
    heads, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return heads, None


def _is_plain(
    module: nn.Module, states: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]
) -> bool:
    """Whether this is causal attention of equal heads on the CPU, without additions."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    known = all(options[name] is None for name in set(options) - _KNOWN)
    if not (causal and known) or options.get("dropout"):
        return False
    sizes = {states_BHTD.shape[3] for states_BHTD in states}
    return len(sizes) == 1 and states[0].device.type == "cpu"


def _can_fold(states: tuple[Tensor, Tensor, Tensor], mask: Tensor | None) -> bool:
    """Whether heads share keys, and a cache is read by few queries under one mask for all heads."""
    query, key, _ = states
    shared = query.shape[1] // key.shape[1]
    if shared == 1 or query.shape[2] * shared > _QUERIES:
        return False
    return query.shape[2] == 1 if mask is None else mask.dim() == 4 and mask.shape[1] == 1


# What transformers passes along that does not change plain causal attention.
_KNOWN = {
    "is_causal", "scaling", "dropout", "position_ids", "use_cache", "cache_position",
    "output_attentions", "output_hidden_states", "output_router_logits", "sliding_window",
    "position_embeddings", "return_dict",
}  # fmt: skip


def folded_attention(
    query_BHTD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    mask_B1TS: Tensor | None,
    scaling: float | None = None,
) -> Tensor:
    """Attention with heads that share keys as so many more queries: keys are read once for all.

    PyTorch reads them once a head, and transformers copies them for each head where there is a
    mask; for a few ids against a long cache that is most of the time. Laid out as BHTD.
    """
    num_batch, num_heads, length, size = query_BHTD.shape
    shared = num_heads // key_BGSD.shape[1]
    mask = None if mask_B1TS is None else mask_B1TS.repeat(1, 1, shared, 1)
    folded = query_BHTD.reshape(num_batch, key_BGSD.shape[1], shared * length, size)
    out: Tensor = scaled_dot_product_attention(
        folded, key_BGSD, value_BGSD, attn_mask=mask, scale=scaling
    )
    return out.reshape(num_batch, num_heads, length, size)


def causal_attention(
    query_BHTD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, scaling: float | None = None
) -> Tensor:
    """softmax(Q Kᵀ · scaling + causal mask) V, in the query's dtype, laid out as BTHD."""
    num_batch, num_heads, length, size = query_BHTD.shape
    key, value = key_BGTD.float(), value_BGTD.float()
    out_BHTD = query_BHTD.new_empty(num_batch, length, num_heads, size).transpose(1, 2)
    ahead_TT = torch.full((_QUERIES, _QUERIES), -torch.inf).triu_(1)
    for start in range(0, length, _QUERIES):
        stop = min(start + _QUERIES, length)
        mask_TS = torch.zeros(stop - start, stop)
        mask_TS[:, start:] = ahead_TT[: stop - start, : stop - start]
        out_BHTD[:, :, start:stop] = scaled_dot_product_attention(
            query_BHTD[:, :, start:stop].float(),
            key[:, :, :stop],
            value[:, :, :stop],
            attn_mask=mask_TS,
            scale=scaling,
            enable_gqa=num_heads != key.shape[1],
        )
    return out_BHTD
