"""How far the losses of real text are from independent: what the intervals' blocks must hold.

For stretches of n consecutive tokens, prints n · variance of their means / variance of the losses:
1 for independent tokens; where it stops to grow, a stretch holds what varies together. Also the
largest autocorrelation. The arguments are runs' folders (`perplexit eval … --run FOLDER`).
"""

from pathlib import Path

import numpy as np
import typer
from numpy.typing import NDArray

import perplexit as px

LENGTHS = (16, 64, 256, 512, 1000, 1500)


def inflation(nll: NDArray[np.float64], length: int) -> float:
    """Return `length` · variance of the means of stretches / variance of the losses."""
    means = nll[: len(nll) // length * length].reshape(-1, length).mean(axis=1)
    return float(length * means.var(ddof=1) / nll.var(ddof=1))


def largest_correlation(nll: NDArray[np.float64]) -> float:
    """Return the largest autocorrelation of the losses at any of some lags from 1 to 256."""
    centred = nll - nll.mean()
    products = [(centred[:-lag] * centred[lag:]).mean() for lag in (1, 2, 4, 8, 16, 64, 256)]
    return float(max(products) / nll.var())


def main(runs: list[Path]) -> None:
    """Print the drift of the losses of each run's folder."""
    for folder in runs:
        nll = px.Run.open(folder).tokens.nll.astype(np.float64)
        shown = ", ".join(f"{n}: {inflation(nll, n):.2f}" for n in LENGTHS if len(nll) >= 4 * n)
        largest = largest_correlation(nll)
        print(f"{folder}: {len(nll)} tokens; {shown}; largest correlation at one lag {largest:.3f}")


if __name__ == "__main__":
    typer.run(main)
