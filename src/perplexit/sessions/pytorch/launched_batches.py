"""Windows launched on a device, and their results collected once they have arrived.

On CUDA a launch queues copies, layers and head, and returns; the next one may be launched before
the first is collected, so that the device never waits for the host's statistics.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from perplexit.checkpoints.length_dependent_rope import LengthDependentRope, held_at
from perplexit.functional.linear_nll import statistics_of_hidden_states
from perplexit.inputs.windows import WindowIds
from perplexit.sessions.pytorch.batch import PaddedBatch, batches_of
from perplexit.sessions.pytorch.cpu_kernels.window_threads import WindowThreads
from perplexit.sessions.pytorch.cuda import ComingStatistics, to_host
from perplexit.sessions.pytorch.forward import ForwardPass
from perplexit.token_columns import TokenDetails

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a session scores: its forward pass, its device, and what is asked of it.

    threads: that score windows side by side; None where all threads work inside the products.
    rope: the model's rotary embeddings where they depend on a window's length.
    """

    forward: ForwardPass
    device: torch.device
    chunk_rows: int
    with_details: bool
    top_k: int
    threads: WindowThreads | None = None
    rope: LengthDependentRope | None = None


@dataclass(frozen=True, slots=True)
class Launched:
    """A batch on its way; its parts are batches that could be padded together."""

    parts: tuple[tuple[list[int], tuple[int, ...], ComingStatistics], ...]
    results: list[TokenDetails]

    def collect(self) -> list[TokenDetails]:
        """One record a window, once everything has arrived."""
        for places, counts, coming in self.parts:
            details = coming.wait().to_numpy().split(counts)
            for place, record in zip(places, details, strict=True):
                self.results[place] = record
        return self.results


def launch(windows: Sequence[WindowIds], scoring: Scoring, num_logits: int) -> Launched:
    """The windows' results on their way; windows without targets have theirs."""
    k = min(scoring.top_k, num_logits)
    empty = TokenDetails.empty(with_details=scoring.with_details, num_alternatives=k)
    parts = by_parts(
        windows,
        lambda places: (places, *_part([windows[place] for place in places], scoring)),
        scoring,
    )
    return Launched(tuple(parts), [empty] * len(windows))


def by_parts(
    windows: Sequence[WindowIds],
    work: Callable[[list[int]], _T],
    scoring: Scoring,
) -> list[_T]:
    """What `work` gives for the places of windows that run together; see `batches_of`."""
    batches = batches_of(
        windows, padded=scoring.forward.takes_mask, alone=scoring.forward.alone, rope=scoring.rope
    )
    threads = scoring.threads
    if threads is None:
        return [work(places) for places in batches]
    return threads.map(work, [part for batch in batches for part in threads.split(batch, windows)])


def target_rows(windows: Sequence[WindowIds], scoring: Scoring) -> tuple[PaddedBatch, Tensor]:
    """The windows as one batch, and what the head is given for each of its targets, NX."""
    batch = PaddedBatch.of(windows, scoring.device, whole=scoring.forward.alone)
    with held_at(scoring.rope, max(len(window.ids_T) for window in windows)):
        rows_BTX = scoring.forward.rows(batch.ids_BT, batch.mask_BT)
    return batch, rows_BTX[batch.rows_N, batch.positions_N]


def _part(
    windows: Sequence[WindowIds], scoring: Scoring
) -> tuple[tuple[int, ...], ComingStatistics]:
    batch, rows_NX = target_rows(windows, scoring)
    statistics = statistics_of_hidden_states(
        rows_NX,
        batch.targets_N,
        scoring.forward.head,
        chunk_rows=scoring.chunk_rows,
        with_details=scoring.with_details,
        top_k=scoring.top_k,
    )
    return batch.counts, to_host(statistics)
