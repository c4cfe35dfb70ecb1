"""Rows → charts as inline SVG, drawn by Vega-Lite when the report is written.

The drawings carry no script and no size of their own, take their colours from the page's style
sheet (so that they follow light and dark), and have a label for each mark for screen readers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from perplexit.report.chart_rows import Row
from perplexit.report.vega_svg import Spec, drawn

WIDTH = 400
DASHES = [[1, 0], [5, 3], [2, 2], [8, 3, 2, 3], [10, 4], [4, 2, 1, 2], [1, 3], [12, 3]]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "stroke", "wedge"]


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing with what it shows (`title`), how to read it (`caption`), and its figures."""

    name: str
    title: str
    caption: str
    svg: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def shown_in(rows: Sequence[Row], labels: Sequence[str]) -> list[str]:
    """Return the runs that have rows, in the order of the report."""
    present = {row["run"] for row in rows}
    return [label for label in labels if label in present]


def run_colours(shown: Sequence[str], labels: Sequence[str]) -> Spec:
    """Return the colours of a chart's runs: a run has the same colour in every chart and table."""
    return {
        "domain": list(shown),
        "range": [f"var(--run{labels.index(label)})" for label in shown],
    }


def intervals_chart(
    rows: Sequence[Row],
    labels: Sequence[str],
    *,
    title: str,
    mark_at: float | None = None,
    margins: Sequence[float] = (),
) -> str:
    """Return a point with its interval for each run, one below the other.

    mark_at: where a dashed line stands for no difference. margins: where dotted lines stand.
    """
    shown = shown_in(rows, labels)
    x: Spec = {"type": "quantitative", "scale": {"zero": False, "nice": True}, "title": title}
    y: Spec = {"field": "run", "type": "nominal", "sort": shown, "title": None}
    y["axis"] = {"ticks": False, "domain": False, "labelColor": "var(--ink)", "labelPadding": 8}
    colour = {
        "field": "run",
        "type": "nominal",
        "scale": run_colours(shown, labels),
        "legend": None,
    }
    said = {"field": "said", "type": "nominal"}
    layers: list[Spec] = []
    for dash, places in (([4, 3], () if mark_at is None else (mark_at,)), ([1, 3], margins)):
        line = {"type": "rule", "strokeDash": dash, "color": "var(--muted)", "aria": False}
        layers += [
            {
                "data": {"values": [{"at": place} for place in places]},
                "mark": line,
                "encoding": {"x": {"field": "at", **x}},
            }
        ] * bool(places)
    layers += [
        {
            "mark": {"type": "rule", "strokeWidth": 3, "strokeCap": "round", "opacity": 0.55},
            "transform": [{"filter": "datum.low != null"}],
            "encoding": {
                "x": {"field": "low", **x},
                "x2": {"field": "high"},
                "y": y,
                "color": colour,
                "description": said,
            },
        },
        {
            "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
            "encoding": {"x": {"field": "value", **x}, "y": y, "color": colour}
            | {"description": said},
        },
    ]
    height = {"step": 34}
    return drawn({"width": WIDTH, "height": height, "data": {"values": rows}, "layer": layers})


def curves_chart(
    rows: Sequence[Row],
    labels: Sequence[str],
    *,
    x: tuple[str, str],
    directions: bool = False,
) -> str:
    """Share of tokens above x, both axes logarithmic: a line a run, dashed for improvements."""
    encoding: Spec = {
        "x": {
            "field": x[0],
            "type": "quantitative",
            "scale": {"type": "log"},
            "title": x[1],
            "axis": {"format": "~g", "values": _decades([row[x[0]] for row in rows])},
        },
        "y": {
            "field": "share",
            "type": "quantitative",
            "scale": {"type": "log", "domainMax": 1},
            "title": "share of tokens above",
            "axis": {"format": "~%", "values": _decades([row["share"] for row in rows])},
        },
    }
    encoding |= by_run(rows, labels, dashes=not directions)
    if directions:
        encoding["strokeDash"] = {
            "field": "direction",
            "type": "nominal",
            "scale": {"domain": ["worse", "better"], "range": [[1, 0], [4, 3]]},
        }
    mark = {"type": "line", "strokeWidth": 2, "interpolate": "monotone"}
    return drawn(_plot(rows, mark, encoding))


def _decades(values: Sequence[str | float | int | None]) -> list[float]:
    """Return the powers of ten around some positive numbers."""
    numbers = [float(value) for value in values if value]
    if not numbers:
        return [1.0]
    first, last = math.floor(math.log10(min(numbers))), math.ceil(math.log10(max(numbers)))
    return [10.0**power for power in range(first, last + 1)]


