"""The K most likely tokens of each target, as an engine or a file lists them: ordered and checked.

Shape suffixes: N = targets, K = alternatives a target.
"""

import numpy as np
from numpy.typing import NDArray


def most_likely_first(
    ids_NK: NDArray[np.int64], logprobs_NK: NDArray[np.float64], top_k: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return (ids, log-probabilities) of the `top_k` most likely of each row, in that order."""
    order_NK = np.argsort(-logprobs_NK, axis=1, kind="stable")[:, :top_k]
    return (
        np.take_along_axis(ids_NK, order_NK, axis=1).astype(np.int32),
        np.take_along_axis(logprobs_NK, order_NK, axis=1).astype(np.float32),
    )


def contradiction(
    targets_N: NDArray[np.int64],
    logprobs_N: NDArray[np.float64],
    alternatives: tuple[NDArray[np.int32], NDArray[np.float32]],
    *,
    slack: float,
) -> tuple[int, str] | None:
    """Return (the first target at which alternatives cannot be of its distribution, why), or None.

    A target among them has its own log-probability there, one that is not is no likelier than the
    least of them, no id is listed twice, and their probabilities add up to 1 at most. So
    alternatives of another position are found. slack: nats that rounding may account for.
    """
    ids_NK, top_NK = alternatives
    is_own_NK = ids_NK == targets_N[:, None]
    listed_N = np.where(is_own_NK, top_NK, -np.inf).max(axis=1)
    with np.errstate(invalid="ignore"):
        problems = {
            "an alternative without a number": np.isnan(top_NK).any(axis=1),
            "an id twice": (np.diff(np.sort(ids_NK, axis=1), axis=1) == 0).any(axis=1),
            "probabilities that add up to more than 1": (
                np.exp(top_NK.astype(np.float64)).sum(axis=1) > 1 + slack
            ),
            "the target with another log-probability than its own": (
                is_own_NK.any(axis=1) & ~(np.abs(listed_N - logprobs_N) <= slack)
            ),
            "less likely tokens than the target, which is not among them": (
                ~is_own_NK.any(axis=1) & (logprobs_N > top_NK.min(axis=1) + slack)
            ),
        }
    for problem, found_N in problems.items():
        if found_N.any():
            return int(np.flatnonzero(found_N)[0]), problem
    return None
