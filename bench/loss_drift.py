"""How far the losses of real text are from independent: what the intervals' blocks must hold.

For stretches of n consecutive tokens, prints n · variance of their means / variance of the losses:
1 for independent tokens; where it stops to grow, a stretch holds what varies together. Also the
largest autocorrelation. The arguments are runs' folders (`perplexit eval … --run FOLDER`).
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from perplexit.runs.run import Run

LENGTHS = (16, 64, 256, 512, 1000, 1500)


def inflation(nll: NDArray[np.float64], length: int) -> float:
    """`length` times the variance of the means of stretches, over the variance of the losses."""
    means = nll[: len(nll) // length * length].reshape(-1, length).mean(axis=1)
    return float(length * means.var(ddof=1) / nll.var(ddof=1))


def largest_correlation(nll: NDArray[np.float64]) -> float:
    """The largest autocorrelation of the losses at any of some lags from 1 to 256."""
    centred = nll - nll.mean()
    products = [(centred[:-lag] * centred[lag:]).mean() for lag in (1, 2, 4, 8, 16, 64, 256)]
    return float(max(products) / nll.var())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, nargs="+")
    for folder in parser.parse_args().run:
        nll = Run.open(folder).tokens.nll.astype(np.float64)
        shown = ", ".join(f"{n}: {inflation(nll, n):.2f}" for n in LENGTHS if len(nll) >= 4 * n)
        print(
            f"{folder}: {len(nll)} tokens; {shown}; "
            f"largest correlation at one lag {largest_correlation(nll):.3f}"
        )


if __name__ == "__main__":
    main()
