"""Rows → charts as inline SVG, drawn by Vega-Lite when the report is written.

The drawings carry no script and no size of their own, take their colours from the page's style
sheet (so that they follow light and dark), and have a label for each mark for screen readers.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module, resources
from typing import Any

from perplexit.errors import needing


def asset(name: str) -> str:
    """Return a file of the page as text."""
    return (resources.files("perplexit.report") / "assets" / name).read_text(encoding="utf-8")


def loaded(module: str) -> Any:
    """Import a module of the extra `report`. Raises MissingPackageError with what to install."""
    with needing("a report", "pip install 'perplexit[report]'", module.replace("_", "-")):
        return import_module(module)


VEGA_LITE = "5.21"
WIDTH = 400
DASHES = [[1, 0], [5, 3], [2, 2], [8, 3, 2, 3], [10, 4], [4, 2, 1, 2], [1, 3], [12, 3]]
_NOT_DRAWABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\u2028\u2029\ud800-\udfff\ufffe\uffff]")

Row = dict[str, str | float | int | None]
Spec = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing with what it shows (`title`), how to read it (`caption`), and its figures."""

    name: str
    title: str
    caption: str
    svg: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def drawn(spec: Spec) -> str:
    """Draw a Vega-Lite chart as an SVG element that scales with the page.

    The configuration names fonts of equal widths on every system: labels are laid out here and
    drawn by the reader's browser.
    Raises MissingPackageError without the extra `report`.
    """
    config = json.loads(asset("vega_config.json"))
    svg: str = loaded("vl_convert").vegalite_to_svg(
        _drawable({"background": "transparent", "config": config, **spec}),
        vl_version=VEGA_LITE,
        allowed_base_urls=[],  # a drawing fetches nothing
    )
    root = re.match(r"<svg[^>]*>", svg)
    if root is None:
        return svg
    width, height = re.findall(r' (?:width|height)="([\d.]+)"', root[0])[:2]
    opening = f'<svg class="chart" viewBox="0 0 {width} {height}" role="group">'
    return opening + svg[root.end() :]


def _drawable(value: Any) -> Any:
    """Spell out the characters that XML or the drawing's script cannot hold, at any depth."""
    if isinstance(value, str):
        return _NOT_DRAWABLE.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", value)
    if isinstance(value, dict):
        return {_drawable(key): _drawable(item) for key, item in value.items()}
    return [_drawable(item) for item in value] if isinstance(value, list | tuple) else value


def plot(rows: Sequence[Row], *, height: Any = 220, **parts: Any) -> Spec:
    """Return a chart of `rows`: `mark` and `encoding`, or `layer`, and whatever else it has."""
    return {"width": WIDTH, "height": height, "data": {"values": list(rows)}, **parts}


def quantitative(field: str, title: str | None = None, **parts: Any) -> Spec:
    """Return an encoding of numbers; without a title, Vega-Lite uses the name of the field."""
    titled = {} if title is None else {"title": title}
    return {"field": field, "type": "quantitative", **titled, **parts}


def nominal(field: str, **parts: Any) -> Spec:
    """Return an encoding of names."""
    return {"field": field, "type": "nominal", **parts}


SAID = nominal("said")  # the label of a mark, for screen readers


def interval_mark(*, width: int = 3, opacity: float = 0.5) -> Spec:
    """Return the mark of an interval, which rows without one do not have."""
    mark = {"type": "rule", "strokeWidth": width, "strokeCap": "round", "opacity": opacity}
    return {"mark": mark, "transform": [{"filter": "datum.low != null"}]}


def point_mark(size: int) -> Spec:
    """Return the mark of a figure."""
    return {"mark": {"type": "point", "filled": True, "size": size, "opacity": 1}}


def shown_in(rows: Sequence[Row], labels: Sequence[str]) -> list[str]:
    """Return the runs that have rows, in the order of the report."""
    present = {row["run"] for row in rows}
    return [label for label in labels if label in present]


def run_colours(rows: Sequence[Row], labels: Sequence[str], legend: Spec | None = None) -> Spec:
    """Return the colours of a chart's runs: a run has the same colour in every chart and table."""
    shown = shown_in(rows, labels)
    colours = [f"var(--run{labels.index(label)})" for label in shown]
    return nominal("run", scale={"domain": shown, "range": colours}, legend=legend)


def by_run(rows: Sequence[Row], labels: Sequence[str], *, dashes: bool) -> Spec:
    """Return colour (and, where it is free, dash) by run, with a legend of the runs with rows.

    A chart of one run of several has a legend too: it says which one.
    """
    legend: Spec | None = {} if len(labels) > 1 else None
    encoding: Spec = {"color": run_colours(rows, labels, legend)}
    if dashes:
        shown = shown_in(rows, labels)
        scale = {"domain": shown, "range": [DASHES[labels.index(label)] for label in shown]}
        encoding["strokeDash"] = nominal("run", scale=scale, legend=legend)
    return encoding


