"""The tables of runs: conditions, moved predictions, changed first choices, other tokenizers."""

from dataclasses import dataclass
from typing import Any

from perplexit.comparison.flips import Flip, Flips
from perplexit.comparison.verdict_record import range_text
from perplexit.metrics.estimate import (
    DASH,
    Estimate,
    counted,
    figure,
    interval,
    mebibytes,
    missing_figures,
)
from perplexit.report.labelled_runs import LabelledRuns
from perplexit.runs.run import Run


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition with its value in each run; `differs` where they are not all alike."""

    name: str
    values: tuple[str, ...]

    @property
    def differs(self) -> bool:
        """Tell whether the runs were made under different values of it."""
        return len(set(self.values)) > 1


def conditions_of(labelled: LabelledRuns) -> list[Condition]:
    """Return every condition that a figure depends on."""
    per_run = [_of(run, labelled.confidence) for run in labelled.runs]
    return [Condition(name, tuple(values[name] for values in per_run)) for name in per_run[0]]


def notes_of(labelled: LabelledRuns) -> list[str]:
    """Return warnings of the runs and the comparisons, and why a figure is missing; each once."""
    said: dict[str, list[str]] = {}
    for label, run in zip(labelled.labels, labelled.runs, strict=True):
        missing = missing_figures(run.reasons)
        notes = [*run.warnings]
        notes += [f"missing: {', '.join(names)} ({why})" for why, names in missing.items()]
        if run.num_non_finite:
            notes.append(f"{run.num_non_finite} tokens had no finite loss and are left out")
        for note in notes:
            said.setdefault(note, []).append(label)
    for label, _, comparison in labelled.candidates:
        for note in comparison.warnings:
            said.setdefault(note, []).append(label)
    return [f"{', '.join(dict.fromkeys(labels))}: {note}" for note, labels in said.items()]


def _interval(run: Run, confidence: float) -> str:
    if run.perplexity_low is None:
        return "none"
    clusters = counted(run.num_clusters, "cluster")
    return f"{100 * confidence:g} %, {clusters} ({run.interval_method})"


def _of(run: Run, confidence: float) -> dict[str, str]:
    model, session = run.model, run.session
    seconds, settings = run.seconds, session.get("settings") or {}
    protocol = run.input_spec.get("protocol", {})
    return {
        "model": str(model.get("address", DASH)),
        "architecture": str(model.get("architecture", DASH)),
        "parameters": _count(model.get("num_parameters")),
        "weights": str(model.get("weights_fingerprint", DASH))[:16],
        "engine": f"{session.get('engine', DASH)} {session.get('version', '')}".strip(),
        "dtype": str(session.get("dtype", DASH)),
        "quantization": _quantization(session.get("quantization")),
        "device": str(session.get("device", DASH)),
        "engine settings": ", ".join(f"{k}={v}" for k, v in settings.items()) or DASH,
        "threads": DASH if run.threads is None else str(run.threads),
        "windows per batch": str(run.batch_plan.get("batch_size", DASH)),
        "load / score / total": " / ".join(
            _seconds(seconds.get(name)) for name in ("load", "prefill", "total")
        ),
        "peak process memory": mebibytes(run.peak_memory_bytes.get("host_rss")),
        "peak device memory": mebibytes(run.peak_memory_bytes.get("torch_device")),
        "protocol": run.protocol,
        "windows": ", ".join(
            f"{key} {value}"
            for key, value in protocol.items()
            if key != "name" and value not in (None, "", -1)
        ),
        "interval": _interval(run, confidence),
        "tokens scored": (
            f"{counted(run.num_tokens, 'token')} in {counted(run.num_windows, 'window')}"
        ),
        "text": run.text_fingerprint[:16] or DASH,
        "tokenizer": run.tokenizer_fingerprint[:16],
        "input": run.input_fingerprint[:16],
        "made": run.created,
        "Perplexit": run.perplexit_version,
    }


def _count(number: Any) -> str:
    return f"{number:,}" if isinstance(number, int) else DASH


def _seconds(value: float | None) -> str:
    return DASH if value is None else f"{value:.1f} s"


def _quantization(entry: Any) -> str:
    if not entry:
        return "none"
    return (
        f"{entry.get('name')} by {entry.get('library')}: {entry.get('num_modules')} modules, "
        f"{float(entry.get('effective_bits', 0)):.2f} bits per parameter"
    )


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
