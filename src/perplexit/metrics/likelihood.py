"""Likelihood figures: each one division of `NllTotals`, each with its unit.

Shape suffix: M = scored tokens of a run, in window order.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import EmptyScoreError, UsageError
from perplexit.metrics.totals import NllTotals, exact_sum, require_finite

MAX_EXPONENT = math.log(sys.float_info.max)  # 709.78…: exp of anything above overflows float64


def exp_or_inf(exponent: float) -> float:
    """`e ** exponent`; infinite only where float64 really overflows (above 709.78)."""
    return math.exp(exponent) if exponent <= MAX_EXPONENT else math.inf


def json_figure(name: str, value: float | None) -> tuple[float | None, str | None]:
    """`(value, None)` for a finite figure, `(None, reason)` for one that JSON cannot hold."""
    if value is None:
        return None, f"{name} does not exist here"
    if math.isnan(value):
        return None, f"{name} is not a number: a loss was NaN"
    if math.isinf(value):
        return None, f"{name} overflows float64: its logarithm is above {MAX_EXPONENT:.2f}"
    return value, None


def mean_nll(totals: NllTotals) -> float:
    """`nll_sum / num_tokens`, in nats a token. Raises EmptyScoreError where no token was scored."""
    return _divide(totals.nll_sum, totals.num_tokens, "token")


def perplexity(totals: NllTotals) -> float:
    """`exp(nll_sum / num_tokens)`; infinite only past the limit of exp, a mean loss of 709.78.

    Raises EmptyScoreError where no token was scored.
    """
    return exp_or_inf(mean_nll(totals))


def bits_per_byte(totals: NllTotals) -> float:
    """`nll_sum / (ln 2 · num_bytes)`: comparable across tokenizers, in bits.

    Raises EmptyScoreError where no byte was scored.
    """
    return _divide(totals.nll_sum, totals.num_bytes, "byte") / math.log(2)


def byte_perplexity(totals: NllTotals) -> float:
    """`exp(nll_sum / num_bytes)`. Raises EmptyScoreError where no byte was scored."""
    return exp_or_inf(_divide(totals.nll_sum, totals.num_bytes, "byte"))


def word_perplexity(totals: NllTotals) -> float:
    """`exp(nll_sum / num_words)`. Raises EmptyScoreError where no word begins in a scored token."""
    return exp_or_inf(_divide(totals.nll_sum, totals.num_words, "word"))


def _divide(nll_sum: float, count: int, unit: str) -> float:
    if count <= 0:
        raise EmptyScoreError(
            f"expected at least one scored {unit}, got {count}: "
            "the input holds nothing to score (a text of at least two tokens is needed)"
        )
    return nll_sum / count


class ScoredTokens(Protocol):
    """Columns of a run's scored tokens, one entry a token, in window order."""

    @property
    def document(self) -> NDArray[np.int32]:
        """The document's index."""
        ...

    @property
    def domain(self) -> NDArray[np.int32] | None:
        """The index in `domains` of the token's domain, or -1; None where there are no domains."""
        ...

    @property
    def domains(self) -> tuple[str, ...]:
        """The names of the domains."""
        ...

    @property
    def nll(self) -> NDArray[np.float32]:
        """The token's loss in nats."""
        ...

    @property
    def num_bytes(self) -> NDArray[np.int32]:
        """The UTF-8 bytes that the token stands for."""
        ...

    @property
    def num_words(self) -> NDArray[np.int32]:
        """The words that begin in the token."""
        ...


@dataclass(frozen=True, slots=True)
class GroupLikelihood:
    """One document's totals, and the perplexity of those tokens alone."""

    name: str
    totals: NllTotals
    perplexity: float


def group_totals(
    group_M: NDArray[np.integer],
    nll_M: NDArray[np.floating],
    num_bytes_M: NDArray[np.integer],
    num_words_M: NDArray[np.integer],
) -> dict[int, NllTotals]:
    """The totals of each group that has a scored token, by its index, in increasing order.

    Raises NonFiniteError where a loss is NaN or infinite.
    """
    require_finite(nll_M)
    return {
        group: NllTotals(
            exact_sum(nll_M[rows]),
            len(rows),
            int(num_bytes_M[rows].sum(dtype=np.int64)),
            int(num_words_M[rows].sum(dtype=np.int64)),
        )
        for group, rows in group_rows(group_M).items()
    }


def group_rows(group_M: NDArray[np.integer]) -> dict[int, NDArray[np.int64]]:
    """Return the rows of each group, in order, by its index, in increasing order."""
    if len(group_M) == 0:
        return {}
    order = np.argsort(group_M, kind="stable")
    group = group_M[order]
    starts = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
    pieces = np.split(order, starts[1:])
    return dict(zip(group[starts].tolist(), pieces, strict=True))


def per_document(tokens: ScoredTokens) -> tuple[GroupLikelihood, ...]:
    """A row a document with at least one scored token, in document order."""
    by_document = group_totals(tokens.document, tokens.nll, tokens.num_bytes, tokens.num_words)
    return tuple(
        GroupLikelihood(str(document), totals, perplexity(totals))
        for document, totals in by_document.items()
    )


def macro_average_perplexity(groups: Sequence[NllTotals]) -> float:
    """`exp(mean over groups of nll_sum / num_tokens)`: each group weighs the same.

    It is the geometric mean of the groups' perplexities (the arithmetic one is dominated by the
    hardest group). Weighing domains alike, whatever their length, is what Paloma does (Magnusson
    et al. 2024, arXiv:2312.10523).
    Raises EmptyScoreError where there is no group, or one without a scored token.
    """
    return exp_or_inf(_divide(math.fsum(mean_nll(group) for group in groups), len(groups), "group"))


@dataclass(frozen=True, slots=True)
class PositionBucket:
    """Mean loss of the targets whose position in their window lies in `start … stop - 1`."""

    start: int
    stop: int
    num_tokens: int
    mean_nll: float | None  # None where no target lies here


def loss_by_position(
    position_M: NDArray[np.integer], nll_M: NDArray[np.floating], num_buckets: int = 16
) -> tuple[PositionBucket, ...]:
    """Mean loss by the target's position in its window, in buckets of equal width.

    A jump at some position is how a broken long-context kernel shows itself.
    Raises UsageError for less than one bucket, NonFiniteError for a loss that is not finite.
    """
    if num_buckets < 1:
        raise UsageError(f"num_buckets must be at least 1, got {num_buckets}: ask for more")
    require_finite(nll_M)
    if len(position_M) == 0:
        return ()
    first, stop = int(position_M.min()), int(position_M.max()) + 1
    num_buckets = min(num_buckets, stop - first)
    edges = first + (np.arange(num_buckets + 1) * (stop - first)) // num_buckets
    bucket = np.searchsorted(edges, position_M, side="right") - 1
    counts = np.bincount(bucket, minlength=num_buckets)
    sums = np.bincount(bucket, weights=nll_M.astype(np.float64), minlength=num_buckets)
    return tuple(
        PositionBucket(
            start=int(edges[index]),
            stop=int(edges[index + 1]),
            num_tokens=int(counts[index]),
            mean_nll=float(sums[index] / counts[index]) if counts[index] else None,
        )
        for index in range(num_buckets)
    )
