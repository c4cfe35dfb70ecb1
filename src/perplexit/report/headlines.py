"""Figures and verdicts in words, with as many digits as their intervals carry."""

from collections import Counter
from dataclasses import dataclass

from perplexit.comparison import VERDICTS, Comparison
from perplexit.metrics.estimate import figure_with_interval
from perplexit.report.labelled_runs import LabelledRuns


@dataclass(frozen=True, slots=True)
class CandidateVerdict:
    """One candidate's verdict in words. `kind` is the verdict itself, for colour and sign."""

    label: str
    kind: str
    says: str  # what follows the label
    ratio: str
    detail: str


def ratio_of(comparison: Comparison) -> str:
    """Return `1.021 [1.018, 1.024]`."""
    return figure_with_interval(
        comparison.ppl_ratio, comparison.ppl_ratio_low, comparison.ppl_ratio_high
    )


def findings_of(labelled: LabelledRuns) -> list[CandidateVerdict]:
    """Return one finding for each candidate."""
    return [
        CandidateVerdict(
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
        shown = figure_with_interval(run.perplexity, run.perplexity_low, run.perplexity_high)
        return f"{labelled.labels[0]} has a perplexity of {shown}."
    if len(labelled.comparisons) == 1:
        finding = findings_of(labelled)[0]
        return f"{finding.label} {finding.says}: perplexity ratio {finding.ratio}."
    return _headline_of_several(labelled)


def _headline_of_several(labelled: LabelledRuns) -> str:
    found = Counter(comparison.verdict for comparison in labelled.comparisons)
    counts: dict[str, int] = {verdict: found[verdict] for verdict in VERDICTS}
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
    bits = found.estimate("bits_per_byte_difference")
    shown = figure_with_interval(bits.value, bits.low, bits.high)
    sign = "+" if bits.value > 0 else ""
    says = found.judged.predicate(labelled.labels[0])
    return f"Byte by byte, {label} {says}: {sign}{shown} bits per byte."


def _listed(counts: dict[str, int]) -> str:
    """Return `2 are worse and 1 inconclusive`."""
    parts = [f"{count} {kind}" for kind, count in counts.items() if count]
    number, _, kind = parts[0].partition(" ")
    parts[0] = f"{number} {'is' if number == '1' else 'are'} {kind}"
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