def intervals_chart(
    rows: Sequence[Row],
    labels: Sequence[str],
    *,
    title: str,
    mark_at: float | None = None,
    margins: Sequence[float] = (),
) -> str:
    """Draw a point with its interval for each run, one below the other.

    mark_at: where a dashed line stands for no difference. margins: where dotted lines stand.
    """
    scale = {"zero": False, "nice": True}
    axis = {"ticks": False, "domain": False, "labelColor": "var(--ink)", "labelPadding": 8}
    y = nominal("run", sort=shown_in(rows, labels), title=None, axis=axis)
    own: Spec = {"y": y, "color": run_colours(rows, labels), "description": SAID}
    layers: list[Spec] = [
        {
            "data": {"values": [{"at": place} for place in places]},
            "mark": {"type": "rule", "strokeDash": dash, "color": "var(--muted)", "aria": False},
            "encoding": {"x": quantitative("at", title, scale=scale)},
        }
        for dash, places in (([4, 3], () if mark_at is None else (mark_at,)), ([1, 3], margins))
        if places
    ]
    interval = {"x": quantitative("low", title, scale=scale), "x2": {"field": "high"}, **own}
    point = {"x": quantitative("value", title, scale=scale), **own}
    layers.append({**interval_mark(opacity=0.55), "encoding": interval})
    layers.append({**point_mark(90), "encoding": point})
    return drawn(plot(rows, height={"step": 34}, layer=layers))


def curves_chart(
    rows: Sequence[Row], labels: Sequence[str], *, x: tuple[str, str], directions: bool = False
) -> str:
    """Draw the share of tokens above x, both axes logarithmic: a line per run.

    x: the field and its title. directions: whether improvements are dashed.
    """

    def logarithmic(field: str, title: str, form: str, **scale: Any) -> Spec:
        axis = {"format": form, "values": _decades([row[field] for row in rows])}
        return quantitative(field, title, scale={"type": "log", **scale}, axis=axis)

    encoding: Spec = {
        "x": logarithmic(*x, "~g"),
        "y": logarithmic("share", "share of tokens above", "~%", domainMax=1),
        **by_run(rows, labels, dashes=not directions),
    }
    if directions:
        scale = {"domain": ["worse", "better"], "range": [[1, 0], [4, 3]]}
        encoding["strokeDash"] = nominal("direction", scale=scale)
    mark = {"type": "line", "strokeWidth": 2, "interpolate": "monotone"}
    return drawn(plot(rows, mark=mark, encoding=encoding))


def _decades(values: Sequence[str | float | int | None]) -> list[float]:
    """Return the powers of ten around some positive numbers."""
    numbers = [float(value) for value in values if value]
    if not numbers:
        return [1.0]
    first, last = math.floor(math.log10(min(numbers))), math.ceil(math.log10(max(numbers)))
    return [10.0**power for power in range(first, last + 1)]


def position_chart(rows: Sequence[Row], labels: Sequence[str]) -> str:
    """Draw the mean loss against the position in the window, a line per run."""
    encoding: Spec = {
        "x": quantitative("middle", "position in the window"),
        "y": quantitative("loss", "mean loss, nats per token", scale={"zero": False}),
        **by_run(rows, labels, dashes=True),
    }
    mark = {"type": "line", "strokeWidth": 2, "point": {"size": 22, "opacity": 1}}
    return drawn(plot(rows, mark=mark, encoding=encoding))


def agreement_chart(rows: Sequence[Row], labels: Sequence[str], order: Sequence[str]) -> str:
    """Draw the share of equal first choices against the reference's confidence, with intervals."""
    shown = shown_in(rows, labels)
    x = {
        "field": "confidence",
        "type": "ordinal",
        "sort": list(order),
        "title": "the reference's probability of its own first choice",
        "axis": {"labelAngle": 0, "labelOverlap": False, "labelFontSize": 11},
    }
    y = {"scale": {"zero": False, "domainMax": 1}, "axis": {"format": "~%"}}
    title = "same first choice"
    common: Spec = {"x": x, **by_run(rows, labels, dashes=False), "description": SAID}
    if len(shown) > 1:
        common["xOffset"] = {"field": "run", "sort": shown}
    interval = {**common, "y": quantitative("low", title, **y), "y2": {"field": "high"}}
    point = {**common, "y": quantitative("share", title, **y)}
    layers = [{**interval_mark(), "encoding": interval}, {**point_mark(70), "encoding": point}]
    return drawn(plot(rows, layer=layers))


def trade_off_chart(rows: Sequence[Row], labels: Sequence[str]) -> str:
    """Draw quality against memory; the size of a point is its speed."""
    sizes = {"range": [60, 500], "zero": True}
    x = quantitative("mebibytes", "peak memory, MiB", scale={"zero": False, "padding": 40})
    y = quantitative("value", "perplexity", scale={"zero": False, "padding": 24})
    layers: list[Spec] = [
        {
            "mark": {"type": "point", "filled": True, "opacity": 0.85},
            "encoding": {
                "size": quantitative("speed", legend=None, scale=sizes),
                "color": run_colours(rows, labels),
                "description": SAID,
            },
        },
        {
            "mark": {"type": "text", "dy": -20, "aria": False},
            "encoding": {"text": nominal("short")},
        },
    ]
    return drawn(plot(rows, encoding={"x": x, "y": y}, layer=layers))
