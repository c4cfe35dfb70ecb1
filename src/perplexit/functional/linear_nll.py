"""Final hidden states and a head in, per-token results out: never the whole logits.

Shape suffixes: N = targets, D = hidden size, V = vocabulary.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor

from perplexit.functional.nll import TokenStatistics, statistics_in_place

DEFAULT_LOGITS_BYTES = 64 * 2**20


@runtime_checkable
class ScoringHead(Protocol):
    """A head that gives per-token results itself, without logits in between; see `fused_head`."""

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """Its logits."""
        ...

    def statistics(
        self,
        hidden_ND: Tensor,
        targets_N: Tensor,
        *,
        chunk_rows: int,
        with_details: bool,
        top_k: int,
    ) -> TokenStatistics:
        """What `statistics_of_hidden_states` gives; entropy and rank may be None."""
        ...


def rows_within(budget_bytes: int, vocab_size: int) -> int:
    """How many rows of float32 logits fit into `budget_bytes`, at least one."""
    return max(1, budget_bytes // (4 * vocab_size))


def statistics_of_hidden_states(
    hidden_ND: Tensor,
    targets_N: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    chunk_rows: int,
    with_details: bool = False,
    top_k: int = 0,
) -> TokenStatistics:
    """As `token_statistics(head(hidden_ND), targets_N)`, `chunk_rows` rows of logits at a time.

    `head` maps a chunk of hidden states to its logits, soft-cap, scale and bias included. The
    logits that it returns are overwritten, so it may hand out the same buffer every time.
    """
    if isinstance(head, ScoringHead):
        return head.statistics(
            hidden_ND, targets_N, chunk_rows=chunk_rows, with_details=with_details, top_k=top_k
        )
    return statistics_by_chunks(
        hidden_ND, targets_N, head, chunk_rows=chunk_rows, with_details=with_details, top_k=top_k
    )


def statistics_by_chunks(
    hidden_ND: Tensor,
    targets_N: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    chunk_rows: int,
    with_details: bool,
    top_k: int,
) -> TokenStatistics:
    """The same from the head's logits, whatever else it can do."""
    parts = [
        statistics_in_place(
            head(hidden_ND[start : start + chunk_rows]),
            targets_N[start : start + chunk_rows],
            with_details=with_details,
            top_k=top_k,
        )
        for start in range(0, max(1, len(hidden_ND)), chunk_rows)
    ]
    return TokenStatistics.joined(parts)
