"""What a section's record says of its contenders, and which aims it meets."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sidebyside.contenders import CEILING
from sidebyside.paired_ratios import ForwardFlops, Spread, share_of_ceiling, times_faster

Record = Mapping[str, Any]
BEST = "the best"
SAME_TEXT = 1e-3  # relative difference of perplexities that still counts as the same


def timed(record: Record, name: str) -> Record | None:
    """Return a contender's entry, where it took turns."""
    entry: Record = record["contenders"].get(name, {})
    return entry if entry.get("seconds") else None


def ratio_to(record: Record, name: str, base: str) -> Spread | None:
    """Return how many times the rate of `base` the contender's is; None where either has none."""
    ours, theirs = (timed(record, contender) for contender in (name, base))
    if ours is None or theirs is None:
        return None
    return times_faster(
        theirs["seconds"],
        ours["seconds"],
        base_tokens=theirs["num_tokens"],
        tokens=ours["num_tokens"],
    )


def shares(record: Record, name: str) -> tuple[Spread, Spread] | None:
    """Return shares of the GEMM ceiling: weight products alone, and with attention counted."""
    ours, gemm = timed(record, name), timed(record, CEILING)
    if ours is None or gemm is None or record.get("flops") is None:
        return None
    return share_of_ceiling(gemm["seconds"], ours["seconds"], ForwardFlops(**record["flops"]))


def peak_bytes(record: Record, name: str) -> float | None:
    """Return the most memory of a turn beyond the loaded model; None where it is not measured."""
    return _memory(record, name, "peak_bytes")


def loaded_bytes(record: Record, name: str) -> float | None:
    """Return the resident set before a turn: libraries, weights, and what was made of them."""
    return _memory(record, name, "loaded_bytes")


def mean_nll(record: Record, name: str) -> float | None:
    """Return nats per token: of the check if there was one, else of the turn for memory."""
    entry = record["contenders"].get(name, {})
    found = entry.get("check") or entry.get("memory") or {}
    return None if found.get("nll_sum") is None else found["nll_sum"] / found["num_tokens"]


def _memory(record: Record, name: str, key: str) -> float | None:
    found = record["contenders"].get(name, {}).get("memory", {}).get(key)
    return None if found is None else float(found)


@dataclass(frozen=True, slots=True)
class Aim:
    """A limit on one measure of a contender, beside another one where the measure needs it."""

    measure: str
    name: str
    base: str
    limit: float


@dataclass(frozen=True, slots=True)
class Measure:
    """What an aim can be about: its words, how it is found, and on which side the limit lies."""

    what: str
    find: Callable[[Record, str, str], float | None]
    at_most: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """An aim: at least (or at most) so much, and what was measured."""

    what: str
    section: str
    aim: float
    found: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Return whether the median reaches the aim."""
        return self.found <= self.aim if self.at_most else self.found >= self.aim

    def row(self) -> list[str]:
        """Return the cells of the table's row."""
        limit = f"{'≤' if self.at_most else '≥'} {self.aim:g}"
        return [self.what, self.section, limit, f"{self.found:.3g}", "yes" if self.met else "no"]


def findings(section: str, record: Record, aims: tuple[Aim, ...]) -> Iterator[Finding]:
    """Yield every aim of the section that something was measured for."""
    for aim in aims:
        measure = MEASURES[aim.measure]
        name = best_within(record, aim.base, SAME_TEXT) if aim.name == BEST else aim.name
        found = None if name is None else measure.find(record, name, aim.base)
        if found is not None:
            what = measure.what.format(name=name, base=aim.base)
            yield Finding(what, section, aim.limit, found, measure.at_most)


def best_within(record: Record, base: str, tolerance: float) -> str | None:
    """Return the fastest of Perplexit's own with the base's perplexity, within `tolerance`."""
    rates = {}
    for name in record["contenders"]:
        ratio = ratio_to(record, name, base)
        apart = perplexity_apart(record, name, base)
        ours = name.startswith(("perplexit", "openvino"))
        if ours and ratio is not None and apart is not None and apart <= tolerance:
            rates[name] = ratio.median
    return max(rates, key=lambda name: rates[name], default=None)


def perplexity_apart(record: Record, name: str, base: str) -> float | None:
    """Return `|perplexity / the base's − 1|`."""
    ours, theirs = mean_nll(record, name), mean_nll(record, base)
    return None if ours is None or theirs is None else abs(math.expm1(ours - theirs))


def _speed(record: Record, name: str, base: str) -> float | None:
    found = ratio_to(record, name, base)
    return None if found is None else found.median


def _share_of_ceiling(record: Record, name: str, base: str) -> float | None:
    del base
    found = shares(record, name)
    return None if found is None else found[0].median


def _peak_share(record: Record, name: str, base: str) -> float | None:
    ours, theirs = peak_bytes(record, name), peak_bytes(record, base)
    return ours / theirs if ours is not None and theirs else None


def _largest_difference(record: Record, name: str, base: str) -> float | None:
    del base
    entry: Mapping[str, Any] = record["contenders"].get(name, {})
    found: float | None = entry.get("check", {}).get("largest_difference")
    return found


def _prepare_ratio(record: Record, name: str, base: str) -> float:
    del name, base
    pairs = zip(record["seconds"]["prepare"], record["seconds"]["encode"], strict=True)
    return float(statistics.median_high(ours / raw for ours, raw in pairs))


MEASURES = {
    "speed": Measure("{name} × {base}", _speed),
    "best": Measure("the best of `perplexit eval` ({name}) × {base} fp32", _speed),
    "ceiling": Measure("share of the GEMM ceiling", _share_of_ceiling),
    "peak": Measure("peak beyond the weights, against {base}", _peak_share, at_most=True),
    "token": Measure(
        "{name}, largest difference of a token (nats)", _largest_difference, at_most=True
    ),
    "perplexity": Measure("{name}, perplexity apart from {base}", perplexity_apart, at_most=True),
    "overhead": Measure(
        "overhead beside the model, share", lambda record, *_: record["share"], at_most=True
    ),
    "prepare": Measure(
        "prepare, times the tokenizer's batch encoding", _prepare_ratio, at_most=True
    ),
}
