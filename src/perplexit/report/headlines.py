"""Figures and verdicts in words, with as many digits as their intervals carry."""

from dataclasses import dataclass

from perplexit.comparison import VERDICTS, Comparison
from perplexit.metrics.number_format import DASH, figure, interval
from perplexit.report.labelled_runs import LabelledRuns


@dataclass(frozen=True, slots=True)
class Finding:
    """One candidate's verdict. `kind` is the comparison's verdict, for colour and sign."""

    label: str
    kind: str
    says: str  # what follows the label
    ratio: str
    detail: str


def ratio_of(comparison: Comparison) -> str:
    """Return `1.021 [1.018, 1.024]`."""
    low, high = comparison.ppl_ratio_low, comparison.ppl_ratio_high
    return f"{figure(comparison.ppl_ratio, low, high)} {interval(low, high)}".strip()


def findings_of(labelled: LabelledRuns) -> list[Finding]:
    """Return one finding for each candidate."""
    return [
        Finding(
            label,
            comparison.verdict,
            comparison.judged.predicate(labelled.labels[0]),
            ratio_of(comparison),
            comparison.judged.detail(),
        )
        for label, _, comparison in labelled.candidates
    ]


def headline(labelled: LabelledRuns) -> str:
    """Return the first sentence of the report."""
    run = labelled.reference
    if not labelled.comparisons and labelled.aligned:
        return _headline_of_bytes(labelled)
    if not labelled.comparisons:
        shown = figure(run.perplexity, run.perplexity_low, run.perplexity_high)
        span = interval(run.perplexity_low, run.perplexity_high)
        return f"{labelled.labels[0]} has a perplexity of {shown} {span}".rstrip() + "."
    if len(labelled.comparisons) == 1:
        finding = findings_of(labelled)[0]
        return f"{finding.label} {finding.says}: perplexity ratio {finding.ratio}."
    return _headline_of_several(labelled)


def _headline_of_several(labelled: LabelledRuns) -> str:
    counts: dict[str, int] = dict.fromkeys(VERDICTS, 0)
    for comparison in labelled.comparisons:
        counts[comparison.verdict] += 1
    number, reference = len(labelled.comparisons), labelled.labels[0]
    every = "Both" if number == 2 else f"All {number}"
    if counts["inconclusive"] == number:
        says = f"None of {number} candidates can be told from {reference} by perplexity"
        moved = sum(bool(comparison.judged.changed) for comparison in labelled.comparisons)
        if moved == number:
            says += ", but the predictions of all of them did change"
        elif moved:
            says += f", but the predictions of {moved} did change"
        return says + "."
    if counts["equivalent"] == number:
        return f"{every} candidates are equivalent to {reference}."
    for kind in ("worse", "better"):
        if counts[kind] == number:
            return f"{every} candidates are {kind} than {reference}."
    return f"Of {number} candidates against {reference}, {_listed(counts)}."


def _headline_of_bytes(labelled: LabelledRuns) -> str:
    """Return of runs over the same text in other tokens alone."""
    if len(labelled.aligned) > 1:
        number = len(labelled.aligned)
        return f"{number} runs in other tokens, compared with {labelled.labels[0]} byte by byte."
    label, found = labelled.aligned[0]
    bits = found.figures()["bits_per_byte_difference"]
    shown = figure(bits.value, bits.low, bits.high)
    span = interval(bits.low, bits.high)
    sign = "+" if bits.value > 0 else ""
    says = found.judged.predicate(labelled.labels[0])
    return f"Byte by byte, {label} {says}: {sign}{shown} {span}".rstrip() + " bits per byte."


def mebibytes(num_bytes: float | None) -> str:
    """Return bytes as MiB or GiB; a dash where unknown."""
    if num_bytes is None:
        return DASH
    size = num_bytes / 2**20
    return f"{size:,.0f} MiB" if size < 10_000 else f"{size / 1024:,.1f} GiB"


def _listed(counts: dict[str, int]) -> str:
    """Return `2 are worse and 1 inconclusive`."""
    parts = [f"{count} {kind}" for kind, count in counts.items() if count]
    number, _, kind = parts[0].partition(" ")
    parts[0] = f"{number} {'is' if number == '1' else 'are'} {kind}"
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
