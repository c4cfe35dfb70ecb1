"""Windows: what one forward pass sees, and which of its tokens are scored.

The generators are pure: document lengths in, the window table out. Each works on many documents
at once, so that millions of windows cost milliseconds; the tests hold them to a dull loop.

Shape suffixes: T = ids fed forward in one window, N = scored tokens (targets) of one window,
D = documents, W = windows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

WindowArray = NDArray[np.int64]  # [W, 7], the columns of COLUMNS
BosPolicy = Literal["none", "first", "every"]


class PrefixMode(IntEnum):
    """How a window's prefix token (a BOS) enters the ids that are fed forward."""

    NONE = 0
    INSERT = 1  # [prefix_id] + ids[start:stop]
    OVERWRITE = 2  # [prefix_id] + ids[start + 1 : stop]


class Window(NamedTuple):
    """One row of the window table, in token indices of its document (half-open ranges).

    The tokens `target_start … target_stop - 1` are scored; those before are context.
    """

    document: int
    start: int
    stop: int
    target_start: int
    target_stop: int
    prefix_mode: PrefixMode = PrefixMode.NONE
    prefix_id: int = -1


COLUMNS = Window._fields


@dataclass(frozen=True, slots=True)
class WindowIds:
    """One window as an engine is fed it: ids, and the positions in them that are scored.

    index:     row of the window table.
    ids_T:     int32, the ids fed forward, the prefix and the last target included.
    targets_N: int64, strictly increasing positions in `ids_T`, each at least 1; the loss of
               target n is -log p(ids_T[targets_N[n]] | ids_T[:targets_N[n]]).
    """

    index: int
    ids_T: NDArray[np.int32]
    targets_N: NDArray[np.int64]


class WindowTable:
    """The window table, one row per window: read by row, or by column (int64 [W] each).

    `array` is int64 [W, 7]; the columns are those of COLUMNS. prefix_id is -1 without a prefix.
    """

    def __init__(self, array: WindowArray) -> None:
        self.array = array
        self.document, self.start, self.stop = array.T[:3]
        self.target_start, self.target_stop, self.prefix_mode, self.prefix_id = array.T[3:]

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> Window:
        row = Window(*self.array[index].tolist())
        return row._replace(prefix_mode=PrefixMode(row.prefix_mode))

    def __iter__(self) -> Iterator[Window]:
        return (self[index] for index in range(len(self)))

    def fed_lengths(self) -> NDArray[np.int64]:
        """Return how many ids each window feeds forward, the prefix included: int64 [W]."""
        lengths_W: NDArray[np.int64] = (
            self.stop - self.start + (self.prefix_mode == PrefixMode.INSERT)
        )
        return lengths_W


