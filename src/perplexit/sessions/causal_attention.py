"""Causal attention on the CPU by blocks of queries, each with the keys that it can see.

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
    if attention_mask is None and _sees_its_window(module, (query, key, value), options):
        heads_BHTD = causal_attention(query, key, value, options.get("scaling"))
        return heads_BHTD.transpose(1, 2), None
    heads, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return heads, None


def _sees_its_window(
    module: nn.Module, states: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]
) -> bool:
    """Whether this is plain causal attention of a window that is short enough to itself."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    known = all(options[name] is None for name in set(options) - _KNOWN)
    if not (causal and known) or options.get("dropout"):
        return False
    query, *others = (states_BHTD.shape[2:] for states_BHTD in states)
    length = query[0]
    alike = all(shape == query for shape in others)
    return alike and 1 < length <= _LONGEST and states[0].device.type == "cpu"


# What transformers passes along that does not change plain causal attention.
_KNOWN = {
    "is_causal", "scaling", "dropout", "position_ids", "use_cache", "cache_position",
    "output_attentions", "output_hidden_states", "output_router_logits", "sliding_window",
    "position_embeddings", "return_dict",
}  # fmt: skip


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
