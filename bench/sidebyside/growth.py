"""How time and memory grow: the points of each axis, exponents, their table, and the pictures."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from sidebyside.paired_ratios import growth_exponent
from sidebyside.records import Record
from sidebyside.report import MIB, table
from sidebyside.sections import GROWTH, MODELS, SMALL_LLAMA, Section

Points = Mapping[str, Sequence[Mapping[str, float]]]  # of each way: size, seconds, peak_bytes
LOSSES, VERBS = ("perplexit nll", "plain loop"), ("prepare", "evaluate")
# axis → its label, who takes turns, its sizes, and (windows, length, vocabulary, layers) at a size.
AXES: dict[str, tuple[str, tuple[str, ...], tuple[int, ...], Callable[[int], Any]]] = {
    "window": (
        "ids per window",
        LOSSES,
        (256, 512, 1024, 2048, 4096, 8192),
        lambda size: (1, size, 16384, 6),
    ),
    "vocabulary": (
        "vocabulary",
        LOSSES,
        (8192, 16384, 32768, 65536, 131072),
        lambda size: (2, 512, size, 2),
    ),
    "batch": (
        "windows of 256 ids in a batch",
        LOSSES,
        (1, 2, 4, 8, 16, 32),
        lambda size: (size, 256, 16384, 6),
    ),
    "documents": (
        "documents",
        VERBS,
        (1_000, 4_000, 16_000, 64_000),
        lambda size: (size, 51, None, None),
    ),
}
# Okabe and Ito's colours; the markers tell the lines apart without them.
_STYLES = (("#0072B2", "o"), ("#D55E00", "s"))
# what is counted → its unit, the axis's words, the picture's title and file.
COSTS = {
    "seconds": (1.0, "processor seconds", "Time, one thread", "scaling-time.png"),
    "peak_bytes": (MIB, "MiB beyond the start", "Peak memory", "scaling-memory.png"),
}
HEADER = (
    *("varied", "", "time grows as size to the", "at the end"),
    *("memory", "at the end", "at the largest size"),
)
_FLAT = 0.15


def growth_sections(most: int | None = None) -> Iterator[Section]:
    """Yield the points of each axis, smallest first: `growth-AXIS-SIZE`.

    The models are random Llamas: the question is how a cost grows, and not how large it is. So
    time is the processor's, on one thread: other work on the machine does not move it.
    most: points of an axis; None: all.
    """
    for axis, (_, ways, sizes, at) in AXES.items():
        for size in sizes[:most]:
            windows, length, vocabulary, layers = at(size)
            model = f"llama-{vocabulary}-{layers}" if vocabulary else "demo"
            if vocabulary:
                config = SMALL_LLAMA | {"vocab_size": vocabulary, "num_hidden_layers": layers}
                MODELS[model] = ("checkpoints:random_llama", config)
            question = f"How do time and memory grow with the {axis}? At {size}."
            names: dict[str, Any] = {"name": f"growth-{axis}-{size}", "question": question}
            names |= {"model": model, "contenders": ways, "base": ways[-1]}
            yield replace(GROWTH, max_length=length, windows=windows, **names)


def growth_axes(records: Mapping[str, Record]) -> dict[str, dict[str, Any]] | None:
    """Return label and points of each axis, by its name; None where a point was not measured."""
    found: dict[str, dict[str, Any]] = {}
    for name, (label, ways, sizes, _) in AXES.items():
        points: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for size in sizes:
            record = records.get(f"growth-{name}-{size}", {"contenders": {}})
            for way in ways:
                entry = record["contenders"].get(way, {"error": "not measured"})
                if "error" in entry:
                    return None
                # The least of the processor's: what disturbs a turn only ever adds to it.
                seconds, peak = min(entry["cpu_seconds"]), entry["memory"]["peak_bytes"]
                points[way].append({"size": size, "seconds": seconds, "peak_bytes": peak})
        found[name] = {"label": label, "points": points}
    return found


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
            largest = f"{last['seconds']:.2f} s, {last['peak_bytes'] / MIB:,.0f} MiB"
            rows.append([sizes, way, *(f"{value:.2f}" for value in found.values()), largest])
    return table(HEADER, rows)


def draw_growth(axes: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write `scaling-time.png` and `scaling-memory.png`: a panel for each axis, log scales."""
    paths = []
    for cost, (_, _, title, file) in COSTS.items():
        figure = Figure(figsize=(9.6, 7.0), layout="constrained")
        panels = figure.subplots(2, 2).flat
        for panel, (name, axis) in zip(panels, axes.items(), strict=True):
            _draw(panel, name, axis, cost)
        figure.suptitle(title, fontsize=11)
        paths.append(folder / file)
        figure.savefig(paths[-1], dpi=130)
    return paths


def _draw(panel: Any, name: str, axis: Mapping[str, Any], cost: str) -> None:
    unit, words = COSTS[cost][:2]
    found = exponents(axis["points"])
    for (way, rows), (colour, marker) in zip(axis["points"].items(), _STYLES, strict=True):
        x = [row["size"] for row in rows]
        y = [max(row[cost], 1e-9) / unit for row in rows]
        exponent = found[way][cost]
        label = f"{way}: size^{exponent:.2f}" if abs(exponent) > _FLAT else f"{way}: flat"
        panel.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.8, label=label)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(x, [f"{size:,}" for size in x], fontsize=8)
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.minorticks_off()
    panel.set_xlabel(axis["label"], fontsize=9)
    panel.set_ylabel(words, fontsize=9)
    panel.set_title(name, fontsize=10, loc="left")
    panel.legend(frameon=False, fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25, linewidth=0.6)
