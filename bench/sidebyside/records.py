"""What a section's record says of its contenders, and which aims it meets.

A figure that was not measured raises KeyError.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from sidebyside.contenders import CEILING
from sidebyside.paired_ratios import ForwardFlops, Spread, share_of_ceiling, times_faster

Record = Mapping[str, Any]
BEST = "the best"
SAME_TEXT = 1e-3  # relative difference of perplexities that still counts as the same


def rate_ratio(record: Record, name: str, base: str) -> Spread:
    """Return how many times the rate of `base` the contender's is."""
    ours, theirs = (record["contenders"][contender] for contender in (name, base))
    tokens = {"base_tokens": theirs["num_tokens"], "tokens": ours["num_tokens"]}
    return times_faster(theirs["seconds"], ours["seconds"], **tokens)


def shares(record: Record, name: str) -> tuple[Spread, Spread]:
    """Return shares of the GEMM ceiling: weight products alone, and with attention counted."""
    gemm, ours = (record["contenders"][contender]["seconds"] for contender in (CEILING, name))
    return share_of_ceiling(gemm, ours, ForwardFlops(**record["flops"]))


def memory_bytes(record: Record, name: str, key: str = "peak_bytes") -> float:
    """Return a figure of the turn for memory: by default its peak beyond the loaded model."""
    return float(record["contenders"][name]["memory"][key])


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
                rates[rate_ratio(record, name, base).median] = name
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
    return rate_ratio(record, name, base).median


def _ceiling(record: Record, name: str, _: str) -> float:
    return shares(record, name)[0].median


def _peak(record: Record, name: str, base: str) -> float:
    return memory_bytes(record, name) / memory_bytes(record, base)


def _token(record: Record, name: str, _: str) -> float:
    return float(record["contenders"][name]["check"]["largest_difference"])


def _row(record: Record, name: str, _: str) -> float:
    value = record["rows"][0][name]
    return Spread.of(value if isinstance(value, list) else [value]).median


# What an aim can be about: its words, how it is found, and whether the limit is the most.
MEASURES: dict[str, tuple[str, Callable[[Record, str, str], float], bool]] = {
    "speed": ("{name} × {base}", _speed, False),
    "best": ("the best of `perplexit eval` ({name}) × {base} fp32", _speed, False),
    "share": ("{name}, share of {base}", lambda *of: 1 / _speed(*of), True),
    "ceiling": ("share of the GEMM ceiling", _ceiling, False),
    "peak": ("peak beyond the weights, against {base}", _peak, True),
    "token": ("{name}, largest difference of a token (nats)", _token, True),
    "perplexity": ("{name}, perplexity apart from {base}", perplexity_apart, True),
    "row": ("{name}", _row, True),
}
