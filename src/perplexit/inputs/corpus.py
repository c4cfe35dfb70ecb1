"""Documents from text files, JSON Lines, Parquet, folders, `datasets` objects and lists.

Everything is a generator: one document (of Parquet: one record batch) is in memory at a time. Every
row comes out, the empty ones too: who skips one counts it.
"""

import gzip
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from perplexit.errors import CorpusError, UsageError

TEXT_SUFFIXES = frozenset({".txt", ".text", ".md"})
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
PARQUET_SUFFIXES = frozenset({".parquet"})
COMPRESSED_SUFFIXES = frozenset({".gz", ".zst"})
_ROWS_PER_BATCH = 1024
_LONGEST_PATH = 255
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Keys:
    """The names of the columns that hold text, domain and prompt."""

    text: str = "text"
    domain: str | None = None
    prompt: str | None = None

    @property
    def names(self) -> list[str]:
        """The columns that are read."""
        return [key for key in (self.text, self.domain, self.prompt) if key is not None]


@dataclass(frozen=True, slots=True)
class Document:
    """One document as it was found. `text` is None where the source has a null."""

    text: str | None
    origin: str  # for messages: file and line
    domain: str | None = None
    prompt: str | None = None


def documents(corpus: Any, keys: Keys) -> Iterator[Document]:
    """Every document of `corpus`, in order.

    `corpus`: a path (a str is a path) or several, a `datasets` object, or an iterable of texts or
    of rows (mappings). Raises CorpusError for what cannot be read, naming file and line, and
    UsageError for something that is no corpus.
    """
    if isinstance(corpus, str | Path):
        yield from _path_documents(Path(corpus), keys)
    elif isinstance(corpus, Mapping):
        raise UsageError(
            f"Expected one split of a dataset, got {type(corpus).__name__} with "
            f"{', '.join(map(str, corpus))}. Pass one of them, as in dataset['test']."
        )
    elif hasattr(corpus, "column_names") and hasattr(corpus, "select_columns"):
        yield from _dataset_documents(corpus, keys)
    elif isinstance(corpus, Iterable):
        yield from _item_documents(corpus, keys)
    else:
        raise UsageError(
            f"Expected paths, a `datasets` object or texts, got {type(corpus).__name__}."
        )


def paths_of(corpus: Any) -> list[Path]:
    """The paths of a corpus that is one, or has some among its items; never those of an iterator.

    An iterator can be gone through once only.
    """
    if isinstance(corpus, str | Path):
        return [Path(corpus)]
    if isinstance(corpus, list | tuple):
        return [item for item in corpus if isinstance(item, Path)]
    return []


def files_of(paths: Iterable[Path]) -> list[Path]:
    """The files that are read where the corpus is `paths`: files, or folders of them."""
    return [file for path in paths for file in (_folder_files(path) if path.is_dir() else [path])]


def is_read_in_folder(name: str) -> bool:
    """Whether a file of this name is read where a folder is the corpus."""
    return _kind(Path(name)) in TEXT_SUFFIXES | JSONL_SUFFIXES | PARQUET_SUFFIXES


def _path_documents(path: Path, keys: Keys) -> Iterator[Document]:
    if path.is_dir():
        files = _folder_files(path)
        if not files:
            raise CorpusError(
                f"{path} holds no file of a known kind. Expected .txt, .text, .md, .jsonl, .ndjson "
                f"(also .gz, .zst) or .parquet."
            )
        for file in files:
            yield from _file_documents(file, keys)
    elif path.is_file():
        yield from _file_documents(path, keys)
    else:
        raise CorpusError(
            f"There is no file or folder {str(path)!r}. To pass text itself, give a list: ['text']."
        )


def _folder_files(folder: Path) -> list[Path]:
    """The files of known kinds below `folder`, hidden ones left out, sorted by relative path."""
    found = []
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if not hidden and is_read_in_folder(path.name) and path.is_file():
            found.append((parts, path))
    return [path for _, path in sorted(found)]


