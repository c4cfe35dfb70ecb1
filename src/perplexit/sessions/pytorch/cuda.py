"""CUDA's own matters: copies that nobody waits for, chunk sizes, and peaks of device memory.

Everything works on the CPU too, where copies are plain and peaks None.
"""

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from perplexit.functional.nll import DEFAULT_LOGITS_BYTES, TokenStatistics, rows_within
from perplexit.resources.memory_tracker import CUDA_PEAKS
from perplexit.sessions.pytorch.device_choice import total_bytes

_MOST_CUDA_LOGITS_BYTES = 256 * 2**20  # some 500 rows at V = 128k: enough to fill the card
_SHARE_OF_MEMORY = 128
_ROWS_A_TILE = 64


def chunk_rows_for(device: torch.device, num_logits: int, max_logits_bytes: int | None) -> int:
    """Return how many rows of logits to make at a time: `max_logits_bytes` of float32 ones.

    None: 64 MiB on the CPU; on CUDA a 128th of the device's memory, from 64 to 256 MiB, since a
    product of fewer rows is bound by reading the head's weights; whole tiles of rows. Not of the
    free memory: a resumed run must find the same.
    """
    if max_logits_bytes is not None:
        return rows_within(max_logits_bytes, num_logits)
    if device.type != "cuda":
        return rows_within(DEFAULT_LOGITS_BYTES, num_logits)
    budget = total_bytes(device) // _SHARE_OF_MEMORY
    budget = min(max(budget, DEFAULT_LOGITS_BYTES), _MOST_CUDA_LOGITS_BYTES)
    rows = rows_within(budget, num_logits)
    return max(1, rows - rows % _ROWS_A_TILE) if rows > _ROWS_A_TILE else rows


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copy the array to the device; to CUDA from pinned memory, queued behind the work there."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    # torch keeps pinned memory that a queued copy still reads, even when nobody else holds it.
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(statistics: TokenStatistics) -> Callable[[], TokenStatistics]:
    """Start to copy the statistics to the host; return what waits for them.

    From CUDA, the copy is queued into pinned memory, with an event behind it.
    """
    if statistics.nll_N.device.type != "cuda":
        host = statistics.each(Tensor.cpu)
        return lambda: host
    host = statistics.each(_into_pinned)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(statistics.nll_N.device))

    def wait() -> TokenStatistics:
        event.synchronize()
        return host

    return wait


def _into_pinned(column: Tensor) -> Tensor:
    host = torch.empty(column.shape, dtype=column.dtype, pin_memory=True)
    return host.copy_(column, non_blocking=True)


class DeviceMemory:
    """Peaks of torch's CUDA allocator from a session's loading on; None on other devices."""

    def __init__(self, device: torch.device) -> None:
        self._stretch = CUDA_PEAKS.open() if device.type == "cuda" else None

    def peak_bytes(self) -> int | None:
        """Return the most that was held, in bytes, summed over devices."""
        if self._stretch is None:
            return None
        CUDA_PEAKS.fold()
        return self._stretch.peak_bytes

    def peak_beyond_weights(self) -> int | None:
        """Return the most that was held beyond what was there once the model had been loaded."""
        peak = self.peak_bytes()
        return None if peak is None or self._stretch is None else peak - self._stretch.start_bytes

    def close(self) -> None:
        """Stop to measure; the peaks stay."""
        if self._stretch is not None:
            CUDA_PEAKS.close(self._stretch)
