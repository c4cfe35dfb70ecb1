"""The conditions of each run as a table, and what a reader must be told about them."""

from dataclasses import dataclass
from typing import Any

from perplexit.metrics.estimate import DASH, counted, mebibytes, missing_figures
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
    seconds = run.seconds
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
        "engine settings": _settings(session.get("settings")),
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


def _settings(settings: Any) -> str:
    return ", ".join(f"{k}={v}" for k, v in (settings or {}).items()) or DASH