def _kind(path: Path) -> str:
    """The suffix that says what the file is, the one of its compression removed."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED_SUFFIXES else suffix


def _file_documents(path: Path, keys: Keys) -> Iterator[Document]:
    kind = _kind(path)
    if kind in JSONL_SUFFIXES:
        yield from _jsonl_documents(path, keys)
    elif kind in PARQUET_SUFFIXES:
        yield from _parquet_documents(path, keys)
    elif kind == ".json":
        raise CorpusError(
            f"{path} is a .json file, and only JSON Lines (one object a line) can be streamed. "
            f"Rename it to .jsonl if it is that, or to .txt to score it as text."
        )
    else:
        yield _text_document(path, keys)


def _text_document(path: Path, keys: Keys) -> Document:
    if keys.domain or keys.prompt:
        raise UsageError(
            f"{path} is a text file, one document without columns, so it has no "
            f"{keys.domain or keys.prompt!r}. Use JSON Lines or Parquet for domains and prompts."
        )
    with _opened(path) as file:
        data = file.read()
    return Document(_decoded(data, str(path)), str(path))


def _jsonl_documents(path: Path, keys: Keys) -> Iterator[Document]:
    offset = 0
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(_BOM) if number == 1 else line
            if content.strip():
                origin = f"{path}, line {number}"
                yield _row_document(_json_row(content, origin, offset), keys, origin)
            offset += len(line)


def _json_row(line: bytes, origin: str, offset: int) -> Mapping[str, Any]:
    try:
        row = json.loads(_decoded(line, origin, offset))
    except json.JSONDecodeError as error:
        raise CorpusError(f"{origin} is no JSON: {error}. Expected one object a line.") from error
    if not isinstance(row, dict):
        raise CorpusError(f"{origin} holds a {type(row).__name__}. Expected one object a line.")
    return row


def _parquet_documents(path: Path, keys: Keys) -> Iterator[Document]:
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, keys, str(path))
            row_number = 0
            for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=keys.names):
                for row in batch.to_pylist():
                    yield _row_document(row, keys, f"{path}, row {row_number}")
                    row_number += 1
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise CorpusError(f"{path} cannot be read as Parquet: {error}.") from error


def _dataset_documents(dataset: Any, keys: Keys) -> Iterator[Document]:
    if dataset.column_names is not None:  # an IterableDataset may not know them
        _check_columns(dataset.column_names, keys, "the dataset")
        dataset = dataset.select_columns(keys.names)
    for number, row in enumerate(dataset):
        yield _row_document(row, keys, f"row {number} of the dataset")


def _item_documents(items: Iterable[Any], keys: Keys) -> Iterator[Document]:
    for number, item in enumerate(items):
        origin = f"item {number} of the list"
        if isinstance(item, Path):
            yield from _path_documents(item, keys)
        elif isinstance(item, Mapping):
            yield _row_document(item, keys, origin)
        elif isinstance(item, str) and not (keys.domain or keys.prompt):
            _check_is_text(item, origin)
            yield Document(item, origin)
        elif isinstance(item, str):
            raise UsageError(
                f"{origin} is a text, and texts have no {keys.domain or keys.prompt!r}. Give rows: "
                f"[{{'text': …, {keys.domain or keys.prompt!r}: …}}]."
            )
        else:
            raise UsageError(f"{origin} is a {type(item).__name__}, expected a text, row or Path.")


def _check_is_text(item: str, origin: str) -> None:
    """Raise UsageError for a text that is surely meant as a path: nobody scores a file's name."""
    # os.path's answer for a name that no file can have (its UTF-8 too long, a NUL) is no.
    if len(item) < _LONGEST_PATH and "\n" not in item and os.path.isfile(item):
        raise UsageError(
            f"{origin}, {item!r}, is the name of a file, and a list of str holds texts. Give "
            f"pathlib.Path objects for files."
        )


def _row_document(row: Mapping[str, Any], keys: Keys, origin: str) -> Document:
    _check_columns(row, keys, origin)
    text, prompt = row[keys.text], row[keys.prompt] if keys.prompt else None
    domain = row[keys.domain] if keys.domain else None
    if not (text is None or isinstance(text, str)):
        raise CorpusError(
            f"{origin}: {keys.text!r} holds a {type(text).__name__}, expected text. Name the "
            f"column that holds it with the text key; there are {', '.join(map(str, row))}."
        )
    if keys.prompt and not isinstance(prompt, str):
        raise CorpusError(
            f"{origin}: {keys.prompt!r} holds a {type(prompt).__name__}, expected text (an empty "
            f"one where there is no prompt)."
        )
    if keys.domain and not isinstance(domain, str | int):
        raise CorpusError(
            f"{origin}: {keys.domain!r} holds a {type(domain).__name__}, expected the name of a "
            f"domain."
        )
    return Document(text, origin, None if domain is None else str(domain), prompt)


def _check_columns(names: Iterable[str], keys: Keys, origin: str) -> None:
    known = list(names)
    for key in keys.names:
        if key not in known:
            raise CorpusError(
                f"{origin} has no {key!r}. Its keys: {', '.join(map(repr, known)) or 'none'}. Name "
                f"the one to read with the text, domain or prompt key."
            )


def _opened(path: Path) -> io.BufferedIOBase:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")
    if suffix == ".zst":
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _decoded(data: bytes, origin: str, offset: int = 0) -> str:
    """The text of exactly these bytes: no newline translation, a byte order mark kept."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{origin} is not UTF-8: byte {offset + error.start} (0x{data[error.start]:02X}) "
            f"cannot be decoded. Convert it first, as with iconv -t UTF-8."
        ) from error
