"""The summary of an experiment: median curves with intervals, paired tests, cost.

All computation is in log-perplexity (nats per target), whose differences are log-ratios of
perplexities; only the results are exponentiated.
"""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from perplexit.atomic_files import cache_folder
from perplexit.errors import needing

Runs = Mapping[int, Mapping[str, Any]]  # seed → the curve of a fine-tuning
_RESAMPLES = 2000


def summarise(records: Mapping[str, Runs], *, confidence: float = 0.95) -> dict[str, Any]:
    """Return `methods` (one summary each) and `comparisons` of every other method with the first.

    records: the runs of each method. Only seeds that a method and the first both have are paired.
    """
    methods = {m: _method(runs, confidence) for m, runs in records.items() if runs}
    reference = next(iter(records), None)
    if reference not in methods:
        return {"methods": methods, "comparisons": []}
    base = records[reference]
    rows = [
        _comparison(method, reference, runs, base, confidence)
        for method, runs in records.items()
        if method != reference and len(set(runs) & set(base)) >= 2
    ]
    for kind in ("p_t", "p_wilcoxon"):
        for row, adjusted in zip(rows, holm([row[kind] for row in rows]), strict=True):
            row[f"{kind}_holm"] = adjusted
    return {"reference": reference, "methods": methods, "comparisons": rows}


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return Holm's step-down adjusted p-values, which bound the family-wise error.

    Any dependence between the tests is allowed. A p-value that is not known (None) stays None, and
    counts as a test.
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(known):
        highest = max(highest, (len(p_values) - rank) * p)
        adjusted[index] = min(1.0, highest)
    return adjusted


def median_interval(
    values_SP: NDArray[np.float64], confidence: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the percentile-bootstrap interval of the median over seeds: two arrays [P].

    S = seeds, P = points of the curve. The resamples follow from a fixed seed. One seed has no
    interval: NaN at each point.
    """
    if len(values_SP) < 2:
        return (np.full(values_SP.shape[1], np.nan),) * 2
    random = np.random.default_rng(20210801)
    rows = random.integers(0, len(values_SP), (_RESAMPLES, len(values_SP)))
    medians = np.median(values_SP[rows], axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(medians, [tail, 1 - tail], axis=0)
    return low, high


def _method(runs: Runs, confidence: float) -> dict[str, Any]:
    ordered = [runs[seed] for seed in sorted(runs)]
    loss_SP = np.array([run["test_loss"] for run in ordered], dtype=np.float64)
    low, high = median_interval(loss_SP, confidence)
    names = ("tokens_trained", "tokens_scored", "tokens_judged")
    tokens = {name: float(np.mean([run[name] for run in ordered])) for name in names}
    return {
        "num_seeds": len(ordered),
        "steps": list(ordered[0]["steps"]),
        "median_perplexity": [float(x) for x in np.exp(np.median(loss_SP, axis=0))],
        "low_perplexity": [None if math.isnan(x) else math.exp(x) for x in low],
        "high_perplexity": [None if math.isnan(x) else math.exp(x) for x in high],
        "final_perplexities": {str(s): math.exp(runs[s]["test_loss"][-1]) for s in sorted(runs)},
        "acceptance": tokens["tokens_trained"] / max(1.0, tokens["tokens_judged"]),
        **tokens,
        "seconds": {
            part: float(np.mean([run["seconds"][part] for run in ordered]))
            for part in ordered[0]["seconds"]
        },
    }


def _comparison(
    method: str, reference: str, runs: Runs, base: Runs, confidence: float
) -> dict[str, Any]:
    seeds = sorted(set(runs) & set(base))
    final = np.array([runs[s]["test_loss"][-1] - base[s]["test_loss"][-1] for s in seeds])
    curve = np.array(
        [np.mean(runs[s]["test_loss"][1:]) - np.mean(base[s]["test_loss"][1:]) for s in seeds]
    )
    mean, low, high = _mean_interval(final, confidence)
    return {
        "method": method,
        "reference": reference,
        "num_seeds": len(seeds),
        "ratio": math.exp(mean),
        "ratio_low": math.exp(low),
        "ratio_high": math.exp(high),
        "seeds_better": int((final < 0).sum()),
        "p_t": _p(stats.ttest_rel, final),
        "p_wilcoxon": _p(stats.wilcoxon, final),
        "curve_ratio": math.exp(float(curve.mean())),
        "curve_seeds_better": int((curve < 0).sum()),
        "steps_to_reference_end": _steps_to(runs, base, seeds),
    }


def _mean_interval(values: NDArray[np.float64], confidence: float) -> tuple[float, float, float]:
    mean = float(values.mean())
    error = float(values.std(ddof=1) / math.sqrt(len(values)))
    reach = error * float(stats.t.ppf((1 + confidence) / 2, len(values) - 1))
    return mean, mean - reach, mean + reach


def _p(test: Any, differences: NDArray[np.float64]) -> float | None:
    """Return the test's p-value; None where it is not known, as for equal differences."""
    if not np.any(differences):
        return 1.0  # no difference at all: both tests would divide zero by zero
    if test is stats.ttest_rel and np.ptp(differences) == 0:
        return None  # without spread there is no standard error to hold the difference against
    arguments = (differences, np.zeros_like(differences))
    found = test(*arguments) if test is stats.ttest_rel else test(differences)
    return float(found.pvalue) if math.isfinite(found.pvalue) else None


def _steps_to(runs: Runs, base: Runs, seeds: list[int]) -> int | None:
    """Return the first evaluated step whose median loss is at most the reference's last median."""
    target = float(np.median([base[s]["test_loss"][-1] for s in seeds]))
    medians = np.median([runs[s]["test_loss"] for s in seeds], axis=0)
    reached = np.flatnonzero(medians <= target)
    return int(runs[seeds[0]]["steps"][reached[0]]) if len(reached) else None


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
            # None becomes NaN: one seed has no interval, and nothing is drawn
            np.array(found["low_perplexity"], dtype=np.float64),
            np.array(found["high_perplexity"], dtype=np.float64),
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
        with needing("the figure", "pip install 'perplexit[igf]'", "matplotlib"):
            from matplotlib.figure import Figure  # noqa: PLC0415 - an optional package's door
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
