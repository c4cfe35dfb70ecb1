"""An experiment's charts: median curves, paired ratios, and what each method cost."""

from collections.abc import Iterator, Sequence

from perplexit.igf.experiment_file import Experiment, MethodOutcome
from perplexit.metrics.estimate import DASH, figure_with_interval
from perplexit.report.chart_drawings import (
    SAID,
    Chart,
    Row,
    Spec,
    by_run,
    drawn,
    intervals_chart,
    nominal,
    plot,
    point_mark,
    quantitative,
)

LARGEST_NUMBER_OF_METHODS = 8  # as many as there are colours that can be told apart
_SECONDS = ("labels", "select", "train")


def experiment_charts(experiment: Experiment, name: str) -> list[Chart]:
    """Return the charts that the experiment has figures for; their names begin with `name`."""
    makers = (_curves, _ratios, _costs)
    return [chart for make in makers for chart in make(experiment, name)]


def labelling_seconds(experiment: Experiment) -> float | None:
    """Return what the learner's labels took, once for all runs; None where it was not recorded."""
    recorded = experiment.document.get("labelling") or {}
    seconds = recorded.get("seconds") if isinstance(recorded, dict) else None
    return float(seconds) if isinstance(seconds, int | float) else None


def _names(experiment: Experiment) -> list[str]:
    return [method.name for method in experiment.methods]


def _curves(experiment: Experiment, name: str) -> Iterator[Chart]:
    rows: list[Row] = []
    for method in experiment.methods:
        points = zip(method.steps, method.median, method.low, method.high, strict=True)
        rows += [
            {
                "run": method.name,
                "step": step,
                "value": median,
                "low": low,
                "high": high,
                "said": f"{method.name}, step {step}: {figure_with_interval(median, low, high)}",
            }
            for step, median, low, high in points
        ]
    yield Chart(
        f"{name}-curves",
        "Test perplexity by step",
        "The median over seeds, with its interval. At a step every method has learnt from equally "
        "many contexts: a lower line got more out of them.",
        drawn(_curves_spec(rows, _names(experiment))),
        ("method", "step", "median perplexity"),
        tuple((str(r["run"]), str(r["step"]), str(r["said"]).rpartition(": ")[2]) for r in rows),
    )


def _curves_spec(rows: Sequence[Row], names: Sequence[str]) -> Spec:
    x = quantitative("step", "optimizer steps")
    y: Spec = {"title": "test perplexity", "scale": {"zero": False, "nice": True}}
    by_method = by_run(rows, names, dashes=True)
    colour = {**by_method["color"], "legend": None}
    band = {"x": x, "y": quantitative("low", **y), "y2": {"field": "high"}, "color": colour}
    median = {"x": x, "y": quantitative("value", **y)}
    layers: list[Spec] = [
        {"mark": {"type": "area", "opacity": 0.16, "aria": False}, "encoding": band},
        {
            "mark": {"type": "line", "strokeWidth": 2, "aria": False},
            "encoding": {**median, **by_method},
        },
        {**point_mark(26), "encoding": {**median, "color": colour, "description": SAID}},
    ]
    # each layer its own legend, that the lines' be drawn as lines; two of the three have none
    resolve = {"legend": {"color": "independent", "strokeDash": "independent"}}
    return plot(rows, height=240, layer=layers, resolve=resolve)


def _ratios(experiment: Experiment, name: str) -> Iterator[Chart]:
    if not experiment.comparisons:
        return
    rows: list[Row] = [
        {
            "run": row.method,
            "value": row.ratio,
            "low": row.low,
            "high": row.high,
            "said": f"{row.method}: {figure_with_interval(row.ratio, row.low, row.high)}",
        }
        for row in experiment.comparisons
    ]
    yield Chart(
        f"{name}-ratios",
        f"Final perplexity over {experiment.reference}'s",
        "Paired by seed: both have drawn the same candidates. The dashed line is no difference; "
        "left of it is better.",
        intervals_chart(rows, _names(experiment), title="perplexity ratio", mark_at=1.0),
        ("method", "ratio", "verdict"),
        tuple(
            (
                row.method,
                figure_with_interval(row.ratio, row.low, row.high),
                row.verdict(experiment.confidence),
            )
            for row in experiment.comparisons
        ),
    )


def _costs(experiment: Experiment, name: str) -> Iterator[Chart]:
    labels = labelling_seconds(experiment)
    rows: list[Row] = []
    for method in experiment.methods:
        for part in _SECONDS:
            seconds = labels if part == "labels" else method.seconds[part]
            if part == "labels" and not method.needs_labels:
                seconds = 0.0
            if seconds is None:
                continue  # what labels cost was not recorded: no bar, and a note says so
            said = f"{method.name}, {part}: {seconds:,.1f} s"
            rows.append({"run": method.name, "part": part, "seconds": seconds, "said": said})
    yield Chart(
        f"{name}-cost",
        "Seconds of one fine-tuning",
        "Without evaluation. Labels are made once for an objective and serve every fine-tuning "
        "after that; they are counted whole here."
        + ("" if labels is not None else " What they took was not recorded: give --pairs."),
        drawn(_costs_spec(rows, _names(experiment))),
        ("method", *_SECONDS),
        tuple((method.name, *_seconds(method, labels)) for method in experiment.methods),
    )


def _seconds(method: MethodOutcome, labels: float | None) -> Iterator[str]:
    if not method.needs_labels:
        yield "0.0"
    else:
        yield DASH if labels is None else f"{labels:,.1f}"
    yield from (f"{method.seconds[part]:,.1f}" for part in ("select", "train"))


def _costs_spec(rows: Sequence[Row], names: Sequence[str]) -> Spec:
    axis = {"ticks": False, "domain": False, "labelColor": "var(--ink)", "labelPadding": 8}
    scale = {"domain": list(_SECONDS), "range": ["var(--run5)", "var(--run6)", "var(--run0)"]}
    legend = {"symbolType": "square", "symbolStrokeWidth": 0}
    domain = {"domain": list(names)}
    return plot(
        rows,
        height={"step": 30},
        transform=[{"filter": "datum.seconds > 0"}],
        mark={"type": "bar", "height": {"band": 0.6}},
        encoding={
            "y": nominal("run", sort=list(names), title=None, axis=axis, scale=domain),
            "x": quantitative("seconds", "seconds"),
            "color": nominal("part", scale=scale, legend=legend),
            "order": nominal("part"),
            "description": SAID,
        },
    )
