"""Estimate: a figure with its confidence interval, or with the reason why it has none."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace


def counted(count: int | None, unit: str) -> str:
    """Return `1 cluster`, `24 clusters`; a dash for the number where it is unknown."""
    number = "-" if count is None else f"{count:,}"
    return f"{number} {unit}{'' if count == 1 else 's'}"


def missing_figures(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Return, for each reason, the figures that it leaves out: `bits_per_byte`, `interval of …`.

    reasons: as in `run.json`, by the name of a figure or of an end of its interval.
    """
    missing: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        figure = name.removesuffix("_low").removesuffix("_high")
        said = figure if figure in reasons else f"interval of {figure}"
        if said not in missing.setdefault(reason, []):
            missing[reason].append(said)
    return missing


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure, the ends of its confidence interval, and where they come from.

    low, high:      None where there is no interval.
    method:         what the clusters are, "document" or "window-block"; None where the figure has
                    no interval by its nature (a median, a maximum).
    num_clusters:   how many clusters the interval rests on.
    standard_error: of `value`, in its unit; None after a map that is not a change of unit.
    reason:         why an interval that could exist (`method` is given) does not.
    """

    value: float
    low: float | None = None
    high: float | None = None
    method: str | None = None
    num_clusters: int | None = None
    confidence: float | None = None
    standard_error: float | None = None
    degrees_of_freedom: float | None = None
    reason: str | None = None

    @property
    def has_interval(self) -> bool:
        """Tell whether both ends are known."""
        return self.low is not None and self.high is not None

    @property
    def should_have_interval(self) -> bool:
        """Tell whether an interval belongs to this figure, known or not."""
        return self.method is not None

    @property
    def basis(self) -> str:
        """Return what the interval rests on: `95 %, 24 clusters: document`; empty without one."""
        if not self.has_interval or self.confidence is None:
            return ""
        found = counted(self.num_clusters, "cluster")
        return f"{100 * self.confidence:g} %, {found}: {self.method}"

    def mapped(self, function: Callable[[float], float]) -> "Estimate":
        """Return the estimate of `function(figure)`, for an increasing function such as exp.

        Order is kept, so the ends of the interval are the images of the ends.
        """
        return replace(
            self,
            value=function(self.value),
            low=None if self.low is None else function(self.low),
            high=None if self.high is None else function(self.high),
            standard_error=None,
        )

    def scaled(self, factor: float) -> "Estimate":
        """Return the estimate in another unit: everything times `factor`, which is above 0."""
        found = self.mapped(lambda value: value * factor)
        error = None if self.standard_error is None else self.standard_error * factor
        return replace(found, standard_error=error)

    def clamped(self, lowest: float = -math.inf, highest: float = math.inf) -> "Estimate":
        """Return the estimate with the ends of its interval inside what is possible.

        The value stays as it was measured.
        """
        return replace(
            self,
            low=None if self.low is None else min(max(self.low, lowest), highest),
            high=None if self.high is None else min(max(self.high, lowest), highest),
        )


DASH = "–"


def figure(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """Return a figure to the digits that it carries: `18.30`; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:,.{decimals(value, low, high)}f}"


def interval(low: float | None, high: float | None) -> str:
    """Return `[17.12, 19.57]`, or nothing where there is no interval."""
    if low is None or high is None:
        return ""
    places = decimals(max(abs(low), abs(high)), low, high)
    return f"[{low:,.{places}f}, {high:,.{places}f}]"


def figure_with_interval(
    value: float | None, low: float | None = None, high: float | None = None
) -> str:
    """Return `18.30 [17.12, 19.57]`, or the figure alone where there is no interval."""
    return f"{figure(value, low, high)} {interval(low, high)}".rstrip()


def decimals(value: float, low: float | None, high: float | None) -> int:
    """Return how many places a figure is given to: two digits of its interval's width, or four."""
    size = math.floor(math.log10(abs(value))) if value and math.isfinite(value) else 0
    places = 3 - size
    width = abs(high - low) if low is not None and high is not None else 0.0
    if 0 < width < math.inf:
        places = max(places, 1 - math.floor(math.log10(width)))
    return min(max(places, 1), 6)


def quantity(value: float) -> str:
    """Return two significant digits, without an exponent where a reader can do without."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else DASH
    if value < 1e-5:
        return f"{value:.1e}"
    size = math.floor(math.log10(float(f"{value:.1e}")))  # of the rounded value: 0.0996 is 0.10
    return f"{value:.{max(1 - size, 0)}f}"


def percent(share: float) -> str:
    """Return a share as a percentage of two digits: `1.7 %`, `0.0010 %`."""
    return f"{quantity(100 * abs(share))}\N{NO-BREAK SPACE}%"


def exact_percent(share: float) -> str:
    """Return a share that was asked for, as it was asked: `1 %`, `0.25 %`."""
    return f"{100 * share:.6g}\N{NO-BREAK SPACE}%"


def change(nats: float) -> str:
    """Return a change of the log-perplexity as one of the perplexity: `1.7 % higher`."""
    if nats == 0:
        return "0\N{NO-BREAK SPACE}% higher"
    if nats < 0:
        return f"{percent(math.expm1(nats))} lower"
    if nats < math.log(2):
        return f"{percent(math.expm1(nats))} higher"
    return f"{math.exp(nats):.2g} times as high" if nats < 700 else "infinitely higher"


def mebibytes(num_bytes: float | None) -> str:
    """Return bytes as MiB or GiB; a dash where unknown."""
    if num_bytes is None:
        return DASH
    size = num_bytes / 2**20
    return f"{size:,.0f} MiB" if size < 10_000 else f"{size / 1024:,.1f} GiB"
