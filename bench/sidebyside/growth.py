"""How time and memory grow: exponents, their table, and the pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from sidebyside.paired_ratios import growth_exponent
from sidebyside.records import Record
from sidebyside.report import table
from sidebyside.sections import AXES

Points = Mapping[str, Sequence[Mapping[str, float]]]  # of each way: size, seconds, peak_bytes
# Okabe and Ito's colours; the markers tell the lines apart without them.
_STYLES = (("#0072B2", "o"), ("#D55E00", "s"))
COSTS = {"seconds": (1.0, "processor seconds"), "peak_bytes": (2.0**20, "MiB beyond the start")}
PICTURES = {
    "seconds": ("Time, one thread", "scaling-time.png"),
    "peak_bytes": ("Peak memory", "scaling-memory.png"),
}
HEADER = (
    *("varied", "", "time grows as size to the", "at the end"),
    *("memory", "at the end", "at the largest size"),
)
_FLAT = 0.15


def growth_axes(records: Mapping[str, Record]) -> dict[str, dict[str, Any]] | None:
    """Return label and points of each axis, by its name; None where a point was not measured."""
    found = {}
    for name, axis in AXES.items():
        points: dict[str, list[dict[str, float]]] = {}
        for size in axis.sizes:
            record = records.get(f"growth-{name}-{size}", {"contenders": {"": {"error": ""}}})
            for way, entry in record["contenders"].items():
                if "error" in entry:
                    return None
                # The least of the processor's: what disturbs a turn only ever adds to it.
                costs = (min(entry["cpu_seconds"]), entry["memory"]["peak_bytes"])
                point = {"size": size, "seconds": costs[0], "peak_bytes": costs[1]}
                points.setdefault(way, []).append(point)
        found[name] = {"label": axis.label, "points": points}
    if "growth-documents" not in records:
        return None
    return found | {"documents": dict(records["growth-documents"])}


def exponents(points: Points) -> dict[str, dict[str, float]]:
    """Return how each way's seconds and bytes grow over all sizes, and over the last two."""
    found: dict[str, dict[str, float]] = {}
    for way, rows in points.items():
        sizes = [row["size"] for row in rows]
        found[way] = {}
        for cost in COSTS:
            values = [max(row[cost], 1e-9) for row in rows]
            found[way][cost] = growth_exponent(sizes, values)
            found[way][f"{cost}_at_the_end"] = growth_exponent(sizes[-2:], values[-2:])
    return found


def growth_table(axes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a row for each axis and way: exponents over all sizes, and over the last two alone."""
    rows = []
    for name, axis in axes.items():
        for way, found in exponents(axis["points"]).items():
            first, last = axis["points"][way][0], axis["points"][way][-1]
            sizes = f"{name}: {first['size']:,} to {last['size']:,}"
            largest = f"{last['seconds']:.2f} s, {last['peak_bytes'] / 2**20:,.0f} MiB"
            rows.append([sizes, way, *(f"{value:.2f}" for value in found.values()), largest])
    return table(HEADER, rows)


def draw_growth(axes: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write `scaling-time.png` and `scaling-memory.png`: a panel for each axis, log scales."""
    paths = []
    for cost, (title, file) in PICTURES.items():
        figure = Figure(figsize=(9.6, 7.0), layout="constrained")
        panels = figure.subplots(2, 2).flat
        for panel, (name, axis) in zip(panels, axes.items(), strict=True):
            _draw(panel, name, axis, cost)
        figure.suptitle(title, fontsize=11)
        paths.append(folder / file)
        figure.savefig(paths[-1], dpi=130)
    return paths


def _draw(panel: Any, name: str, axis: Mapping[str, Any], cost: str) -> None:
    unit, label = COSTS[cost]
    found = exponents(axis["points"])
    for (way, rows), (colour, marker) in zip(axis["points"].items(), _STYLES, strict=True):
        x = [row["size"] for row in rows]
        y = [max(row[cost], 1e-9) / unit for row in rows]
        exponent = found[way][cost]
        shown = f"{way}: size^{exponent:.2f}" if abs(exponent) > _FLAT else f"{way}: flat"
        panel.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.8, label=shown)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(x, [f"{size:,}" for size in x], fontsize=8)
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.minorticks_off()
    panel.set_xlabel(axis["label"], fontsize=9)
    panel.set_ylabel(label, fontsize=9)
    panel.set_title(name, fontsize=10, loc="left")
    panel.legend(frameon=False, fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25, linewidth=0.6)
