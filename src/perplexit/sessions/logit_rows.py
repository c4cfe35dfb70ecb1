"""Rows of logits in, per-token details out, in NumPy: for engines that hand over host arrays.

Shape suffixes: R = rows (one per target), V = vocabulary, K = alternatives per row. The naive
equivalent, in float64:

    logprobs_RV = logits_RV - logsumexp(logits_RV, axis=-1)
    nll_R       = -logprobs_RV[arange(R), ids_R]
    entropy_R   = -(exp(logprobs_RV) * logprobs_RV).sum(-1)
    rank_R      = 1 + (logits_RV > logits_RV[arange(R), ids_R]).sum(-1)
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.inputs.windows import WindowIds
from perplexit.sessions.base import ClosedByWith
from perplexit.token_columns import TokenDetails

_BLOCK_ELEMENTS = 1 << 19  # 2 MiB of float32: both buffers of a block stay in a core's cache


class ScoresByDetails(ClosedByWith, ABC):
    """`token_nll` and `token_details` from one method, so that the two give the same nll."""

    @abstractmethod
    def _details(
        self, windows: Sequence[WindowIds], *, with_details: bool, top_k: int
    ) -> list[TokenDetails]:
        """Return the details of each window; without `with_details` the nll alone is needed."""

    def token_nll(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        """Return the nll of each target; see InferenceSession."""
        return [details.nll_N for details in self._details(windows, with_details=False, top_k=0)]

    def token_details(self, windows: Sequence[WindowIds], *, top_k: int = 0) -> list[TokenDetails]:
        """Return the nll with entropy, rank and alternatives; see DetailedSession."""
        return self._details(windows, with_details=True, top_k=top_k)


def details_of_rows(
    logits_RV: NDArray[np.float32],
    ids_R: NDArray[np.integer[Any]],
    *,
    with_details: bool = True,
    top_k: int = 0,
) -> TokenDetails:
    """Return the details of the token `ids_R[r]` under the distribution of row r.

    Logits are taken as float32. The nll is the same to the last bit with and without details.
    A NaN in a row makes that row's nll NaN; a token at -inf has probability 0.
    """
    rows = max(1, _BLOCK_ELEMENTS // logits_RV.shape[1])
    return TokenDetails.joined(
        [
            _block_details(
                logits_RV[start : start + rows], ids_R[start : start + rows], with_details, top_k
            )
            for start in range(0, max(1, len(ids_R)), rows)
        ]
    )


def _block_details(
    logits_RV: NDArray[np.float32],
    ids_R: NDArray[np.integer[Any]],
    with_details: bool,
    top_k: int,
) -> TokenDetails:
    ids_R1 = np.asarray(ids_R, dtype=np.int64)[:, None]
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and inf go into the result as they are
        shifted_RV = np.subtract(logits_RV, logits_RV.max(-1, keepdims=True), dtype=np.float32)
        odds_RV = np.exp(shifted_RV)
        sum_R = odds_RV.sum(-1)
        log_sum_R = np.log(sum_R)
        own_R1 = np.take_along_axis(shifted_RV, ids_R1, axis=-1)
        nll_R = log_sum_R - own_R1[:, 0]
        columns: dict[str, NDArray[Any]] = {"nll": nll_R}
        if top_k:
            columns |= _most_likely(shifted_RV, log_sum_R, top_k)
        if not with_details:
            return TokenDetails(columns)
        rank_R = 1 + np.count_nonzero(shifted_RV > own_R1, axis=-1)
        terms_RV = np.multiply(odds_RV, shifted_RV, out=shifted_RV)
        terms_RV[odds_RV == 0] = 0.0  # 0 · -inf, whose limit is 0
        entropy_R = log_sum_R - terms_RV.sum(-1) / sum_R
    return TokenDetails({**columns, "entropy": entropy_R, "rank": rank_R.astype(np.int32)})


def _most_likely(
    shifted_RV: NDArray[np.float32], log_sum_R: NDArray[np.float32], top_k: int
) -> dict[str, NDArray[Any]]:
    """Return the columns of the K most likely tokens, most likely first; ties by id."""
    count = min(top_k, shifted_RV.shape[-1])
    # ties at the edge of the K are broken by the partition; within the K by id
    chosen_RK = np.sort(np.argpartition(-shifted_RV, count - 1, axis=-1)[:, :count], axis=-1)
    values_RK = np.take_along_axis(shifted_RV, chosen_RK, axis=-1)
    order_RK = np.argsort(-values_RK, axis=-1, kind="stable")
    ids_RK = np.take_along_axis(chosen_RK, order_RK, axis=-1).astype(np.int32)
    logprobs_RK = np.take_along_axis(values_RK, order_RK, axis=-1) - log_sum_R[:, None]
    return {"top_ids": ids_RK, "top_logprobs": logprobs_RK}


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
