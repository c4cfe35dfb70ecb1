"""How time and memory grow: the points of each axis, exponents, their table, and the pictures."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sidebyside.contenders import TABLES
from sidebyside.records import MIB, Record
from sidebyside.report import table
from sidebyside.sections import KINDS, Section

Axes = Mapping[str, Mapping[str, Any]]  # by name: label, and points of each way, see `growth_axes`
HEADER = (
    *("varied", "", "time grows as size to the", "at the end"),
    *("memory", "at the end", "at the largest size"),
)


def growth_sections(most: int | None = None) -> Iterator[Section]:
    """Yield the points of each axis, smallest first: `growth-AXIS-SIZE`.

    The models are random Llamas: the question is how a cost grows, and not how large it is. So
    time is the processor's, on one thread: other work on the machine does not move it.
    most: points of an axis; None: all.
    """
    for axis, entry in TABLES["axes"].items():
        for size in entry["sizes"][:most]:
            at = {name: size if x == "size" else x for name, x in entry["at"].items()}
            changes = {"windows": at.pop("windows"), "max_length": at.pop("max_length")}
            model = "-".join(str(word) for word in ("llama", *at.values())) if at else "demo"
            TABLES["models"].setdefault(model, TABLES["small_llama"] | at)
            question = f"How do time and memory grow with the {axis}? At {size}."
            changes |= {"name": f"growth-{axis}-{size}", "question": question, "model": model}
            ways = tuple(entry["contenders"])
            yield replace(KINDS["growth"], contenders=ways, base=ways[-1], **changes)


def growth_axes(records: Mapping[str, Record]) -> dict[str, dict[str, Any]] | None:
    """Return label and points of each axis, by its name; None where a point was not measured.

    A way's points are mappings with size, seconds and peak_bytes.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, entry in TABLES["axes"].items():
        points: dict[str, list[dict[str, float]]] = {way: [] for way in entry["contenders"]}
        for size in entry["sizes"]:
            record = records.get(f"growth-{name}-{size}", {"contenders": {}})
            for way, rows in points.items():
                turns = record["contenders"].get(way, {})
                if "memory" not in turns:
                    return None
                # The least of the processor's: what disturbs a turn only ever adds to it.
                seconds, peak = min(turns["cpu_seconds"]), turns["memory"]["peak_bytes"]
                rows.append({"size": size, "seconds": seconds, "peak_bytes": peak})
        found[name] = {"label": entry["label"], "points": points}
    return found


def growth_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return k of `cost = c · size^k`, by least squares of the logarithms of at least two."""
    logs = [log(max(cost, 1e-9)) for cost in costs]
    return statistics.linear_regression([log(size) for size in sizes], logs).slope


def growth_table(axes: Axes) -> list[str]:
    """Return a row for each axis and way: exponents over all sizes, and over the last two alone."""
    cells = []
    for name, axis in axes.items():
        for way, points in axis["points"].items():
            sizes = [point["size"] for point in points]
            seconds, peaks = (
                [point[cost] for point in points] for cost in ("seconds", "peak_bytes")
            )
            exponents = [
                growth_exponent(sizes[first:], costs[first:])
                for costs in (seconds, peaks)
                for first in (0, -2)
            ]
            varied = f"{name}: {sizes[0]:,} to {sizes[-1]:,}"
            largest = f"{seconds[-1]:.2f} s, {peaks[-1] / MIB:,.0f} MiB"
            cells.append([varied, way, *(f"{k:.2f}" for k in exponents), largest])
    return table(HEADER, cells)


def draw_growth(axes: Axes, folder: Path) -> list[Path]:
    """Write `scaling-time.png` and `scaling-memory.png`: a panel for each axis, log scales."""
    seconds = "seconds", 1, "processor seconds", folder / "scaling-time.png"
    memory = "peak_bytes", MIB, "MiB beyond the start", folder / "scaling-memory.png"
    for cost, unit, words, path in (seconds, memory):
        figure = Figure(figsize=(9.6, 7.0), layout="constrained")
        for panel, (name, axis) in zip(figure.subplots(2, 2).flat, axes.items(), strict=True):
            for way, points in axis["points"].items():
                sizes = [point["size"] for point in points]
                costs = [max(point[cost], 1e-9) / unit for point in points]
                panel.loglog(sizes, costs, marker="o", label=way, base=2)
            panel.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
            panel.yaxis.set_major_formatter("{x:g}")
            panel.set(title=name, xlabel=axis["label"], ylabel=words)
            panel.legend()
        figure.savefig(path, dpi=130)
    return [seconds[-1], memory[-1]]
