"""Long texts in parts: each document of more than a few megabytes is encoded piece by piece."""

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from perplexit.errors import TokenizerError
from perplexit.inputs.corpus_document import Document
from perplexit.inputs.corpus_tables import decoded
from perplexit.inputs.text_cuts import CutRule

LONG_CHARACTERS = 2_000_000  # from which on a text is encoded in parts
LARGEST_WHOLE = 32_000_000  # characters of a text (or a part) that has no place for a cut
PART_CHARACTERS = 1 << 17
_PIECE = 1 << 20
_SEARCHED = 1 << 16  # characters in which a cut is looked for at a time


def in_memory_or_long(found: Iterable[Document]) -> Iterator[Document]:
    """Yield the documents, with `text` for short ones and `long_text` for long ones."""
    for document in found:
        if document.long_text is None:
            text = document.text or ""
            is_long = len(text) > LONG_CHARACTERS
            yield replace(document, text="", long_text=_slices(text)) if is_long else document
            continue
        pieces, begin, size = iter(document.long_text), [], 0
        for piece in pieces:
            begin.append(piece)
            size += len(piece)
            if size > LONG_CHARACTERS:
                yield replace(document, text="", long_text=chain(begin, pieces))
                break
        else:
            yield replace(document, text="".join(begin), long_text=None)


def _slices(text: str) -> Iterator[str]:
    for start in range(0, len(text), _PIECE):
        yield text[start : start + _PIECE]


def decoded_pieces(path: Path, begin: bytes, file: BinaryIO) -> Iterator[str]:
    """Yield the text of a file, of which `begin` is read already, piece by piece.

    Raises CorpusError for bytes that are no UTF-8, with their offset.
    """
    offset, rest = 0, b""
    with file:
        for data in chain([begin], iter(lambda: file.read(_PIECE), b"")):
            rest += data
            try:
                text, used = codecs.utf_8_decode(rest, "strict", False)
            except UnicodeDecodeError:
                decoded(rest, str(path), offset)  # raises, and says where
                raise
            yield text
            offset, rest = offset + used, rest[used:]
    if rest:
        yield decoded(rest, str(path), offset)


def parts_of(pieces: Iterable[str], rule: CutRule, name: str) -> Iterator[str]:
    """Yield the text in parts that may be encoded one by one, by the tokenizer's rule.

    Raises TokenizerError where more than LARGEST_WHOLE characters have no place for a cut.
    """
    held, buffer, searched = "", "", PART_CHARACTERS
    for piece in pieces:
        buffer += piece
        while rule.cuts and len(buffer) > searched + rule.margin + 1:
            window = buffer[: searched + _SEARCHED + rule.margin + 1]
            place = rule.find(window, searched)
            if place is None:
                searched = max(searched + 1, len(window) - rule.margin - 1)
                continue
            if held:
                yield held
            held, buffer, searched = buffer[:place], buffer[place:], PART_CHARACTERS
        if len(buffer) > LARGEST_WHOLE:
            why = f" ({rule.reason})" if rule.reason else ""
            raise TokenizerError(
                f"expected a text that can be encoded in parts, got {name}, of which "
                f"{LARGEST_WHOLE:,} characters and more have no place where this tokenizer lets a "
                f"text be cut without changing its tokens{why}. Divide it into documents, for "
                "example one for each line or chapter, or take another tokenizer."
            )
    if buffer.strip() or not held:
        if held:
            yield held
        yield buffer
    else:  # blanks alone may have no tokens, and belong to the token before them
        yield held + buffer
