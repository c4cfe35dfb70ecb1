"""The charts of a report, in order: which there are, over what figures, and how to read them."""

import math
from collections.abc import Iterator, Sequence

from perplexit.metrics.number_format import DASH, exact_percent, figure, interval, quantity
from perplexit.report import chart_drawings as charts
from perplexit.report.chart_drawings import Chart
from perplexit.report.chart_rows import (
    Row,
    agreement_rows,
    change_rows,
    kl_rows,
    loss_rows,
    position_rows,
)
from perplexit.report.headlines import ratio_of
from perplexit.report.labelled_runs import LabelledRuns, peak_bytes_of


def charts_of(labelled: LabelledRuns) -> list[Chart]:
    """Return every chart that the runs have figures for."""
    makers = (_perplexities, _ratios, _divergences, _changes, _losses, _agreement, _positions)
    return [chart for make in (*makers, _trade_off) for chart in make(labelled)]


def _perplexities(labelled: LabelledRuns) -> Iterator[Chart]:
    rows: list[Row] = []
    for label, run in zip(labelled.labels, labelled.runs, strict=True):
        low, high = run.perplexity_low, run.perplexity_high
        said = f"{label}: {figure(run.perplexity, low, high)} {interval(low, high)}"
        rows.append({"run": label, "value": run.perplexity, "low": low, "high": high, "said": said})
    yield Chart(
        "perplexity",
        "Perplexity",
        f"Lower is better. Bars are {100 * labelled.confidence:g} % intervals of each run alone; "
        "they may overlap where the paired ratio is clear.",
        charts.intervals_chart(rows, labelled.labels, title="perplexity"),
        ("run", "perplexity", "interval"),
        tuple(
            (
                label,
                figure(run.perplexity, run.perplexity_low, run.perplexity_high),
                interval(run.perplexity_low, run.perplexity_high) or DASH,
            )
            for label, run in zip(labelled.labels, labelled.runs, strict=True)
        ),
    )


def _ratios(labelled: LabelledRuns) -> Iterator[Chart]:
    if not labelled.comparisons:
        return
    rows: list[Row] = [
        {
            "run": label,
            "value": c.ppl_ratio,
            "low": c.ppl_ratio_low,
            "high": c.ppl_ratio_high,
            "said": f"{label}: {ratio_of(c)}",
        }
        for label, _, c in labelled.candidates
    ]
    asked = labelled.comparisons[0].judged.margin
    margins = (math.exp(-asked.nats), math.exp(asked.nats)) if asked.is_asked else ()
    said = (
        f" The dotted lines are the margin of {exact_percent(asked.asked)}: an interval between "
        "them is equivalent."
        if margins
        else ""
    )
    yield Chart(
        "ratio",
        f"Ratio to {labelled.labels[0]}",
        "Paired token by token, so what makes a token hard for both drops out. "
        f"The dashed line is no difference; right of it is worse.{said}",
        charts.intervals_chart(
            rows, labelled.labels, title="perplexity ratio", mark_at=1.0, margins=margins
        ),
        ("run", "ratio", "verdict"),
        tuple((label, ratio_of(c), c.verdict) for label, _, c in labelled.candidates),
    )


def _divergences(labelled: LabelledRuns) -> Iterator[Chart]:
    rows = kl_rows(labelled)
    if rows:
        yield Chart(
            "kl",
            "How far predictions moved",
            "Share of tokens whose KL divergence from the reference lies above a value. "
            "Further left and lower is closer to the reference.",
            charts.curves_chart(rows, labelled.labels, x=("kl", "KL(reference ‖ candidate), nats")),
            ("run", "KL above", "share of tokens"),
            _sampled(rows, ("run",), "kl"),
        )


def _changes(labelled: LabelledRuns) -> Iterator[Chart]:
    rows = change_rows(labelled)
    if rows:
        yield Chart(
            "change",
            "How much single tokens changed",
            f"Share of tokens whose loss rose (solid) or fell (dashed) against "
            f"{labelled.labels[0]} by more than a value. Two equal curves are noise; "
            "a gap between them is a loss of quality.",
            charts.curves_chart(
                rows,
                labelled.labels,
                x=("change", "change of a token's loss, nats"),
                directions=True,
            ),
            ("run", "direction", "change above", "share of tokens"),
            _sampled(rows, ("run", "direction"), "change"),
        )


