"""Logits in, per-token nll, entropy, rank and alternatives out.

Shape suffixes: N = targets, V = vocabulary, K = alternatives per target.

The naive equivalent of everything here is a float64 log-softmax:

    logprobs_NV = logits_NV.double().log_softmax(-1)
    nll_N       = -logprobs_NV.gather(1, targets_N[:, None])[:, 0]
    entropy_N   = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    rank_N      = 1 + (logits_NV > logits_NV.gather(1, targets_N[:, None])).sum(-1)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from perplexit.token_columns import TOKEN_COLUMNS, ColumnSet, TokenDetails

_LOG2_E = 1.0 / math.log(2.0)
_TILE = 16  # rows that a matrix product's kernel takes at a time
_BLOCK_ELEMENTS = 1 << 19  # 2 MiB of float32: both buffers of a block stay in a core's cache
_DEVICE_BLOCK_ELEMENTS = 1 << 24  # 64 MiB: few launches, and still little beside the logits


class TokenStatistics(ColumnSet[Tensor]):
    """Columns of some targets as tensors on one device, in float32 or better, nats.

    rank_N: int32, 1 = no token was more likely than the target (ties count in its favour).
    top_ids_NK, top_logprobs_NK: the K most likely tokens, most likely first.
    """

    __slots__ = ()

    @classmethod
    def joined(cls, parts: Sequence["TokenStatistics"]) -> "TokenStatistics":
        """Return the statistics of consecutive targets as one; `parts` holds at least one."""
        if len(parts) == 1:
            return parts[0]
        names = parts[0].columns
        return cls({name: torch.cat([part.columns[name] for part in parts]) for name in names})

    def each(self, change: Callable[[Tensor], Tensor]) -> "TokenStatistics":
        """Return the statistics with every column changed."""
        return TokenStatistics({name: change(column) for name, column in self.columns.items()})

    def to_numpy(self) -> TokenDetails:
        """Return the columns in host memory, each of the schema's type."""
        return TokenDetails(
            {
                name: column.cpu().numpy().astype(TOKEN_COLUMNS[name].dtype, copy=False)
                for name, column in self.columns.items()
            }
        )


def slices_of_rows(num_rows: int, size: int) -> list[slice]:
    """Return the slices of `size` rows that cover all rows in order; at least one, maybe empty."""
    return [slice(start, start + size) for start in range(0, max(1, num_rows), size)]


def equal_blocks(num_rows: int, most: int) -> list[slice]:
    """Return blocks that cover rows 0 … `num_rows` in order, all of one size up to `most`.

    The last may begin before the one before it has ended. A block of another size would be another
    product: oneDNN prepares each shape once, at half a megabyte of memory, and thin ones are slow.
    """
    if num_rows <= most:
        return [slice(0, num_rows)]
    count = -(-num_rows // most)
    size = min(most, -(-num_rows // (count * _TILE)) * _TILE)
    starts = (min(index * size, num_rows - size) for index in range(count))
    return [slice(start, start + size) for start in starts]


def token_statistics(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    with_details: bool = True,
    top_k: int = 0,
    may_overwrite: bool = False,
) -> TokenStatistics:
    """Return the nll of each target, and with `with_details` its entropy and rank, from logits.

    Logits narrower than float32 are widened first, so the log-softmax never runs in bfloat16.
    The nll is the same to the last bit with and without details.
    may_overwrite: whether `logits_NV` need not stay as it was, which saves a copy.
    """
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
    columns = {"nll": nll_N, "entropy": entropy_N, "rank": rank_N}
    if top_k:
        top = shifted_NV.topk(min(top_k, shifted_NV.shape[-1]), dim=-1)
        columns["top_ids"] = top.indices.int()
        columns["top_logprobs"] = top.values - log_sum_N[:, None]
    return TokenStatistics(columns)


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


DEFAULT_LOGITS_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class HeadRequest:
    """What is asked of a head.

    chunk_rows:   rows of logits to make at a time.
    with_details: entropy and rank beside the nll.
    top_k:        how many of the most likely tokens, with their log-probabilities.
    """

    chunk_rows: int
    with_details: bool = False
    top_k: int = 0


# (hidden states ND, targets N, request) → the columns of the targets; the head is known already.
HeadStatistics = Callable[[Tensor, Tensor, HeadRequest], TokenStatistics]


@runtime_checkable
class ScoringHead(Protocol):
    """A head that gives per-token results itself, without logits in between; see `fused_head`."""

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """Return its logits."""

    def statistics(
        self, hidden_ND: Tensor, targets_N: Tensor, request: HeadRequest
    ) -> TokenStatistics:
        """Return the columns of the targets; entropy and rank only `with_details`, if at all."""


def rows_within(budget_bytes: int, vocab_size: int) -> int:
    """Return how many rows of float32 logits fit into `budget_bytes`, at least one."""
    return max(1, budget_bytes // (4 * vocab_size))


def head_statistics(head: Callable[[Tensor], Tensor]) -> HeadStatistics:
    """Return what computes `token_statistics(head(hidden_ND), targets_N)`.

    `head` maps a chunk of hidden states to its logits, soft-cap, scale and bias included. A head
    without `statistics` of its own is asked for `chunk_rows` rows of logits at a time; they are
    overwritten, so it may hand out the same buffer every time.
    """
    if isinstance(head, ScoringHead):
        return head.statistics
    return partial(statistics_by_chunks, head)


def statistics_by_chunks(
    head: Callable[[Tensor], Tensor], hidden_ND: Tensor, targets_N: Tensor, request: HeadRequest
) -> TokenStatistics:
    """Return the results from the head's logits, whatever else the head can do."""
    parts = [
        token_statistics(
            head(hidden_ND[rows]),
            targets_N[rows],
            with_details=request.with_details,
            top_k=request.top_k,
            may_overwrite=True,
        )
        for rows in slices_of_rows(len(hidden_ND), request.chunk_rows)
    ]
    return TokenStatistics.joined(parts)