def sliding_windows(
    lengths_D: ArrayLike, *, max_length: int, stride: int, bos: BosPolicy = "none", bos_id: int = -1
) -> WindowArray:
    """Cut windows that advance by `stride`; each target is scored exactly once: [W, 7].

    A window needs one id of context, so the advance is `min(stride, max_length - 1)`. Window k
    starts at k · advance and scores what window k - 1 did not reach; the last one is shifted left
    to end at the document's end and be full-length where the document allows.
    """
    room, first_target, extended_D = window_frame(lengths_D, max_length, bos)
    advance = min(stride, max_length - 1)
    overhang_D = np.maximum(extended_D - room, 0)
    counts_D = np.where(extended_D > first_target, 1 - (-overhang_D // advance), 0)
    document_W, ordinal_W = spread_windows(counts_D)
    reach_W = ordinal_W * advance + room
    start_W = np.minimum(ordinal_W * advance, overhang_D[document_W])
    stop_W = np.minimum(reach_W, extended_D[document_W])
    target_W = np.where(ordinal_W == 0, first_target, reach_W - advance)
    return cut_windows(document_W, start_W, stop_W, target_W, bos=bos, bos_id=bos_id)


def disjoint_windows(
    lengths_D: ArrayLike,
    *,
    max_length: int,
    bos: BosPolicy = "none",
    bos_id: int = -1,
    keep_tail: bool = True,
) -> WindowArray:
    """Cut consecutive chunks of `max_length` fed ids: [W, 7].

    The first id of a chunk is its context and is not scored, unless a BOS stands before it. A tail
    is kept where at least one of its ids can be scored (not at all where `keep_tail` is false).
    """
    room, first_target, extended_D = window_frame(lengths_D, max_length, bos)
    whole_D, tail_D = np.divmod(extended_D, room)
    counts_D = whole_D + (tail_D > first_target) if keep_tail else whole_D
    document_W, ordinal_W = spread_windows(counts_D)
    start_W = ordinal_W * room
    stop_W = np.minimum(start_W + room, extended_D[document_W])
    return cut_windows(document_W, start_W, stop_W, start_W + first_target, bos=bos, bos_id=bos_id)


def document_windows(
    lengths_D: ArrayLike, *, bos: BosPolicy = "none", bos_id: int = -1
) -> WindowArray:
    """Cut one window per document, however long, where it has a target: [W, 7]."""
    # `every` and `first` are one thing here: the one window has the one BOS.
    policy: BosPolicy = "none" if bos == "none" else "first"
    extended_D = extended_lengths(lengths_D, policy)
    document_W = np.flatnonzero(extended_D > 1)
    start_W = np.zeros_like(document_W)
    return cut_windows(
        document_W, start_W, extended_D[document_W], start_W + 1, bos=policy, bos_id=bos_id
    )


def extended_lengths(lengths_D: ArrayLike, bos: BosPolicy) -> NDArray[np.int64]:
    """Return the length of each sequence that windows are cut from: int64 [D].

    Under `first` the sequence is [BOS] + ids, and windows are cut from it as from any other.
    """
    lengths = np.asarray(lengths_D, dtype=np.int64)
    return np.where(lengths > 0, lengths + (bos == "first"), 0)


def window_frame(
    lengths_D: ArrayLike, max_length: int, bos: BosPolicy
) -> tuple[int, int, NDArray[np.int64]]:
    """Return (room for a sequence's ids in a window, first scorable index, sequence lengths)."""
    room, first_target = (max_length - 1, 0) if bos == "every" else (max_length, 1)
    return room, first_target, extended_lengths(lengths_D, bos)


def spread_windows(counts_D: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (document of each window, its ordinal within the document), both int64 [W]."""
    document_W = np.repeat(np.arange(len(counts_D), dtype=np.int64), counts_D)
    before_D = np.cumsum(counts_D) - counts_D
    return document_W, np.arange(len(document_W), dtype=np.int64) - before_D[document_W]


def cut_windows(
    document_W: NDArray[np.int64],
    start_W: NDArray[np.int64],
    stop_W: NDArray[np.int64],
    target_W: NDArray[np.int64],
    *,
    bos: BosPolicy,
    bos_id: int,
) -> WindowArray:
    """Make the window table from ranges in the (extended) sequences: [W, 7]."""
    shift = int(bos == "first")
    prefixed_W = start_W == 0 if shift else np.full(len(start_W), bos == "every")
    table = np.empty((len(document_W), len(COLUMNS)), dtype=np.int64)
    table[:, 0] = document_W
    table[:, 1] = np.maximum(start_W - shift, 0)
    table[:, 2] = stop_W - shift
    table[:, 3] = target_W - shift
    table[:, 4] = stop_W - shift
    table[:, 5] = np.where(prefixed_W, PrefixMode.INSERT, PrefixMode.NONE)
    table[:, 6] = np.where(prefixed_W, bos_id, -1)
    return table


def balanced_parts(lengths: Sequence[int], *, workers: int, most_ids: int) -> list[range]:
    """Divide windows among workers into runs of about equal numbers of ids, in order.

    lengths: the windows' ids, longest first. There are as many parts as workers, or a multiple, so
    that all have something to do until the end; fewer where windows are fewer. A part holds about
    `most_ids` ids at most, or a single window.
    """
    ids = np.asarray(lengths, np.int64)
    if not len(ids):
        return []
    rounds = -(-int(ids.sum()) // (workers * most_ids))
    count = min(len(ids), rounds * workers)
    middles = np.cumsum(ids) - ids / 2
    part_of = np.minimum(middles * count // ids.sum(), count - 1).astype(np.int64)
    stops = np.searchsorted(part_of, np.arange(count), side="right").tolist()
    starts = [0, *stops[:-1]]
    return [range(a, b) for a, b in zip(starts, stops, strict=True) if a < b]
