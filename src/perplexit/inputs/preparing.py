"""`prepare`: a corpus → a token file, streamed.

Shape suffixes: D = documents.
"""

import re
import shutil
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.atomic_files import scratch_folder
from perplexit.errors import CorpusError, TokenizerError, UsageError
from perplexit.inputs.corpus import Document, Keys, documents, files_of, is_table, paths_of
from perplexit.inputs.encoded_batch import EncodedBatch
from perplexit.inputs.long_text import in_memory_or_long
from perplexit.inputs.prepare_output import check_same_input, output_file
from perplexit.inputs.protocol_table import PROTOCOLS
from perplexit.inputs.protocols import ResolvedProtocol, resolve_protocol
from perplexit.inputs.token_file import TokenFile
from perplexit.inputs.token_file_writer import TokenFileWriter
from perplexit.inputs.tokenizer import Tokenizer
from perplexit.inputs.tokenizer_sources import load_tokenizer

Progress = Callable[[int, int], None]  # documents and tokens written so far
_Numbered = list[tuple[int, Document]]  # documents with their numbers in the corpus

_BATCH_CHARACTERS = 1_000_000
_BATCH_DOCUMENTS = 4096
_NUM_EXAMPLES = 5
_AT_A_TIME = 2


def prepare(
    corpus: Any,
    *,
    tokenizer: str | Path | object,
    output: str | Path | None = None,
    protocol: str = "sliding",
    max_length: int | None = None,
    stride: int | None = None,
    bos: str = "auto",
    text_key: str | None = None,
    domain_key: str | None = None,
    prompt_key: str | None = None,
    keep: str | Sequence[str] = (),
    progress: Progress | None = None,
    force: bool = False,
) -> TokenFile:
    """The corpus as a verified token file at `output` (a temporary one without it).

    corpus:     a path (a str is one) or several Paths, a `datasets` object, or a list of texts.
    tokenizer:  whatever `load_tokenizer` takes.
    bos:        auto (what the tokenizer itself adds, resolved and recorded), none, first, every.
    text_key:   the column with the text of a table; None: "text".
    prompt_key: the column with prompts; only the tokens of the answer (`text_key`) are scored.
    keep:       columns that stay with each document, beside its file and row (`TokenFile.sources`).
    force:      whether another token file at `output` is replaced; the same is, without it.

    Raises OutputError where `output` holds something else, UsageError for options that contradict
    each other, CorpusError and TokenizerError for what cannot be read, EmptyScoreError where no
    token would be scored.
    """
    target, cleanup = _target(output)
    file = output_file(target, corpus, read=(tokenizer,), force=force)
    keys = _keys(corpus, text_key, domain_key, prompt_key, keep)
    loaded = load_tokenizer(tokenizer)
    plan = protocol_for_tokenizer(loaded, protocol, max_length=max_length, stride=stride, bos=bos)
    _check_joining(plan, keys)
    check_same_input(file, corpus, keys, plan, loaded)
    try:
        with (
            TokenFileWriter(
                file, masked=prompt_key is not None, has_text=True, keep=keys.keep
            ) as writer,
            ThreadPoolExecutor(1) as aside,
        ):
            fingerprint = aside.submit(lambda: loaded.fingerprint)  # wanted at the end
            preparation = _Preparation(loaded, plan, writer)
            found = _joined(documents(corpus, keys, stream=True), plan, preparation)
            for is_long, group in groupby(in_memory_or_long(found), _is_long):
                written = preparation.add_long if is_long else preparation.add_short
                for _ in written(group):
                    if progress is not None:
                        progress(writer.num_documents, writer.num_ids)
            result = writer.finish(preparation.spec(), tokenizer_fingerprint=fingerprint.result())
    except BaseException:
        cleanup()
        raise
    if output is None:
        weakref.finalize(result, cleanup)
    return result


@dataclass
class _Skipped:
    """Documents left out for one reason, with the numbers of the first few."""

    count: int = 0
    first: list[int] = field(default_factory=list)

    def add(self, number: int) -> None:
        self.count += 1
        if len(self.first) < _NUM_EXAMPLES:
            self.first.append(number)


