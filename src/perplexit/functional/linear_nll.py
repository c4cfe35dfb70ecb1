"""Final hidden states and a head in, per-token results out: never the whole logits.

Shape suffixes: N = targets, D = hidden size, V = vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

from torch import Tensor

from perplexit.functional.nll import TokenStatistics, slices_of_rows, statistics_in_place

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
        ...

    def statistics(
        self, hidden_ND: Tensor, targets_N: Tensor, request: HeadRequest
    ) -> TokenStatistics:
        """Return the columns of the targets; entropy and rank only `with_details`, if at all."""
        ...


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
        statistics_in_place(
            head(hidden_ND[rows]),
            targets_N[rows],
            with_details=request.with_details,
            top_k=request.top_k,
        )
        for rows in slices_of_rows(len(hidden_ND), request.chunk_rows)
    ]
    return TokenStatistics.joined(parts)
