"""The charts of runs, in order: which there are, over what figures, and how to read them."""

import math
from collections.abc import Iterator, Sequence

from perplexit.comparison.compared_tokens import losses_above
from perplexit.metrics.estimate import DASH, exact_percent, figure, interval, quantity
from perplexit.report import chart_drawings as draw
from perplexit.report.chart_drawings import Chart, Row
from perplexit.report.headlines import ratio_of
from perplexit.report.labelled_runs import LabelledRuns, peak_bytes_of


def charts_of(labelled: LabelledRuns) -> list[Chart]:
    """Return every chart that the runs have figures for."""
    makers = (_perplexities, _ratios, _divergences, _changes, _losses, _agreement, _positions)
    return [chart for make in (*makers, _trade_off) for chart in make(labelled)]


def _perplexities(labelled: LabelledRuns) -> Iterator[Chart]:
    rows: list[Row] = []
    cells = []
    for label, run in zip(labelled.labels, labelled.runs, strict=True):
        low, high = run.perplexity_low, run.perplexity_high
        shown, span = figure(run.perplexity, low, high), interval(low, high)
        ends = {"value": run.perplexity, "low": low, "high": high}
        rows.append({"run": label, **ends, "said": f"{label}: {shown} {span}"})
        cells.append((label, shown, span or DASH))
    yield Chart(
        "perplexity",
        "Perplexity",
        f"Lower is better. Bars are {100 * labelled.confidence:g} % intervals of each run alone; "
        "they may overlap where the paired ratio is clear.",
        draw.intervals_chart(rows, labelled.labels, title="perplexity"),
        ("run", "perplexity", "interval"),
        tuple(cells),
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
    )
    yield Chart(
        "ratio",
        f"Ratio to {labelled.labels[0]}",
        "Paired token by token, so what makes a token hard for both drops out. "
        f"The dashed line is no difference; right of it is worse.{said if margins else ''}",
        draw.intervals_chart(
            rows, labelled.labels, title="perplexity ratio", mark_at=1.0, margins=margins
        ),
        ("run", "ratio", "verdict"),
        tuple((label, ratio_of(c), c.verdict) for label, _, c in labelled.candidates),
    )


def kl_rows(labelled: LabelledRuns) -> list[Row]:
    """Return how far distributions moved, for the candidates whose comparison has a KL."""
    return [
        {"run": label, "kl": x, "share": share}
        for label, _, comparison in labelled.candidates
        if comparison.tokens is not None
        for x, share in comparison.tokens.kl_above()
    ]


def _divergences(labelled: LabelledRuns) -> Iterator[Chart]:
    yield from _curves(
        labelled,
        kl_rows(labelled),
        ("kl", "KL(reference ‖ candidate), nats"),
        columns=("run", "KL above"),
        title="How far predictions moved",
        caption="Share of tokens whose KL divergence from the reference lies above a value. "
        "Further left and lower is closer to the reference.",
    )


def _changes(labelled: LabelledRuns) -> Iterator[Chart]:
    rows: list[Row] = [
        {"run": label, "direction": direction, "change": x, "share": share}
        for label, _, comparison in labelled.candidates
        if comparison.tokens is not None
        for direction, curve in (
            ("worse", comparison.tokens.rises()),
            ("better", comparison.tokens.falls()),
        )
        for x, share in curve
    ]
    yield from _curves(
        labelled,
        rows,
        ("change", "change of a token's loss, nats"),
        columns=("run", "direction", "change above"),
        title="How much single tokens changed",
        caption=f"Share of tokens whose loss rose (solid) or fell (dashed) against "
        f"{labelled.labels[0]} by more than a value. Two equal curves are noise; "
        "a gap between them is a loss of quality.",
    )


def _losses(labelled: LabelledRuns) -> Iterator[Chart]:
    if labelled.comparisons:
        return
    rows: list[Row] = [
        {"run": label, "loss": x, "share": share}
        for label, run in zip(labelled.labels, labelled.runs, strict=True)
        for x, share in losses_above(run)
    ]
    yield from _curves(
        labelled,
        rows,
        ("loss", "loss of a token, nats"),
        columns=("run", "loss above"),
        title="How losses are spread",
        caption="Share of tokens that cost more than a value. Most of a perplexity is made by few "
        "tokens.",
    )


