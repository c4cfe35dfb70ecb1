"""How two texts differ: the first differing place, and what would make them equal."""

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np

from perplexit.runs.run_text import RunText

CONTEXT_CHARACTERS = 30
MAX_CHARACTERS = 20_000_000  # beyond it, only the first difference is looked for
_COARSE = {"whitespace", "letter case"}  # they hide what the others tell apart
_BETWEEN = "\x1e"  # stands between documents; no text file holds a record separator
_MOST_AT_ONCE = 3

# What turns one of two common versions of a text into the other, the mildest first.
_NORMALISATIONS: dict[str, Callable[[str], str]] = {
    "newlines": lambda text: text.replace("\r\n", "\n").replace("\r", "\n"),
    "byte order mark": lambda text: text.replace("\ufeff", ""),
    "trailing whitespace": lambda text: re.sub(r"[ \t]+(?=[\n\r\x1e]|\Z)", "", text),
    "outer whitespace": lambda text: re.sub(
        r"\A\s+|\s+\Z", "", re.sub(r"\s*\x1e\s*", "\x1e", text)
    ),
    "document joining": lambda text: text.replace(_BETWEEN, "\n\n"),
    "Unicode form": lambda text: unicodedata.normalize("NFC", text),
    "blank lines": lambda text: re.sub(r"\n(?:[ \t]*\n)+", "\n", text),
    "whitespace": lambda text: re.sub(r"\s+", "", text),
    "letter case": str.casefold,
}


class FirstDifference(NamedTuple):
    """Where two texts part: offsets in the document, and what stands there on both sides."""

    document: int
    byte: int
    character: int
    first: str
    second: str

    def __str__(self) -> str:
        return (
            f"they part at byte {self.byte:,} (character {self.character:,}) of document "
            f"{self.document:,}: {self.first!r} and {self.second!r}"
        )


def documents_of_run(text: RunText) -> list[bytes]:
    """Return the UTF-8 in a run's rows; what was not scored is zeros, or missing at the end."""
    edges = text.document_byte_starts.tolist()
    return [text.text_bytes[begin:end] for begin, end in pairwise(edges)]


def first_difference(first: Sequence[bytes], second: Sequence[bytes]) -> FirstDifference | None:
    """Return the first place where two texts part; None where they are equal."""
    for document in range(max(len(first), len(second))):
        one = first[document] if document < len(first) else b""
        other = second[document] if document < len(second) else b""
        if one != other:
            byte = _first_byte(one, other)
            before = one[:byte].decode("utf-8", errors="ignore")
            return FirstDifference(
                document, byte, len(before), _around(one, byte), _around(other, byte)
            )
    return None if len(first) == len(second) else FirstDifference(len(second), 0, 0, "", "")


def text_aspects(first: Sequence[bytes], second: Sequence[bytes]) -> tuple[str, ...]:
    """Return the smallest set of normalisations that makes the texts equal, by name.

    `("newlines",)` for a file that was read with newline translation. Where none does, the words
    themselves differ: `("text",)`. Empty for equal texts.
    """
    one, other = (_BETWEEN.join(map(_decoded, side)) for side in (first, second))
    if one == other:
        return ()
    if len(one) + len(other) <= MAX_CHARACTERS:
        for names in _candidates(one, other):
            if _normalised(one, names) == _normalised(other, names):
                return names
    return ("text",)


def _candidates(one: str, other: str) -> Iterator[tuple[str, ...]]:
    """Yield sets of normalisations that change one of the texts: mild first, then small."""
    active = [
        name
        for name, apply in _NORMALISATIONS.items()
        if apply(one) != one or apply(other) != other
    ]
    sets = [names for size in range(1, _MOST_AT_ONCE + 1) for names in combinations(active, size)]
    yield from sorted(sets, key=lambda names: not _COARSE.isdisjoint(names))


def _normalised(text: str, names: Sequence[str]) -> str:
    for name in names:
        text = _NORMALISATIONS[name](text)
    return text


def _first_byte(one: bytes, other: bytes) -> int:
    length = min(len(one), len(other))
    differ = np.frombuffer(one, np.uint8, length) != np.frombuffer(other, np.uint8, length)
    return int(np.argmax(differ)) if differ.any() else length


def _around(data: bytes, byte: int) -> str:
    before = _decoded(data[max(0, byte - 4 * CONTEXT_CHARACTERS) : byte])[-CONTEXT_CHARACTERS:]
    after = _decoded(data[byte : byte + 4 * CONTEXT_CHARACTERS])[:CONTEXT_CHARACTERS]
    return before + after


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")
