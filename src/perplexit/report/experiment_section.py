"""An experiment with ways to select contexts, as a section of the report.

Its figures are those of its document; the verdicts follow from the paired tests in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perplexit.errors import UsageError
from perplexit.igf.experiment_file import Experiment, MethodOutcome
from perplexit.igf.learner_scores import doubt_about
from perplexit.metrics.estimate import DASH, figure, figure_with_interval, interval
from perplexit.report.chart_drawings import Chart
from perplexit.report.experiment_charts import (
    LARGEST_NUMBER_OF_METHODS,
    experiment_charts,
    labelling_seconds,
)


@dataclass(frozen=True, slots=True)
class ExperimentSection:
    """What the page says of one experiment. `name` is its anchor."""

    name: str
    title: str
    headline: str
    facts: tuple[str, ...]
    notes: tuple[str, ...]
    reference: str
    confidence: str
    methods: tuple[Mapping[str, Any], ...]  # a row each of the table
    charts: tuple[Chart, ...]
    learner: tuple[tuple[str, str], ...]
    conditions: tuple[tuple[str, str], ...]


def experiment_sections(experiments: Sequence[Experiment]) -> list[ExperimentSection]:
    """Return a section for each experiment, in their order.

    Raises UsageError for an experiment of more methods than can be told apart.
    """
    return [_chapter(experiment, f"igf-{n + 1}") for n, experiment in enumerate(experiments)]


def _chapter(experiment: Experiment, name: str) -> ExperimentSection:
    if len(experiment.methods) > LARGEST_NUMBER_OF_METHODS:
        raise UsageError(
            f"expected 1 to {LARGEST_NUMBER_OF_METHODS} methods in an experiment, got "
            f"{len(experiment.methods)}; experiment with fewer --methods"
        )
    return ExperimentSection(
        name=name,
        title=experiment.title or "Experiment",
        headline=headline_of(experiment),
        facts=_facts(experiment),
        notes=_notes(experiment),
        reference=experiment.reference or DASH,
        confidence=f"{100 * experiment.confidence:g} %",
        methods=tuple(_method_row(experiment, n) for n in range(len(experiment.methods))),
        charts=tuple(experiment_charts(experiment, name)),
        learner=_learner(experiment),
        conditions=_conditions(experiment),
    )


def headline_of(experiment: Experiment) -> str:
    """Return one sentence: which way to select wins over the reference, and by how much."""
    verdicts = [(row, row.verdict(experiment.confidence)) for row in experiment.comparisons]
    better = [row for row, verdict in verdicts if verdict == "better"]
    reference = experiment.reference
    if better:
        best = min(better, key=lambda row: row.ratio)
        ratio = figure_with_interval(best.ratio, best.low, best.high)
        return (
            f"Selecting by {best.method} ends at {ratio} of the test perplexity that "
            f"{reference} ends at."
        )
    if not verdicts:
        return f"{reference or experiment.methods[0].name} has nothing to be compared with yet."
    if all(verdict == "worse" for _, verdict in verdicts):
        every = "the other method is" if len(verdicts) == 1 else "all other methods are"
        return f"Nothing beats {reference}: {every} worse."
    return f"No method beats {reference}."


def _facts(experiment: Experiment) -> tuple[str, ...]:
    settings = _part(_part(experiment.document, "plan"), "settings")
    test = _part(experiment.document, "test")
    seeds = max(method.num_seeds for method in experiment.methods)
    return (
        f"{len(experiment.methods)} methods × {seeds} seeds",
        f"{_said(settings, 'steps')} steps of {_said(settings, 'batch_size')} contexts of "
        f"{_said(settings, 'context_length')} ids",
        f"{_said(test, 'num_contexts')} test contexts of {_said(test, 'num_articles')} articles",
        f"model {_said(experiment.document, 'model')}",
    )


def _notes(experiment: Experiment) -> tuple[str, ...]:
    notes = []
    if experiment.num_runs < experiment.total_runs:
        notes.append(
            f"The experiment is {experiment.status}: {experiment.num_runs} of "
            f"{experiment.total_runs} fine-tunings are finished, and only those are here."
        )
    if labelling_seconds(experiment) is None and any(m.needs_labels for m in experiment.methods):
        notes.append("What the labels cost was not recorded, so it is in no figure here.")
    doubt = doubt_about(_part(_part(experiment.document, "learner"), "scores"))
    if doubt is not None:
        notes.append(doubt)
    return tuple(notes)


def _method_row(experiment: Experiment, index: int) -> dict[str, Any]:
    method = experiment.methods[index]
    row = experiment.comparison(method.name)
    cells: dict[str, Any] = {
        "index": index,
        "name": method.name,
        "perplexity": figure(method.median[-1], method.low[-1], method.high[-1]),
        "perplexity_interval": interval(method.low[-1], method.high[-1]),
        "seeds": method.num_seeds,
        "acceptance": f"{100 * method.acceptance:.0f} %",
        **_cost(experiment, method),
        "is_reference": method.name == experiment.reference,
        "verdict": None,
    }
    if row is None:
        return cells
    return cells | {
        "verdict": row.verdict(experiment.confidence),
        "ratio": figure(row.ratio, row.low, row.high),
        "ratio_interval": interval(row.low, row.high),
        "better": f"{row.seeds_better} of {row.num_seeds}",
        "p_t": _p(row.p_t),
        "p_wilcoxon": _p(row.p_wilcoxon),
        "reached": "never level"
        if row.steps_to_reference_end is None
        else f"level at step {row.steps_to_reference_end}",
    }


def _cost(experiment: Experiment, method: MethodOutcome) -> dict[str, str]:
    labels = labelling_seconds(experiment) if method.needs_labels else None
    scored = method.tokens_scored
    under = f"of {method.tokens_judged:,.0f} looked at"
    return {
        "trained": f"{method.tokens_trained:,.0f}",
        "judged": under if not scored else f"{under}, {scored:,.0f} forward",
        "seconds": f"{method.seconds['select'] + method.seconds['train']:,.1f}",
        "labels": "" if labels is None else f"+ {labels:,.0f} for labels",
    }


def _learner(experiment: Experiment) -> tuple[tuple[str, str], ...]:
    learner = _part(experiment.document, "learner")
    scores = _part(learner, "scores")
    pairs = _part(learner, "pairs")
    if not learner:
        return ()
    labelling = _part(experiment.document, "labelling")
    rows = (
        ("learner", _said(learner, "kind")),
        ("labelled contexts", f"{_said(labelling, 'num_pairs')} ({_said(pairs, 'mode')})"),
        (
            "held out",
            f"{_said(scores, 'num_pairs')} contexts of {_said(scores, 'num_articles')} articles",
        ),
        ("Spearman", _said(scores, "spearman")),
        ("R²", _said(scores, "r2")),
        (
            "mean squared error",
            f"{_said(scores, 'mse')} (of the mean {_said(scores, 'mse_of_mean')})",
        ),
        (
            f"precision at {_said(scores, 'threshold')}",
            f"{_said(scores, 'precision')} (base rate {_said(scores, 'base_rate')})",
        ),
    )
    return tuple((name, value) for name, value in rows if value.strip(f"{DASH} ()"))


def _conditions(experiment: Experiment) -> tuple[tuple[str, str], ...]:
    document = experiment.document
    plan, conditions = _part(document, "plan"), _part(document, "conditions")
    settings = _part(plan, "settings")
    fingerprints = ("weights", "train", "test")
    rows = [
        ("model", _said(document, "model")),
        ("parameters", _said(document, "num_parameters")),
        *((name, _said(conditions, f"{name}_fingerprint")[:16]) for name in fingerprints),
        *((key.replace("_", " "), _said(settings, key)) for key in sorted(settings)),
        ("share accepted", _said(plan, "share")),
        ("constant threshold", _said(plan, "constant")),
        ("calibration contexts", _said(plan, "num_calibration")),
        ("training articles", _said(_part(document, "train"), "num_articles")),
        ("threads", _said(document, "threads")),
    ]
    return tuple(rows)


def _part(document: Any, key: str) -> Mapping[str, Any]:
    """Return a part of a document that may lack it."""
    found = document.get(key) if isinstance(document, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _said(document: Mapping[str, Any], key: str) -> str:
    value = document.get(key)
    if value is None or value == "":
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _p(value: float | None) -> str:
    if value is None:
        return "not known"
    return "< 1e-15" if value < 1e-15 else f"{value:.2g}"
