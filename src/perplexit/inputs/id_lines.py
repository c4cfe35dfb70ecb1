"""The plain form: one window per line, its ids separated by blanks.

It says what is fed forward, not what is scored: a line read back scores all its ids but the first,
and is a document of its own.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from perplexit.errors import CorpusError
from perplexit.inputs.corpus_document import Document
from perplexit.inputs.encoded_batch import EncodedBatch
from perplexit.inputs.protocols import ResolvedProtocol
from perplexit.inputs.token_file import TokenFile
from perplexit.inputs.token_file_writer import TOKEN_FILE, TokenFileWriter
from perplexit.inputs.tokenizer_sources import load_tokenizer
from perplexit.inputs.windows import document_windows
from perplexit.protected_outputs import Kind, OutputFile, paths_among
from perplexit.untrusted_files import Expected, open_regular

_EXPECTED = Expected("lines of token ids", CorpusError, "check the path")
_LINES_PER_BATCH = 1024
_MOST_DIGITS = 20
_PROTOCOL = ResolvedProtocol("id-lines", 1, None, None, "none", -1, None, "window-means")
_LARGEST_ID = np.iinfo(np.int32).max


def id_lines_output(path: str | Path) -> OutputFile:
    """Return the output file for lines of ids. Raises OutputError where something is there.

    Lines of ids carry no mark that says who wrote them, so they are never replaced.
    """
    return OutputFile(Path(path), Kind("lines of ids", lambda _: False))


def export_id_lines(token_file: TokenFile, path: str | Path) -> int:
    """Write the ids that each window feeds forward, one line per window; return how many.

    Which of them are targets is lost where windows overlap or prompts are not scored.
    Raises OutputError where there is a file already.
    """
    file = id_lines_output(path)

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="ascii", newline="\n") as lines:
            for index in range(token_file.num_windows):
                ids = token_file.window_ids(index).ids_T.tolist()
                lines.write(" ".join(map(str, ids)) + "\n")

    file.write(write)
    return token_file.num_windows


def import_id_lines(
    path: str | Path,
    *,
    output: str | Path,
    tokenizer: str | Path | object | None = None,
    force: bool = False,
) -> TokenFile:
    """Make a token file of windows that another tool wrote; it has no text.

    Lines of fewer than two ids have nothing to score; they are skipped and counted in the spec.
    With `tokenizer`, its fingerprint is recorded and ids outside its vocabulary are refused.
    `force`: another token file at `output` is replaced.
    Raises CorpusError, with the line, for anything but ids separated by blanks; OutputError.
    """
    file = OutputFile(Path(output), TOKEN_FILE, paths_among(Path(path), tokenizer), force)
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    limit = _LARGEST_ID + 1 if loaded is None else loaded.vocab_size
    short: list[int] = []
    num_lines, largest = 0, -1
    with TokenFileWriter(file, masked=False, has_text=False) as writer:
        for first_line, lines in _line_batches(Path(path), limit):
            num_lines += len(lines)
            short += [first_line + i for i, ids in enumerate(lines) if len(ids) < 2]
            kept = [(row, ids) for row, ids in enumerate(lines, first_line - 1) if len(ids) >= 2]
            largest = max([largest, *(max(ids) for _, ids in kept)])
            _append(writer, kept, str(path))
        skipped = {"fewer than two ids": {"count": len(short), "first": short[:5]}} if short else {}
        spec: dict[str, Any] = {
            "protocol": _PROTOCOL.to_json(),
            "tokenizer": loaded.to_json() if loaded else {"vocab_size": largest + 1},
            "domains": [],
            "corpus": {"num_read": num_lines, "skipped": skipped},
        }
        return writer.finish(spec, tokenizer_fingerprint=loaded.fingerprint if loaded else "")


def _append(writer: TokenFileWriter, lines: list[tuple[int, list[int]]], path: str) -> None:
    lengths = [len(ids) for _, ids in lines]
    flat = np.fromiter((index for _, ids in lines for index in ids), np.int32, sum(lengths))
    windows = document_windows(lengths)
    windows[:, 0] += writer.num_documents
    writer.append(
        EncodedBatch.without_text(flat, lengths),
        documents=[Document("", path, source_file=path, source_row=row) for row, _ in lines],
        domains_D=np.full(len(lines), -1, dtype=np.int32),
        windows=windows,
    )


def _line_batches(path: Path, limit: int) -> Iterator[tuple[int, list[list[int]]]]:
    """Yield (number of the first line, ids of each line) for groups of lines."""
    with open_regular(path, _EXPECTED) as file:
        numbered = enumerate(file, start=1)
        while batch := list(islice(numbered, _LINES_PER_BATCH)):
            yield batch[0][0], [_ids(line, f"{path}, line {n}", limit) for n, line in batch]


def _ids(line: bytes, origin: str, limit: int) -> list[int]:
    words = line.split()
    if not all(word.isdigit() for word in words):
        wrong = next(word for word in words if not word.isdigit())
        raise CorpusError(
            f"{origin} holds {wrong[:20]!r}. Expected token ids separated by blanks. Text is "
            f"prepared without the option for ids."
        )
    longest = max(words, key=len, default=b"")
    if len(longest) > _MOST_DIGITS:
        raise CorpusError(
            f"{origin} holds an id of {len(longest):,} digits. Expected ids below {limit}."
        )
    ids = [int(word) for word in words]
    if ids and max(ids) >= limit:
        raise CorpusError(f"{origin} holds the id {max(ids)}. Expected ids below {limit}.")
    return ids
