"""Sums over scored tokens: the only thing that is ever added up. Metrics divide them, once.

Shape suffix: M = scored tokens of a run, in window order.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import NonFiniteError, UsageError

NonFinitePolicy = Literal["error", "count"]

_CHUNK = 1 << 16  # values turned into Python floats at a time by the exact sum


@dataclass(frozen=True, slots=True)
class NllTotals:
    """Sums over scored tokens. Merge with `+`; divide only in a metric.

    nll_sum:    nats, positive, float64.
    num_tokens: scored tokens: exactly those whose nll is in `nll_sum`.
    num_bytes:  UTF-8 bytes that those tokens stand for.
    num_words:  words that begin in those tokens.
    """

    nll_sum: float = 0.0
    num_tokens: int = 0
    num_bytes: int = 0
    num_words: int = 0

    def __add__(self, other: "NllTotals") -> "NllTotals":
        return NllTotals(
            self.nll_sum + other.nll_sum,
            self.num_tokens + other.num_tokens,
            self.num_bytes + other.num_bytes,
            self.num_words + other.num_words,
        )

    @classmethod
    def of(
        cls,
        nll_M: NDArray[np.floating],
        num_bytes_M: NDArray[np.integer] | None = None,
        num_words_M: NDArray[np.integer] | None = None,
    ) -> "NllTotals":
        """Return the totals of these tokens; the sum is exact to the last bit of float64.

        Raises NonFiniteError where a loss is NaN or infinite (see `finite_mask` for counting
        them instead), UsageError where the columns differ in length.
        """
        for name, column in (("num_bytes", num_bytes_M), ("num_words", num_words_M)):
            if column is not None and len(column) != len(nll_M):
                raise UsageError(
                    f"{name} must have one entry per scored token ({len(nll_M)}), got "
                    f"{len(column)}: give both columns for the same tokens"
                )
        require_finite(nll_M)
        return cls(
            nll_sum=exact_sum(nll_M),
            num_tokens=len(nll_M),
            num_bytes=0 if num_bytes_M is None else int(num_bytes_M.sum(dtype=np.int64)),
            num_words=0 if num_words_M is None else int(num_words_M.sum(dtype=np.int64)),
        )


def exact_sum(values_M: NDArray[np.floating]) -> float:
    """Return the float64 nearest to the true sum of finite `values_M` (Shewchuk: `math.fsum`).

    Correctly rounded, so it depends on neither the order of the values nor the processor's vectors.
    """

    def chunks() -> Iterator[list[float]]:
        for start in range(0, len(values_M), _CHUNK):
            yield values_M[start : start + _CHUNK].astype(np.float64).tolist()

    return math.fsum(chain.from_iterable(chunks()))


def require_finite(nll_M: NDArray[np.floating], **place_M: NDArray[np.integer]) -> None:
    """Check that every loss is finite.

    place_M: columns that say where a token is: `window_M`, `position_M`, `token_id_M`.
    Raises NonFiniteError that names the first NaN or infinite loss, with its place in each column.
    """
    bad = np.flatnonzero(~np.isfinite(nll_M))
    if len(bad) == 0:
        return
    first = int(bad[0])
    found = f"{float(nll_M[first])} nats at scored token {first}"
    for name, column in place_M.items():
        found += f", {name.removesuffix('_M').replace('_', ' ')} {int(column[first])}"
    if len(bad) > 1:
        found += f" (the first of {len(bad)})"
    raise NonFiniteError(
        f"expected a finite loss for every scored token, got {found}. Score in a wider dtype "
        "(float32), or count such tokens and leave them out with --on-non-finite count "
        "(on_non_finite='count' in Python)"
    )


def finite_mask(
    nll_M: NDArray[np.floating], policy: NonFinitePolicy, **place_M: NDArray[np.integer]
) -> tuple[NDArray[np.bool_], int]:
    """Return which tokens enter the sums, and how many do not.

    `error`: all of them, or NonFiniteError. `count`: the finite ones; the others leave the
    numerator and every denominator together, and their number is part of the result (as KenLM's
    "perplexity excluding OOVs" does with its count of OOVs).
    """
    if policy not in ("error", "count"):
        raise UsageError(
            f"on_non_finite must be 'error' or 'count', got {policy!r}: choose one of the two"
        )
    if policy == "error":
        require_finite(nll_M, **place_M)
    keep = np.isfinite(nll_M)
    return keep, int(len(keep) - np.count_nonzero(keep))
