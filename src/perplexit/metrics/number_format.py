"""Figures in words, with as many digits as their intervals carry."""

import math

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
