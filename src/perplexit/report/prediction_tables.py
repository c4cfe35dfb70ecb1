"""The tables beyond perplexity: moved predictions, changed first choices, other tokenizers."""

from dataclasses import dataclass
from typing import Any

from perplexit.comparison.flips import Flip, Flips
from perplexit.comparison.verdict_record import range_text
from perplexit.metrics.estimate import DASH, Estimate, figure, interval
from perplexit.report.labelled_runs import LabelledRuns


@dataclass(frozen=True, slots=True)
class Measured:
    """One figure of one candidate, and its interval in words."""

    value: str
    interval: str = ""


@dataclass(frozen=True, slots=True)
class PredictionRow:
    """A figure's name, what it means, and a cell a candidate."""

    name: str
    meaning: str
    cells: tuple[Measured, ...]


@dataclass(frozen=True, slots=True)
class ChangedChoices:
    """A candidate's changed first choices: how many, in words, and those listed."""

    label: str
    says: str
    flips: tuple[Flip, ...]


_FIGURES = (
    ("mean_kl", "KL", "of the reference from the candidate, nats per token"),
    ("mean_kl_high", "KL, at most", "the reference is known in part: KL above is a lower bound"),
    ("p99.9_kl", "KL, 99.9 %", "of the tokens lie below it"),
    ("max_kl", "KL, largest", ""),
    ("mean_reverse_kl", "reverse KL", "of the candidate from the reference, nats per token"),
    ("mean_js", "Jensen-Shannon", "nats per token, at most 0.693"),
    ("top1_agreement", "same first choice", "share of tokens"),
    ("top10_agreement", "first ten in common", "mean share"),
    ("mean_delta_p", "Δp", "change of the probability of the token that came"),
    ("rms_delta_p", "Δp, root mean square", ""),
    ("p0.1_delta_p", "Δp, 0.1 %", "of the tokens lie below it"),
    ("p99.9_delta_p", "Δp, 99.9 %", ""),
)


def prediction_rows(labelled: LabelledRuns) -> list[PredictionRow]:
    """Return the divergences of the candidates that have any; empty where none has."""
    figures = [comparison.measured_figures() for comparison in labelled.comparisons]
    return [
        PredictionRow(name, meaning, tuple(_cell(found.get(key)) for found in figures))
        for key, name, meaning in _FIGURES
        if any(key in found for found in figures)
    ]


def changed_choices(labelled: LabelledRuns) -> list[ChangedChoices]:
    """Return for each candidate whose first choices can be told from the reference's."""
    return [
        ChangedChoices(label, _flips_in_words(comparison.flips), comparison.flips.listed)
        for label, _, comparison in labelled.candidates
        if comparison.flips is not None and comparison.flips.count
    ]


def aligned_rows(labelled: LabelledRuns) -> list[dict[str, Any]]:
    """Return one row per run that could only be compared byte by byte."""
    rows = []
    for label, found in labelled.aligned:
        bits = found.estimate("bits_per_byte_difference")
        sign = "+" if bits.value > 0 else ""
        share = found.num_bytes / max(1, found.num_bytes + found.num_unaligned_bytes_candidate)
        rows.append(
            {
                "label": label,
                "verdict": found.verdict,
                "bits": figure(found.bits_per_byte_candidate),
                "bits_interval": f"reference {figure(found.bits_per_byte_reference)}",
                "difference": sign + figure(bits.value, bits.low, bits.high),
                "difference_interval": interval(bits.low, bits.high),
                "aligned": f"{found.num_bytes:,} bytes ({100 * share:.3g} % of what it scored)",
                "notes": found.warnings,
                "changed": found.most_changed[:8],
            }
        )
    return rows


def _cell(found: Estimate | None) -> Measured:
    if found is None:
        return Measured(DASH)
    if 0 < abs(found.value) < 1e-3:
        return Measured(f"{found.value:.2e}", range_text(found.low, found.high, ".2e"))
    return Measured(figure(found.value, found.low, found.high), interval(found.low, found.high))


def _flips_in_words(flips: Flips) -> str:
    least = "" if flips.complete else "at least "
    order = (
        ", where the reference was surest first"
        if flips.listed and flips.listed[0].reference_p is not None
        else ""
    )
    unknown = (
        ""
        if all(flip.reference_top1 and flip.candidate_top1 for flip in flips.listed)
        else " A choice that was not recorded is a dash: eval --top-k 1 records it."
    )
    return (
        f"{least}{flips.count:,} of {flips.num_tokens:,} tokens "
        f"({100 * flips.count / flips.num_tokens:.2g} %){order}.{unknown}"
    )
