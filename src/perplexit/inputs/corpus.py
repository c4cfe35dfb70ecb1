"""Documents from text files, tables, folders, `datasets` objects and lists.

One document (of Parquet: one record batch) is in memory at a time. Empty rows come out too, for the
caller to count.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from perplexit.errors import CorpusError, UsageError
from perplexit.inputs.compressed_files import is_compressed, open_bytes
from perplexit.inputs.corpus_document import Document, Keys, check_columns, row_document
from perplexit.inputs.corpus_tables import (
    TABLE_READERS,
    check_is_no_utf16,
    decoded,
    table_documents,
)
from perplexit.inputs.long_text import LONG_CHARACTERS, decoded_pieces

_TEXT_SUFFIXES = frozenset({".txt", ".text", ".md"})
_LONGEST_PATH = 255
_NUL_BYTES = 1 << 12  # how far into a text its encoding is looked at


def documents(corpus: Any, keys: Keys, *, stream: bool = False) -> Iterator[Document]:
    """Yield every document of `corpus`, in order.

    `corpus`: a path (a str is a path) or several, a `datasets` object, or an iterable of texts or
    of rows (mappings). stream: large text files come in pieces, as `long_text`.
    Raises CorpusError for what cannot be read, naming file and line, and UsageError for something
    that is no corpus.
    """
    if isinstance(corpus, str | Path):
        yield from _path_documents(Path(corpus), keys, stream)
    elif isinstance(corpus, Mapping):
        splits = ", ".join(map(str, corpus))
        raise UsageError(f"Expected one split of a dataset, as dataset['test'], got {splits}.")
    elif hasattr(corpus, "column_names") and hasattr(corpus, "select_columns"):
        yield from _dataset_documents(corpus, keys)
    elif isinstance(corpus, Iterable):
        yield from _item_documents(corpus, keys, stream)
    else:
        raise UsageError(
            f"Expected paths, a `datasets` object or texts, got {type(corpus).__name__}."
        )


def paths_of(corpus: Any) -> list[Path]:
    """Return the paths of a corpus: itself or some of its items; none of an iterator.

    An iterator can be gone through once only.
    """
    if isinstance(corpus, str | Path):
        return [Path(corpus)]
    if isinstance(corpus, list | tuple):
        return [item for item in corpus if isinstance(item, Path)]
    return []


def files_of(paths: Iterable[Path]) -> list[Path]:
    """Return the files that are read where the corpus is `paths`: files or folders."""
    return [file for path in paths for file in (_folder_files(path) if path.is_dir() else [path])]


def is_read_in_folder(name: str) -> bool:
    """Return whether a file of this name is read where a folder is the corpus.

    Not so a plain `.json`: most of those in folders are settings.
    """
    kind = _kind(Path(name))
    return kind in _TEXT_SUFFIXES or (
        kind in TABLE_READERS and (kind != ".json" or is_compressed(Path(name)))
    )


def is_table(path: Path) -> bool:
    """Return whether a file has columns."""
    return _kind(path) in TABLE_READERS


def _path_documents(path: Path, keys: Keys, stream: bool) -> Iterator[Document]:
    if path.is_dir():
        files = _folder_files(path)
        if not files:
            raise CorpusError(
                f"{path} holds no file of a known kind. Expected .txt, .text, .md, .jsonl, "
                ".ndjson, .csv, .tsv (also .gz, .zst, .bz2, .xz), .parquet, or compressed .json."
            )
        for file in files:
            yield from _file_documents(file, keys, stream)
    elif path.is_file():
        yield from _file_documents(path, keys, stream)
    else:
        raise CorpusError(
            f"There is no file or folder {str(path)!r}. To pass text itself, give a list: ['text']."
        )


def _folder_files(folder: Path) -> list[Path]:
    """Return the files of known kinds below `folder`, but hidden ones, by relative path."""
    found = []
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if not hidden and is_read_in_folder(path.name) and path.is_file():
            found.append((parts, path))
    return [path for _, path in sorted(found)]


def _kind(path: Path) -> str:
    """Return the suffix that says what the file is, without that of its compression."""
    return (Path(path.stem) if is_compressed(path) else path).suffix.lower()


def _file_documents(path: Path, keys: Keys, stream: bool) -> Iterator[Document]:
    kind = _kind(path)
    if kind in TABLE_READERS:
        yield from table_documents(path, kind, keys)
    else:
        yield _text_document(path, keys, stream)


def _text_document(path: Path, keys: Keys, stream: bool) -> Document:
    if keys.beside_text:
        raise UsageError(
            f"{path} is a text file, one document without columns, so no {keys.beside_text!r}. Use "
            "a table (JSON Lines, CSV, Parquet) for domains, prompts and columns to keep."
        )
    file = open_bytes(path)
    data = file.read(LONG_CHARACTERS + 1 if stream else -1)
    check_is_no_utf16(data[:_NUL_BYTES], path)
    if stream and len(data) > LONG_CHARACTERS:
        pieces = decoded_pieces(path, data, file)
        return Document("", str(path), source_file=str(path), long_text=pieces)
    file.close()
    return Document(decoded(data, str(path)), str(path), source_file=str(path))


def _dataset_documents(dataset: Any, keys: Keys) -> Iterator[Document]:
    if dataset.column_names is not None:  # an IterableDataset may not know them
        check_columns(dataset.column_names, keys, "the dataset")
        dataset = dataset.select_columns(keys.names)
    for number, row in enumerate(dataset):
        yield row_document(row, keys, f"row {number} of the dataset", source_row=number)


def _item_documents(items: Iterable[Any], keys: Keys, stream: bool) -> Iterator[Document]:
    for number, item in enumerate(items):
        origin = f"item {number} of the list"
        if isinstance(item, Path):
            yield from _path_documents(item, keys, stream)
        elif isinstance(item, Mapping):
            yield row_document(item, keys, origin, source_row=number)
        elif isinstance(item, str) and not keys.beside_text:
            _check_is_text(item, origin)
            yield Document(item, origin, source_row=number)
        elif isinstance(item, str):
            rows = f"[{{'text': …, {keys.beside_text!r}: …}}]"
            raise UsageError(
                f"{origin} is a text; texts have no {keys.beside_text!r}. Give rows: {rows}."
            )
        else:
            raise UsageError(f"{origin} is a {type(item).__name__}, expected a text, row or Path.")


def _check_is_text(item: str, origin: str) -> None:
    """Raise UsageError for a text that is surely meant as a path: nobody scores a file's name."""
    # os.path's answer for a name that no file can have (its UTF-8 too long, a NUL) is no.
    if len(item) < _LONGEST_PATH and "\n" not in item and os.path.isfile(item):
        raise UsageError(
            f"{origin}, {item!r}, is the name of a file: give pathlib.Path objects for files."
        )
