"""Windows through a compiled program, whatever the engine: padding, batches, targets.

A program takes `input_ids` (B, T), padded on the right; with the head inside also `target_rows`
(N), the row · T + (position − 1) of each target, and `target_ids` (N), and gives `nll` (N).
Without, it gives logits (B, T, V). No id sees one after it, so the padding needs no mask; programs
of other exporters take an `attention_mask` (B, T) of 1 for a window's own ids.

Shape suffixes: B = windows, T = ids per window (padded), N = targets over all windows, V =
vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import psutil
from numpy.typing import NDArray

from perplexit.errors import CapabilityError, VocabularyError
from perplexit.inputs.windows import WindowIds, balanced_parts
from perplexit.program_record import ProgramShapes

Feed = dict[str, NDArray[np.int64]]
RunProgram = Callable[[Feed], NDArray[np.float32]]
_MOST_IDS_A_CALL = 1024  # where calls run side by side: more lose the caches and gain nothing


@dataclass(frozen=True, slots=True)
class ProgramCalls:
    """A program, and how windows are fed to it.

    calls_at_a_time: threads that may call `run` side by side; then a batch has about 1024 ids.
    masked: whether the program takes an attention mask.
    Every method raises CapabilityError where a window is longer than the program's.
    """

    run: RunProgram
    shapes: ProgramShapes
    calls_at_a_time: int = 1
    masked: bool = False

    def nll(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        """Return the nll of each window's targets, from a program with the head inside."""
        if not windows:
            return []
        batches = self._batches(windows, self.calls_at_a_time)
        if self.calls_at_a_time == 1:
            nll_N = np.concatenate([self._batch_nll(batch) for batch in batches])
        else:
            with ThreadPoolExecutor(self.calls_at_a_time, "perplexit") as pool:
                nll_N = np.concatenate(list(pool.map(self._batch_nll, batches)))
        stops = np.cumsum([len(window.targets_N) for window in windows])
        return np.split(nll_N, stops[:-1])

    def logit_rows(self, windows: Sequence[WindowIds]) -> Iterator[NDArray[np.float32]]:
        """Yield the logits that predict each window's targets, (targets, V), one call at a time."""
        for batch in self._batches(windows, 1):
            logits_BTV = self.run(self._ids_feed(batch))
            for row, window in enumerate(batch):
                yield _rows_before(logits_BTV[row], window.targets_N)

    def windows_at_once(self, window_length: int, *, window_bytes: int, most_ids: int) -> int:
        """Return how many windows a batch takes: a fixed program's, or what half the memory holds.

        window_bytes: what one window needs. most_ids: of a batch; beyond, a CPU gains no speed.
        """
        if self.shapes.length is not None and window_length > self.shapes.length:
            return 1  # it will be refused
        if self.shapes.batch_size is not None:
            return self.calls_at_a_time * self.shapes.batch_size
        free = int(psutil.virtual_memory().available) // 2
        most_ids = max(most_ids, self.calls_at_a_time * _MOST_IDS_A_CALL)
        most = max(self.calls_at_a_time, most_ids // window_length)
        return max(1, min(most, free // max(1, window_bytes)))

    def _batches(
        self, windows: Sequence[WindowIds], calls_at_a_time: int
    ) -> Iterator[Sequence[WindowIds]]:
        """Yield the windows, as many at a time as one call takes."""
        if calls_at_a_time > 1 and self.shapes.batch_size is None:
            lengths = [len(window.ids_T) for window in windows]
            for part in balanced_parts(lengths, workers=calls_at_a_time, most_ids=_MOST_IDS_A_CALL):
                yield windows[part.start : part.stop]
            return
        size = self.shapes.batch_size or max(1, len(windows))
        for start in range(0, len(windows), size):
            yield windows[start : start + size]

    def _ids_feed(self, windows: Sequence[WindowIds]) -> Feed:
        """Return the ids (B, T), rows padded with their last id, missing rows like the first."""
        shapes = self.shapes
        longest = max(len(window.ids_T) for window in windows)
        if shapes.length is not None and longest > shapes.length:
            raise CapabilityError(
                f"the program was compiled for windows of {shapes.length} ids, got one of "
                f"{longest}; prepare the input with --max-length {shapes.length}, or compile the "
                "program for longer ones"
            )
        num_rows = shapes.batch_size or len(windows)
        ids_BT = np.empty((num_rows, shapes.length or longest), np.int64)
        mask_BT = np.zeros_like(ids_BT)
        for row, window in enumerate(windows):
            fed = len(window.ids_T)
            ids_BT[row, :fed], ids_BT[row, fed:] = window.ids_T, window.ids_T[-1]
            mask_BT[row, :fed] = 1
        for array_BT in (ids_BT, mask_BT):
            array_BT[len(windows) :] = array_BT[0]
        return {"input_ids": ids_BT} | ({"attention_mask": mask_BT} if self.masked else {})

    def _batch_nll(self, windows: Sequence[WindowIds]) -> NDArray[np.float32]:
        """Return the nll of all targets (N), in as many calls as their fixed number needs."""
        ids = self._ids_feed(windows)
        length = ids["input_ids"].shape[1]
        rows_N = np.concatenate([row * length + w.targets_N - 1 for row, w in enumerate(windows)])
        ids_N = np.concatenate([window.ids_T[window.targets_N] for window in windows])
        if not len(rows_N):
            return np.empty(0, np.float32)
        most = self.shapes.num_targets or len(rows_N)
        results = []
        for start in range(0, len(rows_N), most):
            part = slice(start, start + most)
            padding = (0, most - len(rows_N[part]))
            targets = {
                "target_rows": np.pad(rows_N[part].astype(np.int64), padding),
                "target_ids": np.pad(ids_N[part].astype(np.int64), padding),
            }
            results.append(self.run(ids | targets)[: len(rows_N[part])])
        return np.concatenate(results)


def check_vocabulary(windows: Sequence[WindowIds], vocab_size: int) -> None:
    """Raise VocabularyError where an id has no row in the model."""
    for window in windows:
        lowest, largest = int(window.ids_T.min()), int(window.ids_T.max())
        if lowest < 0 or largest >= vocab_size:
            raise VocabularyError(
                f"expected ids below the model's vocabulary of {vocab_size}, got "
                f"{largest if lowest >= 0 else lowest}; prepare the input with this model's own "
                "tokenizer"
            )


def _rows_before(
    logits_TV: NDArray[np.float32], targets_N: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return the rows that predict the targets: a view where the targets are consecutive."""
    if len(targets_N) and targets_N[-1] - targets_N[0] + 1 == len(targets_N):
        return logits_TV[targets_N[0] - 1 : targets_N[-1]]
    return logits_TV[targets_N - 1]