def _losses(labelled: LabelledRuns) -> Iterator[Chart]:
    if labelled.comparisons:
        return
    rows = loss_rows(labelled)
    if rows:
        yield Chart(
            "loss",
            "How losses are spread",
            "Share of tokens that cost more than a value. Most of a perplexity is made by few "
            "tokens.",
            charts.curves_chart(rows, labelled.labels, x=("loss", "loss of a token, nats")),
            ("run", "loss above", "share of tokens"),
            _sampled(rows, ("run",), "loss"),
        )


def _agreement(labelled: LabelledRuns) -> Iterator[Chart]:
    rows = agreement_rows(labelled)
    if not rows:
        return
    for row in rows:
        row["said"] = (
            f"{row['run']}, confidence {row['confidence']}: {_percent(row['share'])} of "
            f"{row['tokens']} tokens"
        )
    by_confidence = sorted(rows, key=lambda row: float(row["bucket"] or 0))
    order = list(dict.fromkeys(row["confidence"] for row in by_confidence))
    yield Chart(
        "agreement",
        f"Agreement with {labelled.labels[0]}, by its confidence",
        "Where the reference hesitates, a small change is enough to swap its first choice. "
        "Disagreement on the right, where it is sure, is damage.",
        charts.agreement_chart(rows, labelled.labels, [str(bucket) for bucket in order]),
        ("run", "confidence", "same first choice", "tokens"),
        tuple(
            (str(r["run"]), str(r["confidence"]), _percent(r["share"]), str(r["tokens"]))
            for r in rows
        ),
    )


def _positions(labelled: LabelledRuns) -> Iterator[Chart]:
    rows = position_rows(labelled)
    if len({row["middle"] for row in rows}) < 2:
        return
    yield Chart(
        "position",
        "Loss by position in the window",
        "With more context a token is easier, so the line falls. A jump upwards is how a broken "
        "long context shows itself.",
        charts.position_chart(rows, labelled.labels),
        ("run", "positions", "mean loss (nats)", "tokens"),
        tuple(
            (str(r["run"]), f"{r['from']}{DASH}{r['to']}", f"{r['loss']:.4f}", str(r["tokens"]))
            for r in rows
        ),
    )


def _trade_off(labelled: LabelledRuns) -> Iterator[Chart]:
    rows: list[Row] = []
    for label, run in zip(labelled.labels, labelled.runs, strict=True):
        memory = peak_bytes_of(run)[0]
        if memory is None or run.perplexity is None:
            continue
        speed = run.tokens_per_second
        said = f"{label}: {memory / 2**20:,.0f} MiB, perplexity {figure(run.perplexity)}"
        rows.append(
            {
                "run": label,
                "short": label if speed is None else f"{label} · {speed:,.0f}/s",
                "mebibytes": memory / 2**20,
                "value": run.perplexity,
                "speed": speed or 0,  # the smallest point where it is not known
                "speed_said": DASH if speed is None else f"{speed:,.0f}",
                "said": said if speed is None else f"{said}, {speed:,.0f} tokens/s",
            }
        )
    if len(rows) < 2:
        return
    yield Chart(
        "trade-off",
        "Memory, quality and speed",
        "Lower left is better; a larger point is faster (tokens per second beside its name).",
        charts.trade_off_chart(rows, labelled.labels),
        ("run", "peak memory (MiB)", "perplexity", "tokens/s"),
        tuple(
            (
                str(r["run"]),
                f"{r['mebibytes']:,.0f}",
                figure(float(r["value"] or 0)),
                str(r["speed_said"]),
            )
            for r in rows
        ),
    )


def _sampled(rows: Sequence[Row], keys: tuple[str, ...], x: str) -> tuple[tuple[str, ...], ...]:
    """Return every sixth point of each curve: enough to read, for those who read tables."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row[key]) for key in keys), []).append(row)
    return tuple(
        (*key, quantity(float(row[x] or 0)), _percent(row["share"]))
        for key, group in groups.items()
        for row in group[::6]
    )


def _percent(share: str | float | int | None) -> str:
    return DASH if share is None else f"{100 * float(share):.3g} %"
