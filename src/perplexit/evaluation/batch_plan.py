"""The batch plan: windows pooled over documents, longest first, in batches that fit into memory.

"Place" means a window's index in the plan's order, not its row in the window table.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.inputs.token_file import TokenFile
from perplexit.sessions.base import InferenceSession


@dataclass(frozen=True, slots=True)
class BatchLimit:
    """How large batches are from place `start` on; one window is always allowed.

    max_windows: windows a batch; max_ids: ids fed forward a batch, padding included.
    """

    start: int
    max_windows: int
    max_ids: int | None = None

    def halved(self, start: int, num_windows: int) -> "BatchLimit":
        """The limit after a batch of `num_windows` at `start` did not fit."""
        return BatchLimit(start, max(1, num_windows // 2), self.max_ids and self.max_ids // 2)


@dataclass(frozen=True)
class BatchPlan:
    """Which windows go together: frozen at the start of a run, so that a resumed run repeats it.

    A batch's composition can change the last bits of its results; the same plan on the same
    machine gives the same bits. `limits` grows only when an engine runs out of memory.
    """

    limits: tuple[BatchLimit, ...]
    order: str = "longest-first"

    def to_json(self) -> dict[str, Any]:
        """The plan as `run.json` holds it."""
        return {
            "order": self.order,
            "limits": [
                {"start": x.start, "max_windows": x.max_windows, "max_ids": x.max_ids}
                for x in self.limits
            ],
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "BatchPlan":
        """The plan that `to_json` described."""
        return cls(tuple(BatchLimit(**limit) for limit in record["limits"]), record["order"])

    def batch_stop(self, start: int, lengths: NDArray[np.int64]) -> int:
        """Where the batch that begins at place `start` ends. `lengths` are in plan order."""
        limit = [x for x in self.limits if x.start <= start][-1]
        next_change = min((x.start for x in self.limits if x.start > start), default=len(lengths))
        size = limit.max_windows
        if limit.max_ids is not None:  # longest first: the first window sets the padded length
            size = min(size, max(1, limit.max_ids // max(1, int(lengths[start]))))
        return min(start + size, next_change, len(lengths))


def plan_batches(
    session: InferenceSession, tokens: TokenFile, batch_size: int | None = None
) -> BatchPlan:
    """The plan for a new run: `batch_size` windows a batch, or what the session's memory allows."""
    if batch_size is not None:
        return BatchPlan((BatchLimit(0, batch_size),))
    longest = int(tokens.fed_lengths().max(initial=1))
    size = max(1, session.max_batch_size(longest))
    return BatchPlan((BatchLimit(0, max_windows=4096, max_ids=size * longest),))


def longest_first(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of the window table, longest window first, ties in table order."""
    return np.argsort(-lengths, kind="stable")
