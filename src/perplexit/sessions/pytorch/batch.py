"""Windows as one padded batch, and per-target tensors back as one record per window.

Shape suffixes: B = windows, T = longest fed length, N = targets of all windows of the batch.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from perplexit.checkpoints.length_dependent_rope import LengthDependentRope
from perplexit.checkpoints.module_call import config_integer
from perplexit.errors import EngineOutOfMemoryError, ModelError, VocabularyError
from perplexit.inputs.windows import WindowIds
from perplexit.sessions.pytorch.cuda import to_device
from perplexit.sessions.pytorch.device_choice import is_out_of_memory


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """Ids to feed and the places to read, all on one device.

    ids_BT:    int64, padded on the right. A row ends before its last target, which no prediction
               needs, and its padding repeats its own last id: no foreign embedding is touched.
    mask_BT:   int64, 0 where padded; None where nothing is, since a mask costs time.
    rows_N, positions_N: where the prediction of each target stands; targets_N: the targets' ids.
    counts:    targets per window.
    """

    ids_BT: Tensor
    mask_BT: Tensor | None
    rows_N: Tensor
    positions_N: Tensor
    targets_N: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(
        cls, windows: Sequence[WindowIds], device: torch.device, *, whole: bool = False
    ) -> "PaddedBatch":
        """Return the batch of windows that each have at least one target.

        whole: with the ids from the last target on, too.
        """
        lengths_B = np.array([len(w.ids_T) if whole else fed_length(w) for w in windows])
        ids_BT = np.empty((len(windows), lengths_B.max()), dtype=np.int64)
        for row, window, length in zip(ids_BT, windows, lengths_B, strict=True):
            row[:length] = window.ids_T[:length]
            row[length:] = window.ids_T[length - 1]
        counts = tuple(len(window.targets_N) for window in windows)
        mask_BT = None
        if lengths_B.min() < lengths_B.max():
            mask_BT = (np.arange(lengths_B.max()) < lengths_B[:, None]).astype(np.int64)
        positions_N = np.concatenate([window.targets_N for window in windows]) - 1
        targets_N = np.concatenate([window.ids_T[window.targets_N] for window in windows])
        return cls(
            ids_BT=to_device(ids_BT, device),
            mask_BT=None if mask_BT is None else to_device(mask_BT, device),
            rows_N=to_device(np.repeat(np.arange(len(windows)), counts), device),
            positions_N=to_device(positions_N.astype(np.int64), device),
            targets_N=to_device(targets_N.astype(np.int64), device),
            counts=counts,
        )


def batches_of(
    windows: Sequence[WindowIds], *, padded: bool, alone: bool, rope: LengthDependentRope | None
) -> list[list[int]]:
    """Group the places of the windows that have targets into batches to run one after the other.

    padded: whether windows of unequal length may share one, which takes a mask.
    alone:  whether each window has a batch to itself.
    rope:   windows share a batch only where it has equal frequencies for them.
    """
    batches: dict[Hashable, list[int]] = {}
    for place, window in enumerate(windows):
        if len(window.targets_N):
            length = None if padded else fed_length(window)
            frequencies = None if rope is None else rope.key(len(window.ids_T))
            batches.setdefault((length, frequencies, place if alone else None), []).append(place)
    return list(batches.values())


def check_windows(
    windows: Sequence[WindowIds], *, id_limit: int, position_limit: int | None
) -> None:
    """Raise VocabularyError for an id without a row, ModelError for a window beyond the positions.

    position_limit: how many ids can be fed; None where the model has no table of positions.
    """
    for window in windows:
        ids_T = window.ids_T
        if len(ids_T) and not 0 <= int(ids_T.min()) <= int(ids_T.max()) < id_limit:
            raise VocabularyError(
                f"expected ids from 0 to {id_limit - 1}, the model's vocabulary, got "
                f"{int(ids_T.min())} to {int(ids_T.max())} in window {window.index}; prepare "
                "the input with this model's own tokenizer"
            )
        needed = fed_length(window) if len(window.targets_N) else 0
        if position_limit is not None and needed > position_limit:
            raise ModelError(
                f"expected windows of at most {position_limit} ids, for which the model has "
                f"position embeddings, got {len(ids_T)} in window {window.index}; prepare the "
                f"input with --max-length {position_limit}"
            )


def why_out_of_memory(
    error: MemoryError | RuntimeError | IndexError, windows: Sequence[WindowIds], module: nn.Module
) -> str:
    """Return the engine's words for a lack of memory.

    Raises the error itself where it is another one, ModelError where a window is longer than the
    model's table of positions. Such a table may be no embedding: GPT-J and CodeGen keep sines,
    CTRL and Whisper a parameter.
    """
    if not is_out_of_memory(error):
        names = ("max_position_embeddings", "n_positions", "max_target_positions")
        limit, longest = config_integer(module, *names), max(len(w.ids_T) for w in windows)
        if limit is None or longest <= limit:
            raise error
        raise ModelError(
            f"expected windows of at most {limit} ids, for which {type(module).__name__} has "
            f"positions, got {longest}, with which it fails ({str(error)[:120]}); prepare the "
            f"input with --max-length {limit}"
        ) from error
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def out_of_memory(
    windows: Sequence[WindowIds], device: torch.device, reason: str
) -> EngineOutOfMemoryError:
    """Free what CUDA's allocator still holds; return the error to raise for these windows."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return EngineOutOfMemoryError(
        f"{len(windows)} windows of up to {max(len(w.ids_T) for w in windows)} ids do not fit "
        f"into the memory of {device} ({reason}); use a smaller batch or --max-length"
    )


def fed_length(window: WindowIds) -> int:
    """Return how many ids the last target's prediction needs: those before it."""
    return int(window.targets_N[-1])
