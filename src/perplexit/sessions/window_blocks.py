"""Windows side by side at equal positions, for a cache: what to feed, and whose targets follow.

Shape suffixes: B = windows, T = ids of a window, M = targets of all windows, N = those of a call.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perplexit.inputs.windows import WindowIds
from perplexit.sessions.base import FedRows, KeyValueCache

# What the model made of the picked places, the slots of their targets, the targets' ids.
Take = Callable[[FedRows, NDArray[np.int64], NDArray[np.int64]], None]


@dataclass(frozen=True, slots=True)
class WindowBlock:
    """Windows that share a cache, longest first, and where each target's result belongs.

    places: of the windows in the call. lengths_B: ids to feed, those before the last target.
    ids_BT: padded on the right with each window's own last id.
    row_M, column_M: where the prediction of each target stands, by column and then by row.
    id_M: the target's id. slot_M: its index among the targets of all windows of the call.
    """

    places: list[int]
    lengths_B: NDArray[np.int64]
    ids_BT: NDArray[np.int64]
    row_M: NDArray[np.int64]
    column_M: NDArray[np.int64]
    id_M: NDArray[np.int64]
    slot_M: NDArray[np.int64]

    def feed(self, cache: KeyValueCache, rows: slice, columns: slice, take: Take) -> None:
        """Feed a rectangle of the ids and hand over what precedes its targets."""
        first, last = np.searchsorted(self.column_M, [columns.start, columns.stop])
        row_N = self.row_M[first:last]
        inside = np.flatnonzero((row_N >= rows.start) & (row_N < rows.stop)) + first
        picked = self.row_M[inside] - rows.start, self.column_M[inside] - columns.start
        fed = cache.feed(
            np.ascontiguousarray(self.ids_BT[rows, columns]),
            first_row=rows.start,
            start=columns.start,
            picked=picked,
        )
        if len(inside):
            take(fed, self.slot_M[inside], self.id_M[inside])


def window_blocks(windows: Sequence[WindowIds], cache_rows: int | None) -> Iterator[WindowBlock]:
    """Return the windows with targets, longest first, as many a block as one cache holds."""
    counts = np.array([len(window.targets_N) for window in windows], dtype=np.int64)
    first_slots = np.cumsum(counts) - counts
    lengths = np.array(
        [int(window.targets_N[-1]) if n else 0 for window, n in zip(windows, counts, strict=True)]
    )
    order = [int(place) for place in np.argsort(-lengths, kind="stable") if counts[place]]
    size = cache_rows or max(1, len(order))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        yield _block_of(windows, places, lengths[places], first_slots)


def _block_of(
    windows: Sequence[WindowIds],
    places: list[int],
    lengths_B: NDArray[np.int64],
    first_slots: NDArray[np.int64],
) -> WindowBlock:
    ids_BT = np.empty((len(places), int(lengths_B[0])), dtype=np.int64)
    for row_T, place, length in zip(ids_BT, places, lengths_B, strict=True):
        row_T[:length] = windows[place].ids_T[:length]
        row_T[length:] = windows[place].ids_T[length - 1]
    counts = [len(windows[place].targets_N) for place in places]
    row_M = np.repeat(np.arange(len(places)), counts)
    column_M = np.concatenate([windows[place].targets_N for place in places]) - 1
    id_M = np.concatenate([windows[place].ids_T[windows[place].targets_N] for place in places])
    slot_M = np.concatenate(
        [first_slots[p] + np.arange(n) for p, n in zip(places, counts, strict=True)]
    )
    order_M = np.lexsort((row_M, column_M))
    return WindowBlock(
        places,
        lengths_B,
        ids_BT,
        row_M[order_M],
        column_M[order_M],
        id_M[order_M].astype(np.int64),
        slot_M[order_M],
    )