class _Preparation:
    """What a pass over the corpus counts on its way into the writer."""

    def __init__(self, tokenizer: Tokenizer, plan: ResolvedProtocol, writer: TokenFileWriter):
        self.tokenizer = tokenizer
        self.plan = plan
        self.writer = writer
        self.num_read = 0
        self.skipped: dict[str, _Skipped] = {}
        self.domains: dict[str, int] = {}
        self.num_special = 0
        self.num_own_bos = 0
        self.splits_words = PROTOCOLS[plan.name].words == "pieces"
        self.without_tokens = {"num_bytes": 0, "num_words": 0}

    def choose(self, batch: Sequence[Document]) -> _Numbered:
        """The documents that have text, with their numbers in the corpus; others are counted."""
        numbers = range(self.num_read, self.num_read + len(batch))
        self.num_read += 0 if self.plan.joined_with is not None else len(batch)
        return [entry for entry in zip(numbers, batch, strict=True) if self._keep(*entry)]

    def encode(self, kept: _Numbered) -> EncodedBatch:
        """The tokens of documents. It counts nothing, so that it may run in another thread."""
        texts = [(document.prompt or "") + (document.text or "") for _, document in kept]
        names = [d.origin if d.source_file else f"document {number}" for number, d in kept]
        encoded = self.tokenizer.encode_batch(texts, names=names)
        return encoded.with_split_words() if self.splits_words else encoded

    def add_short(self, found: Iterable[Document]) -> Iterator[None]:
        """Write documents in batches; one step for each."""
        chosen = filter(len, map(self.choose, _batches(found)))
        for kept, encoded in _ahead(self.encode, chosen):
            self.add(kept, encoded)
            yield

    def add_long(self, found: Iterable[Document]) -> Iterator[None]:
        """Write documents part by part; one step for each part."""
        for document in found:
            number = self.num_read
            self.num_read += 0 if self.plan.joined_with is not None else 1
            yield from self._add_parts(document, number)

    def _add_parts(self, document: Document, number: int) -> Iterator[None]:
        before, masked = self.writer.num_ids, document.prompt is not None
        prompt_bytes = len((document.prompt or "").encode())
        first_scored, num_bytes, own_bos = 0, 0, False
        pieces = chain([document.prompt or ""], document.long_text or ())
        for part in self.tokenizer.encode_long(pieces, name=document.origin):
            mask_n = part.byte_starts[1:] + num_bytes > prompt_bytes
            first_scored += int(np.count_nonzero(~mask_n))
            if len(part.ids) and self.writer.num_ids == before:
                own_bos = int(part.ids[0]) == self.plan.prefix_id
            self.writer.append_part(part, scored_mask=mask_n if masked else None)
            num_bytes += len(part.text_bytes)
            self.num_special += self.tokenizer.num_special(part.ids)
            yield
        length = self.writer.num_ids - before
        if length == 0:
            self._skip("blank, no tokens", number, document)
            return
        self.num_own_bos += own_bos
        first = self.writer.num_documents
        windows = self.plan.windows([length], first_document=first, own_bos_D=[own_bos])
        domain = int(self._domain_codes([document])[0])
        self.writer.end_document(
            document, domain=domain, windows=windows, first_scored=first_scored if masked else 0
        )

    def add(self, kept: _Numbered, encoded: EncodedBatch) -> None:
        """Write the documents that have tokens."""
        lengths_D = np.diff(encoded.document_starts)
        for index in np.flatnonzero(lengths_D == 0).tolist():
            self._skip("blank, no tokens", *kept[index])
        present_D = lengths_D > 0
        kept = [entry for entry, present in zip(kept, present_D, strict=True) if present]
        self._write(_without_empty(encoded, present_D), [document for _, document in kept])

    def spec(self) -> dict[str, Any]:
        """What the file records of how it was made: no paths, no times."""
        if self.writer.num_documents == 0:
            reasons = ", ".join(f"{entry.count} {reason}" for reason, entry in self._reasons())
            raise CorpusError(
                f"The corpus holds no document with text: {self.num_read} were read"
                + (f" ({reasons})." if reasons else ".")
                + " Give at least one document that is not empty."
            )
        counted = self.without_tokens
        return {
            "protocol": self.plan.to_json(),
            "tokenizer": self.tokenizer.to_json(),
            "domains": list(self.domains),
            "corpus": {
                "num_read": self.num_read,
                "skipped": {reason: vars(entry) for reason, entry in self._reasons()},
                "num_special_tokens": self.num_special,
                "num_documents_with_own_bos": self.num_own_bos,
                **({"without_tokens": counted} if any(counted.values()) else {}),
            },
        }

    def _reasons(self) -> list[tuple[str, _Skipped]]:
        return sorted(self.skipped.items())

    def _keep(self, number: int, document: Document) -> bool:
        if document.text:
            return True
        self._skip("null" if document.text is None else "empty", number, document)
        return False

    def _skip(self, reason: str, number: int, document: Document) -> None:
        entry = self.skipped.setdefault(reason, _Skipped())
        entry.add(number)
        if entry.count <= _NUM_EXAMPLES:
            self.writer.sources.skip(reason, document)
        if self.splits_words and document.text is not None:
            # what the protocol's tool counts of a document in which nothing can be scored
            self.without_tokens["num_bytes"] += len(document.text.encode())
            self.without_tokens["num_words"] += len(re.split(r"\s+", document.text))

    def _write(self, encoded: EncodedBatch, kept: Sequence[Document]) -> None:
        first_D = encoded.ids[encoded.document_starts[:-1]]
        own_bos_D = first_D == self.plan.prefix_id
        windows = self.plan.windows(
            np.diff(encoded.document_starts),
            first_document=self.writer.num_documents,
            own_bos_D=own_bos_D,
        )
        self.num_own_bos += int(np.count_nonzero(own_bos_D))
        self.num_special += self.tokenizer.num_special(encoded.ids)
        prompts = [document.prompt for document in kept]
        self.writer.append(
            encoded,
            domains_D=self._domain_codes(kept),
            windows=windows,
            scored_mask=None if prompts[:1] == [None] else _answer_mask(encoded, prompts),
            documents=kept,
        )

    def _domain_codes(self, kept: Sequence[Document]) -> NDArray[np.int32]:
        codes = [
            -1
            if document.domain is None
            else self.domains.setdefault(document.domain, len(self.domains))
            for document in kept
        ]
        return np.array(codes, dtype=np.int32)


