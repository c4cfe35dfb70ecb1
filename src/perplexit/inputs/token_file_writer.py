"""TokenFileWriter: documents streamed into a token file, never the whole corpus in memory.

Shape suffixes: D = documents, W = windows.
"""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import CorpusError, EmptyScoreError, TokenFileError
from perplexit.fingerprints import canonical_json
from perplexit.inputs.corpus_document import Document
from perplexit.inputs.document_sources import SourceRows
from perplexit.inputs.encoded_batch import EncodedBatch
from perplexit.inputs.tensor_container import TensorSpool
from perplexit.inputs.token_file import (
    FORMAT,
    FORMAT_VERSION,
    LAYOUT,
    MASK_LAYOUT,
    TokenFile,
    input_fingerprint,
    target_counts,
    tensor_identity,
)
from perplexit.inputs.token_file_checks import impossible_windows
from perplexit.inputs.windows import COLUMNS, WindowArray
from perplexit.protected_outputs import Kind, OutputFile, header_has_mark

_MARK = f'"format":"{FORMAT}"'.encode()
TOKEN_FILE = Kind("a token file", lambda path: header_has_mark(path, _MARK))
_LARGEST_WORD_COUNT = np.iinfo(np.uint16).max


class TokenFileWriter:
    """Collects documents and windows; `finish` makes the file appear, whole and verified.

    A context manager: leaving it without `finish` leaves nothing behind.

    masked: the file has a scored mask. has_text: tokens have bytes. keep: the columns of the
    documents' sources that are kept.
    """

    def __init__(
        self,
        output: OutputFile,
        *,
        masked: bool,
        has_text: bool,
        keep: Sequence[str] = (),
    ) -> None:
        if not output.place.parent.is_dir():
            raise TokenFileError(
                f"{output.path.parent} is no folder, so {output.path} cannot be written."
            )
        self._output = output
        self._has_text = has_text
        self.sources = SourceRows(keep)
        layout = LAYOUT | (MASK_LAYOUT if masked else {}) | self.sources.layout
        self._spool = TensorSpool(output.place, layout)
        self._text_hash = hashlib.sha256()
        self._num_bytes = self._num_targets = 0
        self._ids_end = self._bytes_end = 0  # of the documents that are complete
        for name in ("document_starts", "byte_starts", *(["kept_starts"] if keep else [])):
            self._spool.append(name, np.zeros(1, dtype=np.int64))

    def __enter__(self) -> "TokenFileWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.close()

    @property
    def num_documents(self) -> int:
        """Return how many documents were written so far."""
        return self._spool.num_rows("document_domains")

    @property
    def num_ids(self) -> int:
        """Return how many tokens were written so far."""
        return self._spool.num_rows("token_ids")

    def append(
        self,
        batch: EncodedBatch,
        *,
        documents: Sequence[Document],
        domains_D: NDArray[np.int32],
        windows: WindowArray,
        scored_mask: NDArray[np.bool_] | None = None,
    ) -> None:
        """Add the documents of `batch` and their windows, which have the file's document numbers.

        A window in which the mask leaves nothing to score is dropped.
        """
        starts_D = batch.document_starts
        _check_windows(windows, np.diff(starts_D), self.num_documents)
        counts_W = target_counts(windows, starts_D, scored_mask, self.num_documents)
        text = memoryview(batch.text_bytes)
        for start, stop in pairwise(batch.byte_starts[starts_D].tolist()):
            self._text_hash.update(frame(stop - start))
            self._text_hash.update(text[start:stop])
        ends_D = starts_D[1:] + self.num_ids
        self.append_part(batch, scored_mask=scored_mask)
        self._end_documents(documents, domains_D, windows, counts_W, ends_D)

    def append_part(self, part: EncodedBatch, *, scored_mask: NDArray[np.bool_] | None) -> None:
        """Add the next tokens of a long document, which `end_document` completes."""
        if len(part.num_words) and int(part.num_words.max()) > _LARGEST_WORD_COUNT:
            raise CorpusError(
                f"One token stands for {int(part.num_words.max())} words, more than the "
                f"{_LARGEST_WORD_COUNT} that a token file can hold. Use another tokenizer."
            )
        self._spool.append("byte_starts", part.byte_starts[1:] + self._num_bytes)
        self._spool.append("num_words", part.num_words)
        self._spool.append("text_bytes", np.frombuffer(part.text_bytes, dtype=np.uint8))
        self._num_bytes += len(part.text_bytes)
        if scored_mask is not None:
            self._spool.append("scored_mask", scored_mask)
        self._spool.append("token_ids", part.ids)

    def end_document(
        self, document: Document, *, domain: int, windows: WindowArray, first_scored: int = 0
    ) -> None:
        """Complete the document whose parts were added, with its windows.

        first_scored: the token from which on the mask is true.
        """
        length, num_bytes = self.num_ids - self._ids_end, self._num_bytes - self._bytes_end
        _check_windows(windows, np.array([length]), self.num_documents)
        counts_W = np.maximum(windows[:, 4] - np.maximum(windows[:, 3], first_scored), 0)
        self._text_hash.update(frame(num_bytes))
        for piece in self._spool.read_back("text_bytes", num_bytes):
            self._text_hash.update(piece)
        ends_D = np.array([self.num_ids])
        self._end_documents([document], np.array([domain]), windows, counts_W, ends_D)

    def finish(self, spec: Mapping[str, Any], *, tokenizer_fingerprint: str) -> TokenFile:
        """Write the file and open it. Raises EmptyScoreError where no window has a target."""
        if self._num_targets == 0:
            raise EmptyScoreError(
                f"Expected at least one token to score, got none: {self.num_documents} documents "
                f"with {self.num_ids} tokens hold no full window. Give more text, a smaller "
                "max_length, or the protocol 'sliding'."
            )
        tensors = {
            entry.name: tensor_identity(entry.dtype, entry.shape, entry.sha256)
            for entry in self._spool.entries()
        }
        sources = {name: tensors.pop(name) for name in self.sources.layout}
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "spec": canonical_json({**spec, "has_text": self._has_text}),
            "text_fingerprint": self._text_hash.hexdigest() if self._has_text else "",
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "tensors": canonical_json(tensors),
        }
        metadata |= self.sources.metadata(sources)
        metadata["input_fingerprint"] = input_fingerprint(metadata)
        self._spool.assemble(metadata, check=self._output.check_replaceable)
        return TokenFile.open(self._output.path)

    def _end_documents(
        self,
        documents: Sequence[Document],
        domains_D: NDArray[Any],
        windows: WindowArray,
        counts_W: NDArray[np.int64],
        ends_D: NDArray[np.int64],
    ) -> None:
        """Complete documents whose tokens were added; ends_D: where the ids of each end."""
        for name, rows in self.sources.tensors(documents).items():
            self._spool.append(name, rows)
        self._spool.append("windows", windows[counts_W > 0])
        self._spool.append("document_starts", ends_D)
        self._spool.append("document_domains", domains_D)
        self._num_targets += int(counts_W.sum())
        self._ids_end, self._bytes_end = self.num_ids, self._num_bytes


def frame(num_bytes: int) -> bytes:
    """Return what `text_fingerprint` hashes before a document: ["ab", "c"] is not ["a", "bc"]."""
    return num_bytes.to_bytes(8, "little")


def _check_windows(windows: WindowArray, lengths_D: NDArray[np.int64], first: int) -> None:
    """Raise TokenFileError where a window leaves its document or scores what it cannot."""
    wrong = np.flatnonzero(impossible_windows(windows, lengths_D, first))
    if len(wrong):
        raise TokenFileError(
            f"Window {windows[wrong[0]].tolist()} ({', '.join(COLUMNS)}) lies outside its document "
            "or scores a token without context."
        )
