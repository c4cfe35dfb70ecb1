"""Pure arithmetic of the comparison: turns, medians, paired ratios, shares, exponents."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with the least and the greatest value that it was taken over."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of at least one value. Raises ValueError without one."""
        if not values:
            raise ValueError("expected at least one value to take the median of, got none")
        return cls(statistics.median(values), min(values), max(values))

    def __format__(self, spec: str) -> str:
        if self.low == self.high:
            return format(self.median, spec)
        return f"{self.median:{spec}} ({self.low:{spec}}–{self.high:{spec}})"


def turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Yield (round, name) of every turn: A B C A B C …, so that a slow minute hits all alike."""
    return ((number, name) for number in range(rounds) for name in names)


def times_faster(
    base_seconds: Sequence[float],
    seconds: Sequence[float],
    *,
    base_tokens: int = 1,
    tokens: int = 1,
) -> Spread:
    """Return how many times the base's rate this one's is: the ratios round by round.

    Each ratio is of two turns of one round. Tokens count where the two did not score equally many
    in a turn.
    """
    rate = tokens / base_tokens
    return Spread.of([rate * b / s for b, s in zip(base_seconds, seconds, strict=True)])


def tokens_per_second(seconds: Sequence[float], num_tokens: int) -> Spread:
    """Return the rate of each turn."""
    return Spread.of([num_tokens / s for s in seconds])


@dataclass(frozen=True, slots=True)
class ForwardFlops:
    """Floating-point operations of one turn; a multiply-add counts as two.

    products:  of the weight matrices, the head on scored rows alone.
    attention: of queries with keys and of weights with values, the causal half alone.
    """

    products: float
    attention: float


def attention_flops(lengths: Sequence[int], *, num_layers: int, width: int) -> float:
    """Return `Σ 2 · layers · width · T (T + 1)` over windows of T fed ids.

    width: heads · head size.
    """
    return float(sum(2 * num_layers * width * t * (t + 1) for t in lengths))


def product_flops(sizes: Sequence[int], num_rows: int) -> float:
    """Return `Σ 2 · rows · in · out` over weight matrices of these sizes, in · out."""
    return float(2 * num_rows * sum(sizes))


def share_of_ceiling(
    gemm_seconds: Sequence[float], seconds: Sequence[float], flops: ForwardFlops
) -> tuple[Spread, Spread]:
    """Return two shares of the GEMM's own rate: weight products alone, and with attention.

    The first is the time of `torch.mm` over the same products in the same round, divided by the
    turn's; the second counts the attention's operations at that same rate.
    """
    alone = [g / s for g, s in zip(gemm_seconds, seconds, strict=True)]
    factor = 1 + flops.attention / flops.products
    return Spread.of(alone), Spread.of([factor * share for share in alone])


def growth_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return k of `cost = c · size^k`, by least squares of the logarithms."""
    if len(sizes) < 2:
        raise ValueError(f"expected at least two sizes for an exponent, got {len(sizes)}")
    x = [math.log(size) for size in sizes]
    y = [math.log(cost) for cost in costs]
    return statistics.linear_regression(x, y).slope