def protocol_for_tokenizer(
    tokenizer: Tokenizer, protocol: str, *, max_length: int | None, stride: int | None, bos: str
) -> ResolvedProtocol:
    """Return the protocol with the options settled for a tokenizer.

    Raises UsageError for options that contradict each other, TokenizerError where the tokenizer
    puts several tokens before a text.
    """
    prefix = tokenizer.added_prefix
    if bos == "auto" and len(prefix) > 1:
        raise TokenizerError(
            f"The tokenizer puts {len(prefix)} tokens {list(prefix)} before a text, and a window "
            f"has room for one. Say which with bos 'none', 'first' or 'every'."
        )
    return resolve_protocol(
        protocol,
        max_length=max_length,
        stride=stride,
        bos=bos,
        added_prefix_id=prefix[0] if len(prefix) == 1 else None,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )


def _keys(
    corpus: Any,
    text_key: str | None,
    domain_key: str | None,
    prompt_key: str | None,
    keep: str | Sequence[str],
) -> Keys:
    """The columns to read. Raises UsageError where columns are named and no file has any."""
    kept = (keep,) if isinstance(keep, str) else tuple(keep)
    named = {"text": text_key, "domain": domain_key, "prompt": prompt_key, "keep": kept or None}
    given = [name for name, key in named.items() if key is not None]
    files = files_of(path for path in paths_of(corpus) if path.exists())
    if given and files and not any(map(is_table, files)):
        raise UsageError(
            f"expected a table (JSON Lines, CSV, TSV, Parquet) for the {given[0]} column that is "
            f"named, got {files[0]}, a text without columns; leave the name out"
        )
    if len(set(kept)) != len(kept):
        raise UsageError(
            f"expected each column to keep once, got {', '.join(kept)}; name each once"
        )
    return Keys(text_key or "text", domain_key, prompt_key, kept)


def _check_joining(plan: ResolvedProtocol, keys: Keys) -> None:
    if plan.joined_with is not None and keys.beside_text:
        alone = [name for name, entry in PROTOCOLS.items() if entry.joined_with is None]
        raise UsageError(
            f"The protocol {plan.name!r} joins all documents into one, in which prompts, domains "
            f"and kept columns are lost. Use one of {', '.join(alone)}."
        )


def _joined(
    found: Iterator[Document], plan: ResolvedProtocol, preparation: _Preparation
) -> Iterator[Document]:
    """The documents, or the one that the protocol makes of them all (empty rows included)."""
    if plan.joined_with is None:
        yield from found
        return
    yield Document("", "the joined documents", long_text=_joined_pieces(found, plan, preparation))


def _joined_pieces(
    found: Iterator[Document], plan: ResolvedProtocol, preparation: _Preparation
) -> Iterator[str]:
    for document in found:
        if preparation.num_read:
            yield plan.joined_with or ""
        preparation.num_read += 1
        yield from [document.text or ""] if document.long_text is None else document.long_text


def _is_long(document: Document) -> bool:
    return document.long_text is not None


def _batches(found: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups of a size that keeps the tokenizer busy and memory flat."""
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
    """Each item with its work, in order.

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
        while under_way:
            first, future = under_way.popleft()
            yield first, future.result()


def _without_empty(encoded: EncodedBatch, present_D: NDArray[np.bool_]) -> EncodedBatch:
    """The batch without its documents that have no tokens (and no bytes either)."""
    if present_D.all():
        return encoded
    starts = np.append(encoded.document_starts[:-1][present_D], encoded.document_starts[-1])
    return EncodedBatch(
        encoded.ids, starts, encoded.byte_starts, encoded.num_words, encoded.text_bytes
    )


def _answer_mask(encoded: EncodedBatch, prompts: Sequence[str | None]) -> NDArray[np.bool_]:
    """Which tokens hold at least one byte of the answer, that is end behind the prompt."""
    starts_D = encoded.document_starts
    prompt_bytes_D = np.array([len((prompt or "").encode()) for prompt in prompts], dtype=np.int64)
    answer_D = encoded.byte_starts[starts_D[:-1]] + prompt_bytes_D
    return encoded.byte_starts[1:] > np.repeat(answer_D, np.diff(starts_D))


def _target(output: str | Path | None) -> tuple[Path, Callable[[], None]]:
    """(where to write, what removes it again): without `output`, a folder of its own."""
    if output is not None:
        return Path(output), lambda: None
    folder = scratch_folder("input")
    return folder / "input.safetensors", lambda: shutil.rmtree(folder, ignore_errors=True)
