"""Per-token results on their way into window order, and as the columns of a run.

Shape suffix: R = rows, a scored token each, in window order.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from perplexit.inputs.token_file import TokenFile
from perplexit.inputs.windows import PrefixMode
from perplexit.runs.run_tokens import DIVERGENCES, PartialColumn, RunTokens
from perplexit.scoring import ScoredBatch
from perplexit.sessions.base import TokenDetails

_COLUMN_OF_DETAIL = {
    "nll": "nll_N",
    "entropy": "entropy_N",
    "rank": "rank_N",
    "top_ids": "top_ids_NK",
    "top_logprobs": "top_logprobs_NK",
}


_KNOWN = "known."  # before a column's name: which rows of it are known, where not all are


def columns_of(details: Sequence[TokenDetails]) -> dict[str, NDArray[Any]]:
    """The results of several windows as columns, window after window.

    What a session gave for some of the windows only has a column `known.NAME` of flags beside it.
    """
    columns: dict[str, NDArray[Any]] = {}
    details = [d for d in details if len(d.nll_N)] or details[:1]
    for name, attribute in _COLUMN_OF_DETAIL.items():
        columns |= _column(name, details, [getattr(d, attribute) for d in details])
    for name in dict.fromkeys(name for d in details for name in d.divergences or ()):
        columns |= _column(name, details, [(d.divergences or {}).get(name) for d in details])
    return columns


def _column(
    name: str, details: Sequence[TokenDetails], arrays: Sequence[NDArray[Any] | None]
) -> dict[str, NDArray[Any]]:
    first = next((array for array in arrays if array is not None), None)
    if first is None:
        return {}
    dtype = np.dtype(np.float32) if name in DIVERGENCES and first.dtype != np.bool_ else first.dtype
    parts = [
        np.zeros((len(d.nll_N), *first.shape[1:]), dtype) if array is None else array.astype(dtype)
        for d, array in zip(details, arrays, strict=True)
    ]
    column = {name: np.concatenate(parts)}
    if any(array is None for array in arrays):
        known = [np.full(len(p), a is not None) for p, a in zip(parts, arrays, strict=True)]
        column[_KNOWN + name] = np.concatenate(known)
    return column


class WindowResults:
    """The results of a run's windows, filled in any order and read in window order.

    done:    a flag a window. seconds: time in the session, `decode_seconds` of it in decode.
    nll_sum: finite losses so far, in the order they came (for progress; the reported sum is taken
    in window order).
    """

    def __init__(self, tokens: TokenFile) -> None:
        self._tokens = tokens
        self._counts = tokens.target_counts()
        self._starts = np.concatenate([[0], np.cumsum(self._counts)])
        self._columns: dict[str, NDArray[Any]] = {}
        self._known: dict[str, NDArray[np.bool_]] = {}
        self.done = self._counts == 0  # a window without targets needs no forward pass
        self.seconds = self.decode_seconds = 0.0
        self.nll_sum = 0.0
        self.num_tokens_done = 0

    @property
    def num_windows_scored(self) -> int:
        """Windows with at least one target that are done."""
        return int(np.count_nonzero(self.done & (self._counts > 0)))

    def add(self, batch: ScoredBatch) -> None:
        """Fill in one scored batch."""
        counts = np.array([len(d.nll_N) for d in batch.details], dtype=np.int64)
        self.fill(batch.windows, counts, columns_of(batch.details))
        self.seconds += batch.seconds
        self.decode_seconds += batch.decode_seconds

    def fill(
        self,
        windows: NDArray[np.int64],
        counts: NDArray[np.int64],
        columns: dict[str, NDArray[Any]],
    ) -> None:
        """Fill in the results of `windows`, which lie one after another in `columns`."""
        if not np.array_equal(counts, self._counts[windows]):
            raise ValueError("a session or a part gave another number of results than of targets")
        rows = _ranges(self._starts[windows], counts)
        for name, values in columns.items():
            if name.startswith(_KNOWN):
                continue
            if name not in self._columns:
                shape = (int(self._starts[-1]), *values.shape[1:])
                self._columns[name] = np.zeros(shape, dtype=values.dtype)
                self._known[name] = np.zeros(shape[0], dtype=np.bool_)
            self._columns[name][rows] = values
            self._known[name][rows] = columns.get(_KNOWN + name, np.bool_(True))
        new = windows[~self.done[windows]]
        self.num_tokens_done += int(self._counts[new].sum())
        finite = np.isfinite(columns["nll"])
        self.nll_sum += float(columns["nll"].sum(dtype=np.float64, where=finite))
        self.done[windows] = True

    def run_tokens(self) -> RunTokens:
        """Everything as the rows of a run. Raises ValueError where a window is not done."""
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
            domain_R = tokens.document_domains[document_R]
        return RunTokens(
            document=document_R.astype(np.int32),
            window=np.repeat(np.arange(len(counts)), counts).astype(np.int32),
            position=position_R.astype(np.int32),
            token_index=token_index_R.astype(np.int64),
            domain=domain_R.astype(np.int32),
            domains=tuple(tokens.domains),
            token_id=np.asarray(tokens.token_ids[flat_R], dtype=np.int32),
            **_text_columns(tokens, flat_R, document_R),
            **{name: x for name, x in self._columns.items() if self._known[name].all()},
            partial={
                name: PartialColumn(x, self._known[name])
                for name, x in self._columns.items()
                if not self._known[name].all()
            },
        )


def _targets_of_all(tokens: TokenFile) -> NDArray[np.int64]:
    """Flat token indices of every window's targets, in window order."""
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
    """`concatenate([arange(s, s + c) for s, c in zip(starts, counts)])`, without the loop."""
    total = int(counts.sum())
    before = np.cumsum(counts) - counts
    ranges: NDArray[np.int64] = np.repeat(starts - before, counts) + np.arange(total)
    return ranges
