"""Figures and verdicts in words, with as many digits as their intervals carry."""

import math
from dataclasses import dataclass

from perplexit.comparison import Comparison
from perplexit.report.subject import Subject

DASH = "–"


@dataclass(frozen=True, slots=True)
class Finding:
    """One candidate's verdict. `kind` is the comparison's verdict, for colour and sign."""

    label: str
    kind: str
    says: str  # what follows the label
    ratio: str
    detail: str


def figure(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """A figure to the digits that it carries: `18.30`; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:,.{decimals(value, low, high)}f}"


def interval(low: float | None, high: float | None) -> str:
    """`[17.12, 19.57]`, or nothing where there is none."""
    if low is None or high is None:
        return ""
    places = decimals(max(abs(low), abs(high)), low, high)
    return f"[{low:,.{places}f}, {high:,.{places}f}]"


def decimals(value: float, low: float | None, high: float | None) -> int:
    """How many places a figure is given to: two digits of its interval's width, or four in all."""
    size = math.floor(math.log10(abs(value))) if value else 0
    places = 3 - size
    width = abs(high - low) if low is not None and high is not None else 0.0
    if width > 0:
        places = max(places, 1 - math.floor(math.log10(width)))
    return min(max(places, 1), 6)


def ratio_of(comparison: Comparison) -> str:
    """`1.021 [1.018, 1.024]`."""
    low, high = comparison.ppl_ratio_low, comparison.ppl_ratio_high
    return f"{figure(comparison.ppl_ratio, low, high)} {interval(low, high)}".strip()


def findings_of(subject: Subject) -> list[Finding]:
    """A finding a candidate."""
    return [
        Finding(label, comparison.verdict, _says(subject, comparison), ratio_of(comparison), detail)
        for label, _, comparison in subject.candidates
        for detail in [_detail(comparison)]
    ]


def headline(subject: Subject) -> str:
    """The first sentence of the report."""
    run = subject.reference
    if not subject.comparisons and subject.aligned:
        return _headline_of_bytes(subject)
    if not subject.comparisons:
        shown = figure(run.perplexity, run.perplexity_low, run.perplexity_high)
        span = interval(run.perplexity_low, run.perplexity_high)
        return f"{subject.labels[0]} has a perplexity of {shown} {span}".rstrip() + "."
    if len(subject.comparisons) == 1:
        finding = findings_of(subject)[0]
        return f"{finding.label} {finding.says}: perplexity ratio {finding.ratio}."
    counts = dict.fromkeys(("worse", "better", "not distinguishable"), 0)
    for comparison in subject.comparisons:
        counts[comparison.verdict] += 1
    number = len(subject.comparisons)
    if counts["not distinguishable"] == number:
        return f"None of {number} candidates can be told apart from {subject.labels[0]}."
    for kind in ("worse", "better"):
        if counts[kind] == number:
            every = "Both" if number == 2 else f"All {number}"
            return f"{every} candidates are {kind} than {subject.labels[0]}."
    return f"Of {number} candidates against {subject.labels[0]}, {_listed(counts)}."


def _headline_of_bytes(subject: Subject) -> str:
    """Of runs over the same text in other tokens alone."""
    if len(subject.aligned) > 1:
        number = len(subject.aligned)
        return f"{number} runs in other tokens, compared with {subject.labels[0]} byte by byte."
    label, found = subject.aligned[0]
    says = _VERDICTS[found.verdict].format(subject.labels[0])
    bits = found.figures()["bits_per_byte_difference"]
    shown = figure(bits.value, bits.low, bits.high)
    span = interval(bits.low, bits.high)
    sign = "+" if bits.value > 0 else ""
    return f"Byte by byte, {label} {says}: {sign}{shown} {span}".rstrip() + " bits a byte."


_VERDICTS = {
    "worse": "is worse than {}",
    "better": "is better than {}",
    "not distinguishable": "cannot be told apart from {}",
}


def _says(subject: Subject, comparison: Comparison) -> str:
    return _VERDICTS[comparison.verdict].format(subject.labels[0])


def _detail(comparison: Comparison) -> str:
    difference = comparison.log_perplexity_difference
    low, high = comparison.log_perplexity_difference_low, comparison.log_perplexity_difference_high
    if low is None or high is None:
        reason = next(iter(comparison.reasons.values()), "no interval exists")
        return f"Nothing is claimed: {reason}."
    if comparison.verdict == "not distinguishable":
        largest = max(abs(low), abs(high))
        return f"If there is a difference, it is below {quantity(largest)} nats a token: " + (
            "the interval reaches to both sides of no difference."
            if low <= 0 <= high
            else "the whole interval lies inside the noise of the arithmetic."
        )
    side = "more" if difference > 0 else "fewer"
    percent = abs(math.expm1(difference)) * 100
    way = "higher" if difference > 0 else "lower"
    return (
        f"Each token costs it {quantity(abs(difference))} nats {side} on average, which makes the "
        f"perplexity {percent:.2g}\N{NO-BREAK SPACE}% {way}."
    )


def quantity(value: float) -> str:
    """Two significant digits, without an exponent where a reader can do without."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else DASH
    if value < 1e-5:
        return f"{value:.1e}"
    return f"{value:.{max(1 - math.floor(math.log10(value)), 0)}f}"


def mebibytes(num_bytes: float | None) -> str:
    """Bytes as MiB or GiB; a dash where unknown."""
    if num_bytes is None:
        return DASH
    size = num_bytes / 2**20
    return f"{size:,.0f} MiB" if size < 10_000 else f"{size / 1024:,.1f} GiB"


def _listed(counts: dict[str, int]) -> str:
    """`2 are worse and 1 not distinguishable`."""
    parts = [f"{count} {kind}" for kind, count in counts.items() if count]
    number, _, kind = parts[0].partition(" ")
    parts[0] = f"{number} {'is' if number == '1' else 'are'} {kind}"
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
