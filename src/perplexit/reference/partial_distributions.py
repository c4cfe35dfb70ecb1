"""References of which a part is known: the K most likely tokens and a tail, or a clamped file.

Shape suffixes: N = targets of one window, K = alternatives per target, V = vocabulary.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from perplexit.errors import UsageError, VocabularyError
from perplexit.functional.divergence import PartialDistributions
from perplexit.inputs.kl_base_file import KlBaseFile
from perplexit.inputs.windows import WindowIds
from perplexit.runs.run import Run

CHUNKS_FOR_FLOOR = 8


class PartialReference(Protocol):
    """Gives what is known of the reference's distributions for targets that are being scored."""

    def begin(self, windows: Sequence[WindowIds]) -> None:
        """Prepare for a batch of windows, which will be asked for in order."""

    def partial_rows(
        self, place: int, start: int, stop: int, vocab_size: int
    ) -> PartialDistributions:
        """Return of targets `start … stop - 1` of window `place` of the batch.

        Raises VocabularyError where the reference's vocabulary is not of this size.
        """


class TopKReference:
    """The alternatives that a run recorded (`eval --top-k K`), and the target's own probability."""

    def __init__(self, run: Run) -> None:
        rows = run.tokens
        if rows.top_ids is None or rows.top_logprobs is None:
            raise UsageError(
                "expected a reference run with alternatives; evaluate it with --top-k 20"
            )
        self._rows = rows
        self.num_alternatives = int(rows.top_ids.shape[1])
        self._ids_RK, self._logprobs_RK = rows.top_ids, rows.top_logprobs
        self._windows: Sequence[WindowIds] = ()

    def begin(self, windows: Sequence[WindowIds]) -> None:
        """Remember which windows are asked for."""
        self._windows = windows

    def partial_rows(
        self, place: int, start: int, stop: int, vocab_size: int
    ) -> PartialDistributions:
        """Return the recorded alternatives as log-probabilities over the vocabulary."""
        first = int(np.searchsorted(self._rows.window, self._windows[place].index))
        rows = slice(first + start, first + stop)
        ids_NK = torch.from_numpy(self._ids_RK[rows].astype(np.int64))
        logprobs_NK = torch.from_numpy(self._logprobs_RK[rows].astype(np.float64))
        targets_N1 = torch.from_numpy(self._rows.token_id[rows].astype(np.int64))[:, None]
        own_N1 = -torch.from_numpy(self._rows.nll[rows].astype(np.float64))[:, None]
        largest = int(ids_NK.max().item()) if ids_NK.numel() else 0
        if largest >= vocab_size:
            raise VocabularyError(
                f"expected alternatives below the candidate's vocabulary of {vocab_size}, got "
                f"{largest} in the reference; a KL divergence between the two does not exist"
            )
        logp_NV = torch.full((len(ids_NK), vocab_size), -torch.inf, dtype=torch.float64)
        logp_NV.scatter_(1, targets_N1, own_N1)
        logp_NV.scatter_(1, ids_NK, logprobs_NK)
        return PartialDistributions(
            logp_NV=logp_NV,
            tail_N=(1 - logp_NV.exp().sum(-1)).clamp(min=0),
            cap_N=logprobs_NK.min(-1).values.exp(),
            num_known=self.num_alternatives,
        )


class KlBaseReference:
    """The distributions of llama.cpp's base file."""

    def __init__(self, file: KlBaseFile) -> None:
        self._file = file
        self._windows: Sequence[WindowIds] = ()

    def begin(self, windows: Sequence[WindowIds]) -> None:
        """Remember which windows are asked for."""
        self._windows = windows

    def partial_rows(
        self, place: int, start: int, stop: int, vocab_size: int
    ) -> PartialDistributions:
        """Return the rows of the file; the tokens that it clamped are the tail."""
        if vocab_size != self._file.vocab_size:
            raise VocabularyError(
                f"expected two distributions over one vocabulary, got {self._file.vocab_size} "
                f"entries in {self._file.path} and {vocab_size} in the candidate; "
                "a KL divergence between them does not exist"
            )
        rows = self._file.rows(self._windows[place].index, start, stop)
        known_N = np.isfinite(rows.logp_NV).sum(axis=-1)
        return PartialDistributions(
            logp_NV=torch.from_numpy(rows.logp_NV),
            tail_N=torch.from_numpy(rows.tail_N),
            cap_N=torch.from_numpy(rows.cap_N),
            num_known=int(known_N.min(initial=self._file.vocab_size)),
        )


def floor_of_file(file: KlBaseFile) -> tuple[float, float]:
    """Return (mean, largest) nats per token that the file's rounding can make of a KL with itself.

    From up to 8 chunks, spread evenly over the file.
    """
    count = min(CHUNKS_FOR_FLOOR, file.num_chunks)
    chunks = np.linspace(0, file.num_chunks - 1, count).astype(int).tolist()
    floor = np.concatenate([file.rows(chunk, 0, file.num_targets).floor() for chunk in chunks])
    return float(floor.mean()), float(floor.max())
