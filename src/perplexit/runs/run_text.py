"""RunText: a run's tokens in reading order, each once, with the text between them.

A run records what was scored, window by window. Here every token of every document has one row,
in the order of the text, whether it was scored or not.

Shape suffix: M = tokens of all documents, in reading order.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from perplexit.errors import FingerprintMismatchError
from perplexit.inputs.token_file import TokenFile
from perplexit.runs.run import Run
from perplexit.runs.run_tokens import RunTokens


@dataclass(frozen=True)
class RunText:
    """Tokens in reading order.

    document:    int64. token_index: int64, in the document; the first of a gap's.
    token_id:    int64, -1 for a gap (see below).
    row:         int64, the token's row in the run's table; -1 where it was not scored. Of a token
                 that several windows scored it is the row with the most context.
    byte_starts: int64 [M + 1], flat offsets into `text_bytes`, documents end to end.
    text_bytes:  the UTF-8 of all documents; empty where the input holds ids without text.
    has_gaps:    the input was not at hand and the run lacks tokens that were not scored. Each
                 stretch of them is one row, a gap; its bytes are counted, and unknown (zeros).
    """

    document: NDArray[np.int64]
    token_index: NDArray[np.int64]
    token_id: NDArray[np.int64]
    row: NDArray[np.int64]
    byte_starts: NDArray[np.int64]
    text_bytes: bytes
    has_gaps: bool

    def __len__(self) -> int:
        return len(self.row)

    @property
    def has_text(self) -> bool:
        """Return whether the tokens stand for known bytes."""
        return bool(self.text_bytes)

    @classmethod
    def of(cls, run: Run, tokens: TokenFile | None = None) -> "RunText":
        """Return the text that a run scored; `tokens`, its input, fills in what was not scored.

        Raises FingerprintMismatchError where `tokens` is not the input of the run.
        """
        if tokens is None:
            return _from_rows(run.tokens)
        if tokens.input_fingerprint != run.input_fingerprint:
            raise FingerprintMismatchError(
                f"expected the input that the run scored ({run.input_fingerprint[:12]}…), got "
                f"{tokens.path} ({tokens.input_fingerprint[:12]}…); name the token file that "
                "`perplexit eval` was given"
            )
        return _from_input(run.tokens, tokens)

    @property
    def document_byte_starts(self) -> NDArray[np.int64]:
        """Return where the bytes of each document begin, and the end: int64 [D + 1].

        Documents are numbered as in `document`, and those without a row have no bytes.
        """
        num_documents = int(self.document.max(initial=-1)) + 1
        first = np.searchsorted(self.document, np.arange(num_documents + 1))
        return self.byte_starts[first]

    def values(self, column: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return a column in reading order: float64 [M], NaN where a token was not scored."""
        values_M = np.full(len(self), np.nan)
        scored = self.row >= 0
        values_M[scored] = column[self.row[scored]]
        return values_M


def _from_input(rows: RunTokens, tokens: TokenFile) -> RunText:
    document_M = np.repeat(np.arange(tokens.num_documents), np.diff(tokens.document_starts))
    flat_R = tokens.document_starts[rows.document] + rows.token_index
    row_M = np.full(tokens.num_ids, -1, dtype=np.int64)
    order = np.argsort(rows.position, kind="stable")
    row_M[flat_R[order]] = order  # the last one written had the most context
    return RunText(
        document=document_M,
        token_index=np.arange(tokens.num_ids) - tokens.document_starts[document_M],
        token_id=np.asarray(tokens.token_ids, dtype=np.int64),
        row=row_M,
        byte_starts=np.asarray(tokens.byte_starts, dtype=np.int64),
        text_bytes=np.asarray(tokens.text_bytes).tobytes(),
        has_gaps=False,
    )


def _from_rows(rows: RunTokens) -> RunText:
    """Return the rows in reading order, with one more row for each gap between them."""
    row_M = _most_context_first(rows)
    document, token_index = rows.document[row_M].astype(np.int64), rows.token_index[row_M]
    begins = np.concatenate(([True], document[1:] != document[:-1]))[: len(row_M)]
    expected_index = np.where(begins, 0, np.roll(token_index, 1) + 1)
    missing = token_index > expected_index
    has_text = rows.token_bytes is not None
    own_bytes = rows.num_bytes[row_M].astype(np.int64)
    gap_bytes = np.zeros(len(row_M), dtype=np.int64)
    if has_text:
        byte_start = rows.byte_start[row_M]
        gap_bytes = byte_start - np.where(begins, 0, np.roll(byte_start + own_bytes, 1))
    place = np.flatnonzero(missing)  # a gap goes in front of each of these
    num_bytes = np.insert(own_bytes, place, gap_bytes[place])
    byte_starts = np.concatenate(([0], np.cumsum(num_bytes)))
    row = np.insert(row_M, place, -1)
    return RunText(
        document=np.insert(document, place, document[place]),
        token_index=np.insert(token_index, place, expected_index[place]),
        token_id=np.insert(rows.token_id[row_M].astype(np.int64), place, -1),
        row=row,
        byte_starts=byte_starts,
        text_bytes=_joined(rows, row, byte_starts) if has_text else b"",
        has_gaps=bool(missing.any()),
    )


def _most_context_first(rows: RunTokens) -> NDArray[np.int64]:
    """Return row indices in reading order, for each token the row with the most context."""
    order = np.lexsort((-rows.position.astype(np.int64), rows.token_index, rows.document))
    document, token_index = rows.document[order], rows.token_index[order]
    new = np.ones(len(order), dtype=np.bool_)
    new[1:] = (document[1:] != document[:-1]) | (token_index[1:] != token_index[:-1])
    chosen: NDArray[np.int64] = order[new].astype(np.int64)
    return chosen


def _joined(rows: RunTokens, row_M: NDArray[np.int64], byte_starts: NDArray[np.int64]) -> bytes:
    """Return the bytes of all rows end to end, gaps as zeros."""
    data = np.zeros(int(byte_starts[-1]), dtype=np.uint8)
    known = row_M >= 0
    own = rows.token_bytes.take(pa.array(row_M[known]))
    joined = np.frombuffer(b"".join(own.to_pylist()), dtype=np.uint8)
    is_known = np.repeat(known, np.diff(byte_starts))
    data[is_known] = joined
    return data.tobytes()