def by_run(rows: Sequence[Row], labels: Sequence[str], *, dashes: bool) -> Spec:
    """Colour (and, where it is free, dash) by run, with a legend of the runs that have rows.

    A chart of one run of several has a legend too: it says which one.
    """
    shown = shown_in(rows, labels)
    legend: Spec | None = {} if len(labels) > 1 else None
    encoding: Spec = {
        "color": {
            "field": "run",
            "type": "nominal",
            "scale": run_colours(shown, labels),
            "legend": legend,
        }
    }
    if dashes:
        encoding["strokeDash"] = {
            "field": "run",
            "type": "nominal",
            "scale": {
                "domain": shown,
                "range": [DASHES[labels.index(label)] for label in shown],
            },
            "legend": legend,
        }
    return encoding


def _plot(rows: Sequence[Row], mark: Spec, encoding: Spec) -> Spec:
    return {
        "width": WIDTH,
        "height": 220,
        "data": {"values": list(rows)},
        "mark": mark,
        "encoding": encoding,
    }


def position_chart(rows: Sequence[Row], labels: Sequence[str]) -> str:
    """Mean loss against the position in the window, a line a run."""
    encoding: Spec = {
        "x": {"field": "middle", "type": "quantitative", "title": "position in the window"},
        "y": {
            "field": "loss",
            "type": "quantitative",
            "title": "mean loss, nats per token",
            "scale": {"zero": False},
        },
    }
    encoding |= by_run(rows, labels, dashes=True)
    mark = {"type": "line", "strokeWidth": 2, "point": {"size": 22, "opacity": 1}}
    return drawn(_plot(rows, mark, encoding))


def agreement_chart(rows: Sequence[Row], labels: Sequence[str], order: Sequence[str]) -> str:
    """Share with the same first choice against the reference's confidence, with intervals."""
    shown = shown_in(rows, labels)
    x = {
        "field": "confidence",
        "type": "ordinal",
        "sort": list(order),
        "title": "the reference's probability of its own first choice",
        "axis": {"labelAngle": 0, "labelOverlap": False, "labelFontSize": 11},
    }
    scale = {"zero": False, "domainMax": 1}
    y = {"type": "quantitative", "scale": scale, "axis": {"format": "~%"}}
    y["title"] = "same first choice"
    colour = by_run(rows, labels, dashes=False)
    offset = {"xOffset": {"field": "run", "sort": shown}} if len(shown) > 1 else {}
    said = {"description": {"field": "said", "type": "nominal"}}
    common: Spec = {"x": x, **colour, **offset, **said}
    layers = [
        {
            "mark": {"type": "rule", "strokeWidth": 3, "opacity": 0.5, "strokeCap": "round"},
            "transform": [{"filter": "datum.low != null"}],
            "encoding": {**common, "y": {"field": "low", **y}, "y2": {"field": "high"}},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
            "encoding": {**common, "y": {"field": "share", **y}},
        },
    ]
    return drawn({"width": WIDTH, "height": 220, "data": {"values": list(rows)}, "layer": layers})


def trade_off_chart(rows: Sequence[Row], labels: Sequence[str]) -> str:
    """Return quality against memory; the size of a point is its speed."""
    x = {"field": "mebibytes", "type": "quantitative", "title": "peak memory, MiB"}
    y = {"field": "value", "type": "quantitative", "title": "perplexity"}
    size = {"field": "speed", "type": "quantitative", "legend": None}
    encoding: Spec = {
        "x": {**x, "scale": {"zero": False, "padding": 40}},
        "y": {**y, "scale": {"zero": False, "padding": 24}},
    }
    colour = {
        "field": "run",
        "type": "nominal",
        "scale": run_colours(shown_in(rows, labels), labels),
        "legend": None,
    }
    layers = [
        {
            "mark": {"type": "point", "filled": True, "opacity": 0.85},
            "encoding": {
                "size": {**size, "scale": {"range": [60, 500], "zero": True}},
                "color": colour,
                "description": {"field": "said", "type": "nominal"},
            },
        },
        {
            "mark": {"type": "text", "dy": -20, "aria": False},
            "encoding": {"text": {"field": "short", "type": "nominal"}},
        },
    ]
    plot = {"width": WIDTH, "height": 220, "data": {"values": list(rows)}}
    return drawn({**plot, "encoding": encoding, "layer": layers})
