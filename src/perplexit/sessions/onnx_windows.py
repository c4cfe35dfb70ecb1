"""Windows as one padded batch for an ONNX program, and its results window by window.

Shape suffixes: B = windows, T = ids a window (padded), N = targets, V = vocabulary.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import CapabilityError, VocabularyError
from perplexit.inputs.windows import WindowIds
from perplexit.programs import ProgramShapes


def padded_windows(
    windows: Sequence[WindowIds], shapes: ProgramShapes, program: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Right-padded ids (each row with its own last id) and the mask that hides the padding.

    Raises CapabilityError for a window longer than the program's fixed length.
    """
    longest = max(len(window.ids_T) for window in windows)
    if shapes.length is not None and longest > shapes.length:
        raise CapabilityError(
            f"{program} was compiled for windows of {shapes.length} ids, got one "
            f"of {longest}; prepare the input with --max-length {shapes.length}, or compile "
            "the program for longer ones"
        )
    num_rows = shapes.batch_size or len(windows)
    ids_BT = np.empty((num_rows, shapes.length or longest), np.int64)
    mask_BT = np.zeros_like(ids_BT)
    for row, window in enumerate(windows):
        fed = len(window.ids_T)
        ids_BT[row, :fed], ids_BT[row, fed:] = window.ids_T, window.ids_T[-1]
        mask_BT[row, :fed] = 1
    ids_BT[len(windows) :], mask_BT[len(windows) :] = ids_BT[0], mask_BT[0]
    return ids_BT, mask_BT


def fed_targets(
    windows: Sequence[WindowIds], *, length: int, num_targets: int | None
) -> tuple[dict[str, NDArray[np.int64]], int]:
    """What a program with the head inside takes of the targets, and how many are real.

    length: of the padded windows. num_targets: the program's fixed number; None: any.
    """
    rows_N = np.concatenate([row * length + w.targets_N - 1 for row, w in enumerate(windows)])
    ids_N = np.concatenate([window.ids_T[window.targets_N] for window in windows])
    padding = (0, (num_targets or len(rows_N)) - len(rows_N))
    feed = {
        "target_rows": np.pad(rows_N.astype(np.int64), padding),
        "target_ids": np.pad(ids_N.astype(np.int64), padding),
    }
    return feed, len(rows_N)


def check_vocabulary(windows: Sequence[WindowIds], vocab_size: int) -> None:
    """Raise VocabularyError for an id that has no row in the model."""
    lowest = min(int(window.ids_T.min()) for window in windows)
    largest = max(int(window.ids_T.max()) for window in windows)
    if lowest < 0 or largest >= vocab_size:
        raise VocabularyError(
            f"expected ids below the model's vocabulary of {vocab_size}, got "
            f"{largest if lowest >= 0 else lowest}; prepare the input with this model's own "
            "tokenizer"
        )


def rows_before(
    logits_TV: NDArray[np.float32], targets_N: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The rows that predict the targets; a view, not a copy, where the targets are consecutive."""
    if len(targets_N) and targets_N[-1] - targets_N[0] + 1 == len(targets_N):
        return logits_TV[targets_N[0] - 1 : targets_N[-1]]
    return logits_TV[targets_N - 1]


def split_by_window(
    nll_N: NDArray[np.float32], windows: Sequence[WindowIds]
) -> list[NDArray[np.float32]]:
    """Results of all targets, window by window."""
    stops = np.cumsum([len(window.targets_N) for window in windows])
    return np.split(nll_N, stops[:-1])