def _curves(
    labelled: LabelledRuns,
    rows: Sequence[Row],
    x: tuple[str, str],
    *,
    columns: tuple[str, ...],
    title: str,
    caption: str,
) -> Iterator[Chart]:
    """Yield a chart of curves of `x`; its table has every sixth point of each curve."""
    if not rows:
        return
    keys = columns[:-1]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row[key]) for key in keys), []).append(row)
    yield Chart(
        x[0],
        title,
        caption,
        draw.curves_chart(rows, labelled.labels, x=x, directions="direction" in keys),
        (*columns, "share of tokens"),
        tuple(
            (*key, quantity(float(row[x[0]] or 0)), _percent(row["share"]))
            for key, group in groups.items()
            for row in group[::6]
        ),
    )


def agreement_rows(labelled: LabelledRuns) -> list[Row]:
    """Return the share of equal first choices, by the reference's confidence in its own."""
    return [
        {
            "run": label,
            "confidence": f"{100 * bucket.low_confidence:g}–{100 * bucket.high_confidence:g} %",
            "bucket": bucket.low_confidence,
            "share": bucket.share.value,
            "low": bucket.share.low,
            "high": bucket.share.high,
            "tokens": bucket.num_tokens,
        }
        for label, _, comparison in labelled.candidates
        if comparison.tokens is not None
        for bucket in comparison.tokens.agreement_by_confidence()
    ]


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
    order = list(dict.fromkeys(str(row["confidence"]) for row in by_confidence))
    yield Chart(
        "agreement",
        f"Agreement with {labelled.labels[0]}, by its confidence",
        "Where the reference hesitates, a small change is enough to swap its first choice. "
        "Disagreement on the right, where it is sure, is damage.",
        draw.agreement_chart(rows, labelled.labels, order),
        ("run", "confidence", "same first choice", "tokens"),
        tuple(
            (str(r["run"]), str(r["confidence"]), _percent(r["share"]), str(r["tokens"]))
            for r in rows
        ),
    )


def _positions(labelled: LabelledRuns) -> Iterator[Chart]:
    rows: list[Row] = [
        {
            "run": label,
            "positions": f"{bucket['start']}{DASH}{bucket['stop'] - 1}",
            "middle": (bucket["start"] + bucket["stop"] - 1) / 2,
            "loss": bucket["mean_nll"],
            "tokens": bucket["num_tokens"],
        }
        for label, run in zip(labelled.labels, labelled.runs, strict=True)
        for bucket in run.loss_by_position
        if bucket["mean_nll"] is not None
    ]
    if len({row["middle"] for row in rows}) < 2:
        return
    yield Chart(
        "position",
        "Loss by position in the window",
        "With more context a token is easier, so the line falls. A jump upwards is how a broken "
        "long context shows itself.",
        draw.position_chart(rows, labelled.labels),
        ("run", "positions", "mean loss (nats)", "tokens"),
        tuple(
            (str(r["run"]), str(r["positions"]), f"{r['loss']:.4f}", str(r["tokens"])) for r in rows
        ),
    )


def _trade_off(labelled: LabelledRuns) -> Iterator[Chart]:
    rows: list[Row] = []
    cells = []
    for label, run in zip(labelled.labels, labelled.runs, strict=True):
        memory = peak_bytes_of(run)[0]
        if memory is None or run.perplexity is None:
            continue
        mebibytes, speed, shown = memory / 2**20, run.tokens_per_second, figure(run.perplexity)
        said = f"{label}: {mebibytes:,.0f} MiB, perplexity {shown}"
        rows.append(
            {
                "run": label,
                "short": label if speed is None else f"{label} · {speed:,.0f}/s",
                "mebibytes": mebibytes,
                "value": run.perplexity,
                "speed": speed or 0,  # the smallest point where it is not known
                "said": said if speed is None else f"{said}, {speed:,.0f} tokens/s",
            }
        )
        speed_shown = DASH if speed is None else f"{speed:,.0f}"
        cells.append((label, f"{mebibytes:,.0f}", shown, speed_shown))
    if len(rows) < 2:
        return
    yield Chart(
        "trade-off",
        "Memory, quality and speed",
        "Lower left is better; a larger point is faster (tokens per second beside its name).",
        draw.trade_off_chart(rows, labelled.labels),
        ("run", "peak memory (MiB)", "perplexity", "tokens/s"),
        tuple(cells),
    )


def _percent(share: str | float | int | None) -> str:
    return DASH if share is None else f"{100 * float(share):.3g} %"
