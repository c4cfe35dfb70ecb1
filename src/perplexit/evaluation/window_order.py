"""Per-token results on their way into window order, and as the columns of a run.

Shape suffix: R = rows, a scored token each, in window order.
"""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from perplexit.inputs.token_file import TokenFile
from perplexit.inputs.windows import PrefixMode
from perplexit.runs.run_tokens import PartialColumn, RunTokens
from perplexit.runs.store import ScoredBatch
from perplexit.token_columns import TokenDetails


class WindowResults:
    """The results of a run's windows, filled in any order and read in window order.

    done:    one flag per window. seconds: time in the session, `decode_seconds` of it in decode.
    nll_sum: finite losses so far, in the order they came (for progress; the reported sum is taken
    in window order).
    """

    def __init__(self, tokens: TokenFile) -> None:
        self._tokens = tokens
        self._counts = tokens.target_counts()
        self._starts = np.concatenate([[0], np.cumsum(self._counts)])
        self._details = TokenDetails({}, {})
        self.done = self._counts == 0  # a window without targets needs no forward pass
        self.seconds = self.decode_seconds = 0.0
        self.nll_sum = 0.0
        self.num_tokens_done = 0

    @property
    def num_windows_scored(self) -> int:
        """Return how many windows with at least one target are done."""
        return int(np.count_nonzero(self.done & (self._counts > 0)))

    def add(self, batch: ScoredBatch) -> None:
        """Fill in the results of one batch."""
        windows, counts = batch.window_W, batch.num_targets_W
        if not np.array_equal(counts, self._counts[windows]):
            raise ValueError("a session or a part gave another number of results than of targets")
        rows = _ranges(self._starts[windows], counts)
        self._details.put(rows, batch.details, num_targets=int(self._starts[-1]))
        new = windows[~self.done[windows]]
        self.num_tokens_done += int(self._counts[new].sum())
        nll_N = batch.details.nll_N
        self.nll_sum += float(nll_N.sum(dtype=np.float64, where=np.isfinite(nll_N)))
        self.done[windows] = True
        self.seconds += batch.seconds
        self.decode_seconds += batch.decode_seconds

    def run_tokens(self) -> RunTokens:
        """Return the rows of the run. Raises ValueError where a window is not done."""
        self._tokens.require_unchanged()  # its text is read from the file now
        if not self.done.all():
            raise ValueError(f"{int((~self.done).sum())} windows are not scored")
        tokens, counts = self._tokens, self._counts
        table = tokens.windows
        flat_R = _targets_of_all(tokens)
        document_R = np.repeat(table.document, counts)
        token_index_R = flat_R - tokens.document_starts[document_R]
        inserted = table.prefix_mode == int(PrefixMode.INSERT)
        position_R = token_index_R - np.repeat(table.start - inserted, counts)
        domain_R = np.full(len(flat_R), -1, dtype=np.int32)
        if tokens.domains:
            domain_R = np.asarray(tokens.document_domains)[document_R]
        columns = {
            "document": document_R,
            "window": np.repeat(np.arange(len(counts)), counts),
            "position": position_R,
            "token_index": token_index_R,
            "domain": domain_R,
            "token_id": np.asarray(tokens.token_ids[flat_R]),
            **_text_columns(tokens, flat_R, document_R),
        }
        partial = {}
        for name, values in self._details.columns.items():
            known_R = self._details.known[name]
            if known_R.all():
                columns[name] = values
            else:
                partial[name] = PartialColumn(values, known_R)
        return RunTokens(columns, domains=tuple(tokens.domains), partial=partial)


def _targets_of_all(tokens: TokenFile) -> NDArray[np.int64]:
    """Return flat token indices of every window's targets, in window order."""
    table = tokens.windows
    widths = table.target_stop - table.target_start
    flat = _ranges(tokens.document_starts[table.document] + table.target_start, widths)
    if tokens.scored_mask is not None:
        flat = flat[np.asarray(tokens.scored_mask)[flat]]
    return flat


def _text_columns(
    tokens: TokenFile, flat_R: NDArray[np.int64], document_R: NDArray[np.int64]
) -> dict[str, Any]:
    if not tokens.has_text:
        return {
            "byte_start": np.full(len(flat_R), -1, dtype=np.int64),
            "num_bytes": np.zeros(len(flat_R), dtype=np.int32),
            "num_words": np.zeros(len(flat_R), dtype=np.int32),
        }
    starts = np.asarray(tokens.byte_starts)
    document_byte_R = starts[tokens.document_starts[document_R]]
    every_token = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(),
        len(starts) - 1,
        [None, pa.py_buffer(np.ascontiguousarray(starts)), pa.py_buffer(tokens.text_bytes)],
    )
    return {
        "byte_start": starts[flat_R] - document_byte_R,
        "num_bytes": (starts[flat_R + 1] - starts[flat_R]).astype(np.int32),
        "num_words": np.asarray(tokens.num_words)[flat_R].astype(np.int32),
        "token_bytes": every_token.take(pa.array(flat_R)),
    }


def _ranges(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return `concatenate([arange(s, s + c) for s, c in zip(starts, counts)])`."""
    total = int(counts.sum())
    before = np.cumsum(counts) - counts
    ranges: NDArray[np.int64] = np.repeat(starts - before, counts) + np.arange(total)
    return ranges
