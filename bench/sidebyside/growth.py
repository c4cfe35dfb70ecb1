"""How time and memory grow: the points of each axis, exponents, their table, and the pictures."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from sidebyside.contenders import TABLES
from sidebyside.paired_ratios import growth_exponent
from sidebyside.records import Record
from sidebyside.report import MIB, table
from sidebyside.sections import KINDS, MODELS, Section

Points = Mapping[str, Sequence[Mapping[str, float]]]  # of each way: size, seconds, peak_bytes
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
    for axis, entry in TABLES["axes"].items():
        for size in entry["sizes"][:most]:
            at = {name: size if x == "size" else x for name, x in entry["at"].items()}
            changes = {"windows": at.pop("windows"), "max_length": at.pop("max_length")}
            model = "-".join(str(word) for word in ("llama", *at.values())) if at else "demo"
            MODELS.setdefault(model, ("checkpoints:random_llama", TABLES["small_llama"] | at))
            question = f"How do time and memory grow with the {axis}? At {size}."
            changes |= {"name": f"growth-{axis}-{size}", "question": question, "model": model}
            ways = tuple(entry["contenders"])
            yield replace(KINDS["growth"], contenders=ways, base=ways[-1], **changes)


def growth_axes(records: Mapping[str, Record]) -> dict[str, dict[str, Any]] | None:
    """Return label and points of each axis, by its name; None where a point was not measured."""
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
    for (way, rows), marker in zip(axis["points"].items(), "os", strict=True):
        y = [max(row[cost], 1e-9) / unit for row in rows]
        exponent = found[way][cost]
        label = f"{way}: size^{exponent:.2f}" if abs(exponent) > _FLAT else f"{way}: flat"
        panel.loglog([row["size"] for row in rows], y, marker=marker, label=label, base=2)
    sizes = [row["size"] for row in rows]
    panel.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.set_xlabel(axis["label"])
    panel.set_ylabel(words)
    panel.set_title(name, loc="left")
    panel.legend(frameon=False)
    panel.grid(alpha=0.25)
