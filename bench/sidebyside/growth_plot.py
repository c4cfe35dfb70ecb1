"""The pictures and the table of how time and memory grow."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

# Okabe and Ito's colours; the markers tell the lines apart without them.
_STYLES = (("#0072B2", "o"), ("#D55E00", "s"))
COSTS = {"seconds": (1.0, "processor seconds"), "peak_bytes": (2.0**20, "MiB beyond the start")}
TITLES = {"seconds": "Time, one thread", "peak_bytes": "Peak memory"}
KEYS = ("seconds", "seconds_at_the_end", "peak_bytes", "peak_bytes_at_the_end")
_FLAT = 0.15


def draw_growth(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write `scaling-time.png` and `scaling-memory.png`: a panel an axis, log scales."""
    paths = []
    for cost, file in (("seconds", "scaling-time.png"), ("peak_bytes", "scaling-memory.png")):
        figure = Figure(figsize=(9.6, 7.0), layout="constrained")
        panels = figure.subplots(2, 2).flat
        for axes, (name, axis) in zip(panels, document["axes"].items(), strict=True):
            _draw(axes, name, axis, cost)
        figure.suptitle(TITLES[cost], fontsize=11)
        paths.append(folder / file)
        figure.savefig(paths[-1], dpi=130)
    return paths


def growth_table(document: Mapping[str, Any]) -> list[str]:
    """A row an axis and way: the exponents over all sizes, and over the last two alone."""
    lines = [
        "| varied | | time grows as size to the | at the end | memory | at the end "
        "| at the largest size |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, axis in document["axes"].items():
        for way, rows in axis["points"].items():
            found, last = axis["exponents"][way], rows[-1]
            cells = [found[key] for key in KEYS]
            figures = " | ".join(f"{cell:.2f}" for cell in cells)
            largest = f"{last['seconds']:.2f} s, {last['peak_bytes'] / 2**20:,.0f} MiB"
            lines.append(f"| {name}: {_sizes(rows)} | {way} | {figures} | {largest} |")
    return lines


def _sizes(rows: Sequence[Mapping[str, float]]) -> str:
    return f"{rows[0]['size']:,} to {rows[-1]['size']:,}"


def _draw(axes: Any, name: str, axis: Mapping[str, Any], cost: str) -> None:
    unit, label = COSTS[cost]
    for (way, rows), (colour, marker) in zip(axis["points"].items(), _STYLES, strict=True):
        x = [row["size"] for row in rows]
        y = [max(row[cost], 1e-9) / unit for row in rows]
        exponent = axis["exponents"][way][cost]
        shown = f"{way}: size^{exponent:.2f}" if abs(exponent) > _FLAT else f"{way}: flat"
        axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.8, label=shown)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(x, [f"{size:,}" for size in x], fontsize=8)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
    axes.set_xlabel(axis["label"], fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    axes.set_title(name, fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
