"""What the tool is held to, and what was found: the first table of docs/benchmarks.md."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sidebyside.tables import mean_nll, peak_bytes, ratio_to, shares

Record = Mapping[str, Any]
OURS = "perplexit"
OPENVINO = ("openvino bf16", "openvino int8", "openvino int8 bf16")
SAME_TEXT = 1e-3  # relative difference of perplexities that still counts as the same
HALF_PERCENT = 5e-3


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
        """Whether the median reaches the aim."""
        return self.found <= self.aim if self.at_most else self.found >= self.aim

    def row(self) -> str:
        """As a row of the table."""
        sign = "≤" if self.at_most else "≥"
        met = "yes" if self.met else "no"
        return f"| {self.what} | {self.section} | {sign} {self.aim:g} | {self.found:.3g} | {met} |"


def findings(records: Mapping[str, Record], scripts: Mapping[str, Record]) -> Iterator[Finding]:
    """Every aim that something was measured for."""
    for section, record in records.items():
        kind = section.rsplit("-", 2)[1]
        if kind in ("fp32", "bf16"):
            yield from _whole_windows(section, record, kind)
        elif kind == "strided":
            yield from _ratio(section, record, OURS, "hf guide", 1.2)
        elif kind == "openvino":
            yield from _openvino(section, record)
        elif kind == "cached":
            for name in record["contenders"]:
                if name != record["base"]:
                    yield from _ratio(section, record, name, record["base"], 10.0)
                    yield from _token_difference(section, record, name, "check")
    if overhead := scripts.get("overhead"):
        yield Finding(
            "overhead beside the model, share", "overhead", 0.03, overhead["share"], at_most=True
        )
    if preparing := scripts.get("prepare"):
        pairs = zip(preparing["seconds"]["prepare"], preparing["seconds"]["encode"], strict=True)
        ratios = sorted(ours / raw for ours, raw in pairs)
        yield Finding(
            "prepare, times the tokenizer's batch encoding",
            "prepare",
            1.2,
            ratios[len(ratios) // 2],
            at_most=True,
        )


def _whole_windows(section: str, record: Record, kind: str) -> Iterator[Finding]:
    yield from _ratio(section, record, OURS, "plain loop", 1.08)
    yield from _ratio(section, record, OURS, "lm-eval", 1.15)
    if (share := shares(record, OURS)) is not None:
        aim = 0.75 if kind == "fp32" else 0.60
        yield Finding("share of the GEMM ceiling", section, aim, share[0].median)
    ours = peak_bytes(record, OURS)
    for peer in ("plain loop", "lm-eval"):
        theirs = peak_bytes(record, peer)
        if ours is not None and theirs:
            what = f"peak beyond the weights, against {peer}"
            yield Finding(what, section, 0.25, ours / theirs, at_most=True)


def _openvino(section: str, record: Record) -> Iterator[Finding]:
    yield from _ratio(section, record, "openvino fp32", "plain loop", 1.2)
    yield from _token_difference(section, record, "openvino fp32", "check")
    for name in OPENVINO:
        yield from _ratio(section, record, name, "plain loop", 1.7)
        reference = "perplexit bf16" if name == "openvino bf16" else OURS
        yield from _same_perplexity(section, record, name, reference, HALF_PERCENT)
    best = best_within(record, "lm-eval", SAME_TEXT)
    if best is not None:
        found = ratio_to(record, best, "lm-eval")
        if found is not None:
            what = f"the best of `perplexit eval` ({best}) × lm-eval fp32"
            yield Finding(what, section, 2.0, found.median)
            yield from _same_perplexity(section, record, best, "lm-eval", SAME_TEXT)


def best_within(record: Record, base: str, tolerance: float) -> str | None:
    """The fastest of Perplexit's own with the base's perplexity, within `tolerance`."""
    rates = {}
    for name in record["contenders"]:
        ratio = ratio_to(record, name, base)
        apart = perplexity_apart(record, name, base)
        ours = name.startswith(("perplexit", "openvino"))
        if ours and ratio is not None and apart is not None and apart <= tolerance:
            rates[name] = ratio.median
    return max(rates, key=lambda name: rates[name], default=None)


def perplexity_apart(record: Record, name: str, base: str) -> float | None:
    """`|perplexity / the base's − 1|`."""
    ours, theirs = mean_nll(record, name), mean_nll(record, base)
    return None if ours is None or theirs is None else abs(math.expm1(ours - theirs))


def _ratio(section: str, record: Record, name: str, base: str, aim: float) -> Iterator[Finding]:
    found = ratio_to(record, name, base)
    if found is not None:
        yield Finding(f"{name} × {base}", section, aim, found.median)


def _token_difference(section: str, record: Record, name: str, part: str) -> Iterator[Finding]:
    found = record["contenders"].get(name, {}).get(part, {})
    if "largest_difference" in found:
        what = f"{name}, largest difference of a token (nats)"
        yield Finding(what, section, 1e-3, found["largest_difference"], at_most=True)


def _same_perplexity(
    section: str, record: Record, name: str, base: str, aim: float
) -> Iterator[Finding]:
    apart = perplexity_apart(record, name, base)
    if apart is not None:
        what = f"{name}, perplexity apart from {base}"
        yield Finding(what, section, aim, apart, at_most=True)


def aims_table(records: Mapping[str, Record], scripts: Mapping[str, Record]) -> list[str]:
    """The aims in Markdown."""
    rows = [finding.row() for finding in findings(records, scripts)]
    return ["| what | section | aim | measured | met |", "|---|---|---|---|---|", *rows]
