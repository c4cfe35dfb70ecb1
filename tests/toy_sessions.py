"""Toy sessions in NumPy with answers that can be computed by hand, for tests of everything else."""

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import EngineOutOfMemoryError
from perplexit.inputs.windows import WindowIds
from perplexit.session_descriptions import ModelDescription, SessionDescription
from perplexit.token_columns import TokenDetails


class BigramSession:
    """p(next | last id): a fixed random matrix, so every nll is a table look-up.

    memory_ids: more ids than this in a batch (padding included) "run out of memory", once
        `memory_from_batch` batches are through.
    seconds_per_batch: how long a batch takes. bad_token: an id whose loss is NaN.
    """

    def __init__(
        self,
        vocab_size: int = 400,
        *,
        seed: int = 0,
        memory_ids: int | None = None,
        memory_from_batch: int = 0,
        seconds_per_batch: float = 0.0,
        bad_token: int | None = None,
        details: bool = True,
    ) -> None:
        logits_VV = np.random.default_rng(seed).normal(0, 2, (vocab_size, vocab_size))
        self.logprobs_VV = logits_VV - np.log(np.exp(logits_VV).sum(axis=1, keepdims=True))
        self.memory_ids = memory_ids
        self.memory_from_batch = memory_from_batch
        self.seconds_per_batch = seconds_per_batch
        self.bad_token = bad_token
        self.batches: list[list[int]] = []
        self.closed = False
        self.model = ModelDescription("toy:bigram", "Bigram", vocab_size**2, f"w{seed}", vocab_size)
        self.description = SessionDescription("toy", "1", "float64", "cpu", threads=1)
        if details:
            self.token_details = self._token_details

    def token_nll(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        longest = max(len(window.ids_T) for window in windows)
        limited = self.memory_ids is not None and len(self.batches) >= self.memory_from_batch
        if limited and len(windows) * longest > self.memory_ids:
            raise EngineOutOfMemoryError(f"{len(windows)} windows of {longest}")
        self.batches.append([window.index for window in windows])
        time.sleep(self.seconds_per_batch)
        return [self._nll(window) for window in windows]

    def _nll(self, window: WindowIds) -> NDArray[np.float32]:
        before, after = window.ids_T[window.targets_N - 1], window.ids_T[window.targets_N]
        nll_N = -self.logprobs_VV[before, after]
        if self.bad_token is not None:
            nll_N[after == self.bad_token] = np.nan
        return nll_N.astype(np.float32)

    def _token_details(self, windows: Sequence[WindowIds], *, top_k: int = 0) -> list[TokenDetails]:
        details = []
        for window, nll_N in zip(windows, self.token_nll(windows), strict=True):
            rows_NV = self.logprobs_VV[window.ids_T[window.targets_N - 1]]
            target_N1 = rows_NV[np.arange(len(nll_N)), window.ids_T[window.targets_N]][:, None]
            order_NK = np.argsort(-rows_NV, axis=1)[:, :top_k]
            details.append(
                TokenDetails(
                    {
                        "nll": nll_N,
                        "entropy": -(np.exp(rows_NV) * rows_NV).sum(axis=1).astype(np.float32),
                        "rank": ((rows_NV > target_N1).sum(axis=1) + 1).astype(np.int32),
                        "top_ids": order_NK.astype(np.int32) if top_k else None,
                        "top_logprobs": (
                            np.take_along_axis(rows_NV, order_NK, axis=1).astype(np.float32)
                            if top_k
                            else None
                        ),
                    }
                )
            )
        return details

    def max_batch_size(self, window_length: int) -> int:
        return 4

    def close(self) -> None:
        self.closed = True
