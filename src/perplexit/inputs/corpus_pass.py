"""CorpusPass: the documents of a corpus, tokenised and written into a token file.

Shape suffixes: D = documents.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import CorpusError
from perplexit.inputs.corpus_document import Document
from perplexit.inputs.encoded_batch import EncodedBatch
from perplexit.inputs.long_text import in_memory_or_long
from perplexit.inputs.protocol_table import PROTOCOLS
from perplexit.inputs.protocols import ResolvedProtocol
from perplexit.inputs.token_file_checks import SkippedSpec
from perplexit.inputs.token_file_writer import TokenFileWriter
from perplexit.inputs.tokenizer import Tokenizer

Progress = Callable[[int, int], None]  # documents and tokens written so far
_Numbered = list[tuple[int, Document]]  # documents with their numbers in the corpus

_BATCH_CHARACTERS = 1_000_000
_BATCH_DOCUMENTS = 4096
_NUM_EXAMPLES = 5
_AT_A_TIME = 2


class CorpusPass:
    """One pass over a corpus: documents are tokenised and written, those left out are counted."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        protocol: ResolvedProtocol,
        writer: TokenFileWriter,
        progress: Progress | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._protocol = protocol
        self._writer = writer
        self._progress = progress
        self._num_read = 0
        self._skipped: dict[str, SkippedSpec] = {}
        self._domains: dict[str, int] = {}
        self._num_special = 0
        self._num_own_bos = 0
        self._splits_words = PROTOCOLS[protocol.name].words == "pieces"
        self._without_tokens = {"num_bytes": 0, "num_words": 0}

    def run(self, found: Iterable[Document]) -> None:
        """Tokenise and write every document, or the one that the protocol joins them to."""
        if self._protocol.joined_with is not None:
            pieces = self._joined_pieces(found, self._protocol.joined_with)
            found = [Document("", "the joined documents", long_text=pieces)]
        for is_long, group in groupby(in_memory_or_long(found), lambda d: d.long_text is not None):
            if is_long:
                for document in group:
                    self._write_long(document)
            else:
                self._write_short(group)

    def spec(self) -> dict[str, Any]:
        """Return what the token file records of how it was made: no paths, no times.

        Raises CorpusError where no document was written.
        """
        skipped = dict(sorted(self._skipped.items()))
        if self._writer.num_documents == 0:
            reasons = ", ".join(f"{entry['count']} {reason}" for reason, entry in skipped.items())
            raise CorpusError(
                f"The corpus holds no document with text: {self._num_read} were read"
                + (f" ({reasons})." if reasons else ".")
                + " Give at least one document that is not empty."
            )
        counted = self._without_tokens
        return {
            "protocol": self._protocol.to_json(),
            "tokenizer": self._tokenizer.to_json(),
            "domains": list(self._domains),
            "corpus": {
                "num_read": self._num_read,
                "skipped": skipped,
                "num_special_tokens": self._num_special,
                "num_documents_with_own_bos": self._num_own_bos,
                **({"without_tokens": counted} if any(counted.values()) else {}),
            },
        }

    def _joined_pieces(self, found: Iterable[Document], joined_with: str) -> Iterator[str]:
        for document in found:
            if self._num_read:
                yield joined_with
            self._num_read += 1
            yield from [document.text or ""] if document.long_text is None else document.long_text

    def _numbers(self, count: int) -> range:
        """Return the numbers of the next documents read; joined ones were counted before."""
        first = self._num_read
        self._num_read += 0 if self._protocol.joined_with is not None else count
        return range(first, first + count)

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._writer.num_documents, self._writer.num_ids)

    def _write_short(self, found: Iterable[Document]) -> None:
        """Write documents in batches."""
        chosen = filter(len, map(self._with_text, _batches(found)))
        for numbered, encoded in _ahead(self._encode, chosen):
            self._write_batch(numbered, encoded)
            self._report()

    def _with_text(self, batch: Sequence[Document]) -> _Numbered:
        """Return the documents that have text, with their numbers; count the others."""
        numbered = list(zip(self._numbers(len(batch)), batch, strict=True))
        for number, document in numbered:
            if not document.text:
                self._skip("null" if document.text is None else "empty", number, document)
        return [(number, document) for number, document in numbered if document.text]

    def _encode(self, numbered: _Numbered) -> EncodedBatch:
        """Return the tokens of documents. It counts nothing, so another thread may run it."""
        texts = [(document.prompt or "") + (document.text or "") for _, document in numbered]
        names = [d.origin if d.source_file else f"document {number}" for number, d in numbered]
        encoded = self._tokenizer.encode_batch(texts, names=names)
        return encoded.with_split_words() if self._splits_words else encoded

    def _write_batch(self, numbered: _Numbered, encoded: EncodedBatch) -> None:
        """Write the documents that have tokens."""
        present_D = np.diff(encoded.document_starts) > 0
        for index in np.flatnonzero(~present_D).tolist():
            self._skip("blank, no tokens", *numbered[index])
        # documents without tokens have no bytes either
        starts = np.append(encoded.document_starts[:-1][present_D], encoded.document_starts[-1])
        encoded = replace(encoded, document_starts=starts)
        kept = [numbered[index][1] for index in np.flatnonzero(present_D).tolist()]
        own_bos_D = encoded.ids[starts[:-1]] == self._protocol.prefix_id
        windows = self._protocol.windows(
            np.diff(starts), first_document=self._writer.num_documents, own_bos_D=own_bos_D
        )
        self._num_own_bos += int(np.count_nonzero(own_bos_D))
        self._num_special += self._tokenizer.num_special(encoded.ids)
        prompts = [document.prompt for document in kept]
        self._writer.append(
            encoded,
            documents=kept,
            domains_D=self._domain_codes(kept),
            windows=windows,
            scored_mask=None if prompts[:1] == [None] else _answer_mask(encoded, prompts),
        )

    def _write_long(self, document: Document) -> None:
        """Write a document part by part."""
        number = self._numbers(1)[0]
        writer, masked = self._writer, document.prompt is not None
        before = writer.num_ids
        prompt_bytes = len((document.prompt or "").encode())
        first_scored, num_bytes, own_bos = 0, 0, False
        pieces = chain([document.prompt or ""], document.long_text or ())
        for part in self._tokenizer.encode_long(pieces, name=document.origin):
            mask_n = part.byte_starts[1:] + num_bytes > prompt_bytes
            first_scored += int(np.count_nonzero(~mask_n))
            if len(part.ids) and writer.num_ids == before:
                own_bos = int(part.ids[0]) == self._protocol.prefix_id
            writer.append_part(part, scored_mask=mask_n if masked else None)
            num_bytes += len(part.text_bytes)
            self._num_special += self._tokenizer.num_special(part.ids)
            self._report()
        length = writer.num_ids - before
        if length == 0:
            self._skip("blank, no tokens", number, document)
            return
        self._num_own_bos += own_bos
        writer.end_document(
            document,
            domain=int(self._domain_codes([document])[0]),
            windows=self._protocol.windows(
                [length], first_document=writer.num_documents, own_bos_D=[own_bos]
            ),
            first_scored=first_scored if masked else 0,
        )

    def _skip(self, reason: str, number: int, document: Document) -> None:
        """Count a document that is left out, and note where the first few of them are."""
        entry = self._skipped.setdefault(reason, {"count": 0, "first": []})
        entry["count"] += 1
        if entry["count"] <= _NUM_EXAMPLES:
            entry["first"].append(number)
            self._writer.sources.skip(reason, document)
        if self._splits_words and document.text is not None:
            # what the protocol's tool counts of a document in which nothing can be scored
            self._without_tokens["num_bytes"] += len(document.text.encode())
            self._without_tokens["num_words"] += len(re.split(r"\s+", document.text))

    def _domain_codes(self, kept: Sequence[Document]) -> NDArray[np.int32]:
        """Return the index of each document's domain, -1 without one: int32 [D]."""
        known = self._domains
        codes = [
            -1 if document.domain is None else known.setdefault(document.domain, len(known))
            for document in kept
        ]
        return np.array(codes, dtype=np.int32)


