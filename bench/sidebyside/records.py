"""What a section's record says of its contenders: medians, paired ratios, and the aims it meets.

A figure that was not measured raises KeyError.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from sidebyside.contenders import CEILING

Record = Mapping[str, Any]
BEST = "the best"
MIB = 2**20
SAME_TEXT = 1e-3  # relative difference of perplexities that still counts as the same


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


def rate(record: Record, name: str) -> Spread:
    """Return how much the contender does in a second."""
    entry = record["contenders"][name]
    return Spread.of([entry["num_tokens"] / seconds for seconds in entry["seconds"]])


def speedup(record: Record, name: str, base: str) -> Spread:
    """Return how many times the rate of `base` the contender's is: the ratios round by round.

    Tokens count where the two did not score equally many in a turn.
    """
    ours, theirs = (record["contenders"][contender] for contender in (name, base))
    tokens = ours["num_tokens"] / theirs["num_tokens"]
    pairs = zip(theirs["seconds"], ours["seconds"], strict=True)
    return Spread.of([tokens * other / own for other, own in pairs])


def share(record: Record, name: str, *, attention: bool = False) -> Spread:
    """Return the time of `torch.mm` over the same weight products, divided by the turn's.

    Both are of one round. attention: count its operations too, at the same rate.
    """
    gemm, ours = (record["contenders"][contender]["seconds"] for contender in (CEILING, name))
    flops = record["flops"]
    factor = 1 + attention * flops["attention"] / flops["products"]
    return Spread.of([factor * (g / s) for g, s in zip(gemm, ours, strict=True)])


def mebibytes(record: Record, name: str, key: str = "peak_bytes") -> float:
    """Return a figure of the turn for memory: by default its peak beyond the loaded model."""
    return float(record["contenders"][name]["memory"][key]) / MIB


def mean_nll(record: Record, name: str) -> float:
    """Return nats per token: of the check if there was one, else of the turn for memory."""
    entry = record["contenders"][name]
    found = entry.get("check") or entry["memory"]
    return float(found["nll_sum"] / found["num_tokens"])


def perplexity_apart(record: Record, name: str, base: str) -> float:
    """Return `|perplexity / the base's − 1|`."""
    return abs(math.expm1(mean_nll(record, name) - mean_nll(record, base)))


def best_within(record: Record, base: str, tolerance: float) -> str:
    """Return the fastest of Perplexit's own with the base's perplexity, within `tolerance`."""
    rates: dict[float, str] = {}
    for name in record["contenders"]:
        with suppress(KeyError):
            ours = name.startswith(("perplexit", "openvino"))
            if ours and perplexity_apart(record, name, base) <= tolerance:
                rates[speedup(record, name, base).median] = name
    return rates[max(rates, default=0.0)]


class Finding(NamedTuple):
    """An aim: its words, the section, the limit, what was measured, and whether that meets it."""

    what: str
    section: str
    aim: str
    found: float
    met: bool


def findings(section: str, record: Record, aims: Sequence[Sequence[Any]]) -> Iterator[Finding]:
    """Yield every aim of the section that something was measured for."""
    for measure, asked, base, limit in aims:
        words, find, at_most = MEASURES[measure]
        with suppress(KeyError):
            name = best_within(record, base, SAME_TEXT) if asked == BEST else asked
            found = find(record, name, base)
            met = found <= limit if at_most else found >= limit
            what = words.format(name=name, base=base)
            yield Finding(what, section, f"{'≤' if at_most else '≥'} {limit:g}", found, met)


def _speed(record: Record, name: str, base: str) -> float:
    return speedup(record, name, base).median


def _token(record: Record, name: str, _: str) -> float:
    return float(record["contenders"][name]["check"]["largest_difference"])


def _row(record: Record, name: str, _: str) -> float:
    value = record["rows"][0][name]
    return statistics.median(value) if isinstance(value, list) else float(value)


# What an aim can be about: its words, how it is found, and whether the limit is the most.
MEASURES: dict[str, tuple[str, Callable[[Record, str, str], float], bool]] = {
    "speed": ("{name} × {base}", _speed, False),
    "best": ("the best of `perplexit eval` ({name}) × {base} fp32", _speed, False),
    "share": ("{name}, share of {base}", lambda *of: 1 / _speed(*of), True),
    "ceiling": ("share of the GEMM ceiling", lambda r, n, _: share(r, n).median, False),
    "peak": (
        "peak beyond the weights, against {base}",
        lambda r, n, b: mebibytes(r, n) / mebibytes(r, b),
        True,
    ),
    "token": ("{name}, largest difference of a token (nats)", _token, True),
    "perplexity": ("{name}, perplexity apart from {base}", perplexity_apart, True),
    "row": ("{name}", _row, True),
}
