"""Causal attention on the CPU: by blocks of queries, each with the keys that it can see.

PyTorch's kernel computes whole blocks of up to 512 keys and masks what lies ahead: half of all
scores in a window of 512, a quarter at 1024. And in 16 bits its products are no faster than in
float32. Here both are plain matrix products, over query heads that share keys together.

Shape suffixes: B = batch, H = query heads, G = key/value heads, R = query heads that share keys,
T = ids, S = keys, D = head size, Q = queries of a block, X = R · Q rows of scores.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_by_query_blocks"
_ROWS = 384  # of scores at a time: many make products fast, few waste little on what lies ahead
_QUERIES = 192  # of one head at most in float32, whose products are as fast with fewer rows
_LONGEST = 8192  # ids; the scores of longer windows leave the caches
# A score of 64 nats is rounded to bfloat16 by 0.125 at most; rows beyond are made in float32.
_LARGEST_ROUNDED = 64.0 / math.log(2.0)
_FOLDED_QUERIES = 128


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
        alone = torch.get_num_threads() == 1  # such products are too small for more threads
        if alone and attention_mask is None and 1 < query.shape[2] == key.shape[2] <= _LONGEST:
            return causal_attention(*states, scaling).transpose(1, 2), None
        if _can_fold(states, attention_mask):
            heads = folded_attention(*states, attention_mask, scaling)
            return heads.transpose(1, 2).contiguous(), None  # some models take a view of it
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
    if shared == 1 or query.shape[2] * shared > _FOLDED_QUERIES:
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
    """softmax(Q Kᵀ · scaling + causal mask) V, in the query's dtype, laid out as BTHD.

    In bfloat16 the scores are rounded once, as in transformers' eager attention, but where they
    are large: there, and in softmax and its sums everywhere, float32. Products add up in float32.
    """
    num_batch, num_heads, length, size = query_BHTD.shape
    num_groups = key_BGTD.shape[1]
    shared = num_heads // num_groups
    queries = min(max(32, _ROWS // shared), length)
    if query_BHTD.dtype == torch.float32:
        queries = min(_QUERIES, queries)
    block = _ScoreBlock(query_BHTD, shared * queries, size**-0.5 if scaling is None else scaling)
    ahead_QQ = torch.full((queries, queries), -torch.inf).triu_(1)
    out_BTHD = query_BHTD.new_empty(num_batch, length, num_heads, size)
    for batch in range(num_batch):
        for group in range(num_groups):
            heads = slice(group * shared, (group + 1) * shared)
            key_TD, value_TD = key_BGTD[batch, group], value_BGTD[batch, group]
            for start in range(0, length, queries):
                stop = min(start + queries, length)
                rows_RQD = query_BHTD[batch, heads, start:stop]
                ahead = ahead_QQ[: stop - start, : stop - start]
                heads_RQD = block.attend(rows_RQD, key_TD[:stop], value_TD[:stop], ahead)
                out_BTHD[batch, start:stop, heads] = heads_RQD.transpose(0, 1)
    return out_BTHD.transpose(1, 2)


class _ScoreBlock:
    """Room for one block of scores, in the dtype of its products and in float32."""

    def __init__(self, query_BHTD: Tensor, rows: int, scaling: float) -> None:
        num_scores = rows * query_BHTD.shape[2]
        self._wide = query_BHTD.new_empty(num_scores, dtype=torch.float32)
        self._rounds = query_BHTD.dtype != torch.float32
        self._raw = query_BHTD.new_empty(num_scores) if self._rounds else self._wide
        self._scaling = scaling / math.log(2.0)  # of exponents of two, which are faster

    def attend(
        self, query_RQD: Tensor, key_SD: Tensor, value_SD: Tensor, ahead_QQ: Tensor
    ) -> Tensor:
        """The heads' outputs, RQD; the last Q keys are the queries' own."""
        rows_XD = query_RQD.reshape(-1, query_RQD.shape[-1])
        size = len(rows_XD) * len(key_SD)
        raw_XS, odds_XS = (x[:size].view(len(rows_XD), -1) for x in (self._raw, self._wide))
        if self._rounds:
            torch.mm(rows_XD, key_SD.t(), out=raw_XS)
            odds_XS.copy_(raw_XS).mul_(self._scaling)
            largest_X1 = _largest_seen(odds_XS, ahead_QQ)
        if not self._rounds or bool((largest_X1.abs() > _LARGEST_ROUNDED).any()):
            torch.mm(rows_XD.float() * self._scaling, key_SD.float().t(), out=odds_XS)
            largest_X1 = _largest_seen(odds_XS, ahead_QQ)
        sums_X1 = odds_XS.sub_(largest_X1).exp2_().sum(-1, keepdim=True)
        if self._rounds:
            raw_XS.copy_(odds_XS)
        return torch.mm(raw_XS, value_SD).div_(sums_X1).view(query_RQD.shape)


def _largest_seen(scores_XS: Tensor, ahead_QQ: Tensor) -> Tensor:
    """The largest score of each row (X, 1), after masking what lies ahead, in place."""
    num_queries = len(ahead_QQ)
    scores_XS.view(-1, num_queries, scores_XS.shape[1])[:, :, -num_queries:] += ahead_QQ
    return scores_XS.amax(-1, keepdim=True)
