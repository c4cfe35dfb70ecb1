"""Hidden states and a linear head in, per-token results out, by blocks of rows and vocabulary.

A block of logits is made, reduced and forgotten while it is in a core's cache: no logits go to
memory, and a product into a cached block runs faster than one into a large tensor. What is kept of
a row is its largest logit so far, and two sums over the exponentials below it.

Shape suffixes: N = targets, D = hidden size, V = vocabulary, C = vocabulary of one block.
"""

import math
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor

from perplexit.functional.nll import TokenStatistics, equal_blocks

BLOCKED_COLUMNS = frozenset({"nll", "entropy", "rank"})  # without whole logits
_LOG2_E = 1.0 / math.log(2.0)
# (rows, columns): 1 MiB of float32 logits; 16-bit ones are widened beside, in longer rows.
_BLOCK, _HALF_BLOCK = (512, 512), (256, 2048)
_MORE_COLUMNS = 2  # times as many where rows are few: beyond, the weights leave the cache
_FEWEST = 64  # columns of the product that gives the targets' own logits
_ROWS_AGAIN = 16


def blocked_statistics(
    hidden_ND: Tensor,
    targets_N: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None = None,
    *,
    with_details: bool = False,
    block_rows: int = _BLOCK[0],
) -> TokenStatistics:
    """Return `token_statistics(hidden_ND @ weight_VD.T + bias_V, targets_N)` without its logits.

    Logits are rounded to the hidden states' dtype, as the model's own product rounds them; sums run
    in float32 within a block and in float64 over blocks. The nll is the same to the last bit with
    and without details. The rank needs the target's logit before its block comes: it is made by a
    small product first, and where the block then gives other bits, the row is ranked again.
    """
    most, fewest = _BLOCK if hidden_ND.element_size() >= 4 else _HALF_BLOCK
    blocks = equal_blocks(len(hidden_ND), max(1, min(block_rows, most)))
    rows = max(1, blocks[0].stop)
    columns = min(len(weight_VD), most * fewest // rows, _MORE_COLUMNS * fewest)
    buffers = _Buffers.like(hidden_ND, rows, columns)
    head, parts, done = _Head(weight_VD, bias_V, columns), [], 0
    for block in blocks:
        found = _rows_statistics(hidden_ND[block], targets_N[block], head, buffers, with_details)
        parts.append(found.each(itemgetter(slice(done - block.start, None))))
        done = block.stop
    return TokenStatistics.joined(parts)


@dataclass(frozen=True, slots=True)
class _Head:
    weight_VD: Tensor
    bias_V: Tensor | None
    columns: int

    def block(self, hidden_ND: Tensor, start: int, out_NC: Tensor | None = None) -> Tensor:
        weight_DC = self.weight_VD[start : start + self.columns].t()
        if self.bias_V is None:
            return torch.mm(hidden_ND, weight_DC, out=out_NC)
        return torch.addmm(
            self.bias_V[start : start + self.columns], hidden_ND, weight_DC, out=out_NC
        )

    def target_logits(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        """Return the targets' logits, almost always the same bits that their blocks will give."""
        repeats = -(-_FEWEST // max(1, len(targets_N)))  # a product of one column adds otherwise
        ids_C = targets_N.repeat(repeats)
        bias_C = None if self.bias_V is None else self.bias_V[ids_C]
        logits_NC = _Head(self.weight_VD[ids_C], bias_C, len(ids_C)).block(hidden_ND, 0)
        return logits_NC.diagonal()

    def ranks(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        """Return the ranks of a few rows from their whole logits."""
        whole = _Head(self.weight_VD, self.bias_V, len(self.weight_VD))
        ranks = []
        for rows_ND, ids_N in zip(
            torch.split(hidden_ND, _ROWS_AGAIN), torch.split(targets_N, _ROWS_AGAIN), strict=True
        ):
            logits_NV = whole.block(rows_ND, 0)
            ranks.append(1 + (logits_NV > logits_NV.gather(1, ids_N[:, None])).sum(-1))
        return torch.cat(ranks)


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Flat room for one block of logits, for its wide copy and for what is made of it."""

    logits: Tensor
    wide: Tensor
    scratch: Tensor

    @classmethod
    def like(cls, hidden_ND: Tensor, rows: int, columns: int) -> "_Buffers":
        size = rows * columns
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        logits = hidden_ND.new_empty(size)
        wide = logits if logits.dtype == dtype else hidden_ND.new_empty(size, dtype=dtype)
        return cls(logits, wide, hidden_ND.new_empty(size, dtype=dtype))

    def shaped(self, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        size = rows * columns
        logits, wide, scratch = (
            flat[:size].view(rows, columns) for flat in (self.logits, self.wide, self.scratch)
        )
        return logits, wide, scratch


class _Running:
    """Over the blocks so far: the largest logit, and two sums of odds = exp(logit - largest).

    sum_N: Σ odds; weighted_N: Σ odds · (logit - largest).
    """

    def __init__(self, num_rows: int, like: Tensor) -> None:
        self.largest_N = like.new_full((num_rows,), -math.inf)
        self.sum_N = like.new_zeros(num_rows, dtype=torch.float64)
        self.weighted_N = self.sum_N.clone()

    def add(self, logits_NC: Tensor, scratch_NC: Tensor, with_details: bool) -> None:
        """Take in a block, which is overwritten."""
        before_N, self.largest_N = self.largest_N, torch.maximum(self.largest_N, logits_NC.amax(-1))
        # A row of nothing but -inf so far keeps its zeros.
        shift_N = self.largest_N.masked_fill(self.largest_N == -math.inf, 0.0)
        shifted_NC = logits_NC.sub_(shift_N[:, None])
        odds_NC = torch.mul(shifted_NC, _LOG2_E, out=scratch_NC).exp2_()
        fall_N = (before_N - shift_N).double()
        scale_N = fall_N.exp()
        if with_details:
            fall_N = fall_N.masked_fill(before_N == -math.inf, 0.0)
            self.weighted_N = scale_N * (self.weighted_N + fall_N * self.sum_N)
            self.weighted_N += _weighted(odds_NC, shifted_NC)
        self.sum_N = scale_N * self.sum_N + odds_NC.sum(-1)


def _weighted(odds_NC: Tensor, shifted_NC: Tensor) -> Tensor:
    # Not vecdot, which takes five times as long on the CPU.
    terms_NC = shifted_NC.mul_(odds_NC)
    weighted_N = terms_NC.sum(-1)
    if bool(weighted_N.isnan().any()):  # a token at -inf: 0 · -inf, whose limit is 0
        weighted_N = torch.where(odds_NC == 0, 0.0, terms_NC).sum(-1)
    return weighted_N


def _rows_statistics(
    hidden_ND: Tensor, targets_N: Tensor, head: _Head, buffers: _Buffers, with_details: bool
) -> TokenStatistics:
    num_rows, vocab_size = len(hidden_ND), len(head.weight_VD)
    running = _Running(num_rows, buffers.wide)
    own_N = torch.empty_like(running.largest_N)
    rank_N = torch.ones_like(own_N)
    bound_N1 = own_N[:, None]
    if with_details:
        bound_N1 = head.target_logits(hidden_ND, targets_N).to(own_N.dtype)[:, None]
    order_N = targets_N.argsort()
    starts = torch.arange(0, vocab_size + head.columns, head.columns, device=targets_N.device)
    places = torch.searchsorted(targets_N[order_N], starts).tolist()
    for index, start in enumerate(range(0, vocab_size, head.columns)):
        logits, wide, scratch = buffers.shaped(num_rows, min(head.columns, vocab_size - start))
        head.block(hidden_ND, start, logits)
        if wide.dtype != logits.dtype:
            wide.copy_(logits)
        inside = order_N[places[index] : places[index + 1]]
        own_N[inside] = wide[inside, targets_N[inside] - start]
        if with_details:  # 0.0 and 1.0 add up faster than bools, and exactly
            rank_N += torch.gt(wide, bound_N1, out=scratch).sum(-1)
        running.add(wide, scratch, with_details)
    log_sum_N = running.sum_N.log()
    nll_N = (log_sum_N + (running.largest_N.double() - own_N)).to(own_N.dtype)
    if not with_details:
        return TokenStatistics({"nll": nll_N})
    entropy_N = (log_sum_N - running.weighted_N / running.sum_N).to(own_N.dtype)
    again = (own_N != bound_N1[:, 0]).nonzero()[:, 0]
    if len(again):
        rank_N[again] = head.ranks(hidden_ND[again], targets_N[again]).to(rank_N.dtype)
    return TokenStatistics({"nll": nll_N, "entropy": entropy_N, "rank": rank_N.int()})
