"""The plot of an experiment: median test perplexity against steps, with intervals."""

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perplexit.atomic_files import cache_folder
from perplexit.errors import MissingPackageError

# Okabe and Ito's colours, which colour-blind people can tell apart; dashes help further
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#999999", "#CC79A7", "#E69F00")
_DASHES = ("-", "-", "-", "-", "--", "-.", ":")


def draw_experiment(
    document: Mapping[str, Any], folder: str | Path, *, title: str = ""
) -> list[Path]:
    """Write `curves.png` and `curves.svg`: curves on the left, paired ratios on the right.

    Raises MissingPackageError without matplotlib.
    """
    figure = _figure_class()(figsize=(10.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.45, 1])
    colours = {}
    for number, (method, found) in enumerate(document["methods"].items()):
        colours[method] = _COLOURS[number % len(_COLOURS)]
        style = {"color": colours[method], "linestyle": _DASHES[number % len(_DASHES)]}
        left.plot(found["steps"], found["median_perplexity"], label=method, linewidth=1.8, **style)
        left.fill_between(
            found["steps"],
            *(  # one seed has no interval, and nothing is drawn
                [math.nan if end is None else end for end in found[f"{side}_perplexity"]]
                for side in ("low", "high")
            ),
            color=colours[method],
            alpha=0.12,
            linewidth=0,
        )
    left.set_xlabel("optimizer steps")
    left.set_ylabel("test perplexity (median over seeds)")
    left.legend(frameon=False, fontsize=9)
    left.set_title(
        title or str(document.get("title") or document.get("model", "")), fontsize=10, loc="left"
    )
    _draw_ratios(right, document, colours)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    paths = [Path(folder) / "curves.png", Path(folder) / "curves.svg"]
    for path in paths:
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def _figure_class() -> Any:
    """Return Matplotlib's Figure; its list of fonts goes to Perplexit's cache, not to the home."""
    chosen = "MPLCONFIGDIR" in os.environ or "matplotlib" in sys.modules
    if not chosen:
        os.environ["MPLCONFIGDIR"] = str(cache_folder() / "matplotlib")
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an optional package's door
    except ImportError:
        raise MissingPackageError(
            "the figure needs matplotlib: pip install 'perplexit[igf]'"
        ) from None
    finally:
        if not chosen:
            del os.environ["MPLCONFIGDIR"]
    return Figure


def _draw_ratios(axes: Any, document: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    rows = list(document["comparisons"])[::-1]
    confidence = document["plan"]["confidence"]
    for height, row in enumerate(rows):
        percent = [100 * (row[key] - 1) for key in ("ratio", "ratio_low", "ratio_high")]
        colour = colours[row["method"]]
        axes.plot(percent[1:], [height, height], color=colour, linewidth=2)
        axes.plot(percent[:1], [height], "o", color=colour)
    axes.axvline(0, color="#444444", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axes.set_ylim(-0.6, max(0, len(rows) - 1) + 0.6)
    axes.set_xlabel(f"final perplexity against {document.get('reference', '')}, percent")
    axes.set_title(f"paired by seed, {confidence:.0%} interval", fontsize=10, loc="left")