def _batches(found: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield documents in groups of a size that keeps the tokenizer busy and memory flat."""
    batch: list[Document] = []
    size = 0
    for document in found:
        batch.append(document)
        size += len(document.text or "") + len(document.prompt or "")
        if size >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _ahead(
    work: Callable[[_Numbered], EncodedBatch], items: Iterable[_Numbered]
) -> Iterator[tuple[_Numbered, EncodedBatch]]:
    """Yield each item with its work, in order.

    While a batch is tokenised, which takes the library's own threads, the bytes of another are
    counted and a third is written.
    """
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        under_way: deque[tuple[_Numbered, Future[EncodedBatch]]] = deque()
        for item in items:
            under_way.append((item, pool.submit(work, item)))
            if len(under_way) > _AT_A_TIME:
                first, future = under_way.popleft()
                yield first, future.result()
        for first, future in under_way:
            yield first, future.result()


def _answer_mask(encoded: EncodedBatch, prompts: Sequence[str | None]) -> NDArray[np.bool_]:
    """Return which tokens end behind the prompt, so hold at least one byte of the answer."""
    starts_D = encoded.document_starts
    prompt_bytes_D = np.array([len((prompt or "").encode()) for prompt in prompts], dtype=np.int64)
    answer_D = encoded.byte_starts[starts_D[:-1]] + prompt_bytes_D
    return encoded.byte_starts[1:] > np.repeat(answer_D, np.diff(starts_D))
