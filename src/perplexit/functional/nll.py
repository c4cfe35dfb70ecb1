"""Logits in, per-token nll, entropy, rank and alternatives out.

Shape suffixes: N = targets, V = vocabulary, K = alternatives a target.

The naive equivalent of everything here is a float64 log-softmax:

    logprobs_NV = logits_NV.double().log_softmax(-1)
    nll_N       = -logprobs_NV.gather(1, targets_N[:, None])[:, 0]
    entropy_N   = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    rank_N      = 1 + (logits_NV > logits_NV.gather(1, targets_N[:, None])).sum(-1)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

_LOG2_E = 1.0 / math.log(2.0)
_BLOCK_ELEMENTS = 1 << 19  # 2 MiB of float32: both buffers of a block stay in a core's cache
_DEVICE_BLOCK_ELEMENTS = 1 << 24  # 64 MiB: few launches, and still little beside the logits


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """Per-target results, nats, in float32 or better; None where they were not asked for.

    rank_N: int32, 1 = no token was more likely than the target (ties count in its favour).
    top_ids_NK, top_logprobs_NK: the K most likely tokens, most likely first.
    """

    nll_N: Tensor
    entropy_N: Tensor | None = None
    rank_N: Tensor | None = None
    top_ids_NK: Tensor | None = None
    top_logprobs_NK: Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence["TokenStatistics"]) -> "TokenStatistics":
        """The statistics of consecutive targets as one; `parts` holds at least one."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            torch.cat([part.nll_N for part in parts]),
            _cat([part.entropy_N for part in parts]),
            _cat([part.rank_N for part in parts]),
            _cat([part.top_ids_NK for part in parts]),
            _cat([part.top_logprobs_NK for part in parts]),
        )

    def without_first(self, count: int) -> "TokenStatistics":
        """The statistics of the targets after the first `count`."""
        columns = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(self, **{n: x[count:] for n, x in columns.items() if x is not None})


def _cat(columns: Sequence[Tensor | None]) -> Tensor | None:
    present = [column for column in columns if column is not None]
    return torch.cat(present) if present else None


def token_statistics(
    logits_NV: Tensor, targets_N: Tensor, *, with_details: bool = True, top_k: int = 0
) -> TokenStatistics:
    """The nll of each target, and with `with_details` its entropy and rank, from logits.

    Logits narrower than float32 are widened first, so the log-softmax never runs in bfloat16.
    The nll is the same to the last bit with and without details. `logits_NV` is left as it was.
    """
    return statistics_in_place(
        logits_NV, targets_N, with_details=with_details, top_k=top_k, may_overwrite=False
    )


def statistics_in_place(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    with_details: bool = True,
    top_k: int = 0,
    may_overwrite: bool = True,
) -> TokenStatistics:
    """As `token_statistics`, but `logits_NV` may be overwritten, which saves a copy."""
    num_targets, vocab_size = logits_NV.shape
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    on_host = logits_NV.device.type == "cpu"
    block_rows = max(1, (_BLOCK_ELEMENTS if on_host else _DEVICE_BLOCK_ELEMENTS) // vocab_size)
    rows = min(block_rows, max(1, num_targets))
    scratch = torch.empty(rows, vocab_size, dtype=dtype, device=logits_NV.device)
    parts = []
    for start in range(0, max(1, num_targets), block_rows):
        block = logits_NV[start : start + block_rows]
        if not may_overwrite or block.dtype != dtype:
            block = block.to(dtype, copy=True)
        targets = targets_N[start : start + block_rows, None]
        parts.append(_block_statistics(block, targets, scratch[: len(block)], with_details, top_k))
    return TokenStatistics.joined(parts)


def _block_statistics(
    logits_NV: Tensor, targets_N1: Tensor, scratch_NV: Tensor, with_details: bool, top_k: int
) -> TokenStatistics:
    rank_N = _ranks(logits_NV, targets_N1, scratch_NV) if with_details else None
    # Written out rather than log_softmax or logsumexp: on the CPU the first adds up the vocabulary
    # in one lane (2e-5 nats off at V = 256,000) and the second costs twice the time.
    shifted_NV = logits_NV.sub_(logits_NV.amax(-1, keepdim=True))
    odds_NV = torch.mul(shifted_NV, _LOG2_E, out=scratch_NV).exp2_()
    sum_N = odds_NV.sum(-1)
    log_sum_N = sum_N.log()
    nll_N = log_sum_N - shifted_NV.gather(1, targets_N1)[:, 0]
    entropy_N = _entropies(odds_NV, sum_N, shifted_NV) if with_details else None
    if not top_k:
        return TokenStatistics(nll_N, entropy_N, rank_N)
    top = shifted_NV.topk(min(top_k, shifted_NV.shape[-1]), dim=-1)
    top_logprobs_NK = top.values - log_sum_N[:, None]
    return TokenStatistics(nll_N, entropy_N, rank_N, top.indices.int(), top_logprobs_NK)


def _ranks(logits_NV: Tensor, targets_N1: Tensor, scratch_NV: Tensor) -> Tensor:
    # 0.0 and 1.0 in the scratch buffer add up faster than bools, and exactly up to 2**24.
    above_NV = torch.gt(logits_NV, logits_NV.gather(1, targets_N1), out=scratch_NV)
    return above_NV.sum(-1).int() + 1


def _entropies(odds_NV: Tensor, sum_N: Tensor, shifted_NV: Tensor) -> Tensor:
    mean_shifted_N: Tensor = torch.linalg.vecdot(odds_NV, shifted_NV) / sum_N
    # A token at -inf: 0 · -inf, whose limit is 0. To look would make the host wait for a device.
    if odds_NV.device.type != "cpu" or bool(mean_shifted_N.isnan().any()):
        terms_NV = torch.where(odds_NV == 0, 0.0, odds_NV * shifted_NV)
        mean_shifted_N = terms_NV.sum(-1) / sum_N
    return sum_N.log() - mean_shifted_N
