"""Windows through a forward pass as padded batches, and their results once they have arrived.

On CUDA a launch queues copies, layers and head, and returns; the next one may be launched before
the first is collected, so that the device never waits for the host's statistics.

Shape suffixes: N = targets of a batch, X = what the head is given for one of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perplexit.checkpoints.length_dependent_rope import LengthDependentRope, held_at
from perplexit.functional.nll import HeadRequest, TokenStatistics, head_statistics
from perplexit.inputs.windows import WindowIds
from perplexit.sessions.pytorch.batch import PaddedBatch, batches_of
from perplexit.sessions.pytorch.cpu_kernels.window_threads import WindowThreads
from perplexit.sessions.pytorch.cuda import to_host
from perplexit.sessions.pytorch.forward import ForwardPass
from perplexit.token_columns import TokenDetails

# What was padded together: places of windows, their counts of targets, what waits for the results.
_Coming = tuple[list[int], Sequence[int], Callable[[], TokenStatistics]]


@dataclass(frozen=True, slots=True)
class WindowBatches:
    """Runs windows through a forward pass and its head.

    chunk_rows: rows of logits that the head makes at a time.
    threads:    which score windows side by side; None: all threads work inside the products.
    rope:       the model's rotary embeddings, where they depend on a window's length.
    """

    forward: ForwardPass
    device: torch.device
    chunk_rows: int
    num_logits: int
    threads: WindowThreads | None = None
    rope: LengthDependentRope | None = None

    def launch(
        self, windows: Sequence[WindowIds], with_details: bool, top_k: int
    ) -> Callable[[], list[TokenDetails]]:
        """Start to score the windows; return what waits for the results of each, to be called once.

        A window without targets has an empty result.
        """
        statistics_of = head_statistics(self.forward.head)

        def score(places: list[int]) -> _Coming:
            batch, rows_NX = self._rows([windows[place] for place in places])
            statistics = statistics_of(
                rows_NX,
                batch.targets_N,
                HeadRequest(self.chunk_rows, with_details, top_k),
            )
            return places, batch.counts, to_host(statistics)

        empty = TokenDetails.empty(
            with_details=with_details, num_alternatives=min(top_k, self.num_logits)
        )
        run = map if self.threads is None else self.threads.map
        parts, results = list(run(score, self._parts(windows))), [empty] * len(windows)

        def collect() -> list[TokenDetails]:
            for places, counts, wait in parts:
                for place, details in zip(places, wait().to_numpy().split(counts), strict=True):
                    results[place] = details
            return results

        return collect

    def target_rows(self, windows: Sequence[WindowIds]) -> list[Tensor]:
        """Return what the head is given for each target, window by window, each (N, X)."""
        results = [torch.empty(0, 0)] * len(windows)

        def gather(places: list[int]) -> None:
            batch, rows_NX = self._rows([windows[place] for place in places])
            for place, rows in zip(places, torch.split(rows_NX, list(batch.counts)), strict=True):
                results[place] = rows

        run = map if self.threads is None else self.threads.map
        list(run(gather, self._parts(windows)))
        return results

    def _parts(self, windows: Sequence[WindowIds]) -> list[list[int]]:
        batches = batches_of(
            windows, padded=self.forward.takes_mask, alone=self.forward.alone, rope=self.rope
        )
        if self.threads is None:
            return batches
        return [part for batch in batches for part in self.threads.split(batch, windows)]

    def _rows(self, windows: Sequence[WindowIds]) -> tuple[PaddedBatch, Tensor]:
        batch = PaddedBatch.of(windows, self.device, whole=self.forward.alone)
        with held_at(self.rope, max(len(window.ids_T) for window in windows)):
            rows_BTX = self.forward.rows(batch.ids_BT, batch.mask_BT)
        return batch, rows_BTX[batch.rows_N, batch.positions_N]
