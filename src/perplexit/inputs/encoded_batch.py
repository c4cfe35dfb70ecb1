"""EncodedBatch: ids, and the exact UTF-8 bytes and the words that each of them stands for.

Where the vocabulary's spelling of the tokens, put end to end, *is* the text (byte-level BPE,
SentencePiece without a normaliser), it gives a token's bytes. Elsewhere (case folding, NFKC,
unknown tokens) character offsets do: a token gets the bytes up to the end of its span, so that what
no token covers goes to the next one. The bytes of a document's tokens sum to the document's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

# The code of every character that str.split() splits at
WHITE_SPACE = (
    *(*range(0x09, 0x0E), *range(0x1C, 0x21), 0x85, 0xA0, 0x1680),
    *(*range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000),
)
_ASCII_SPACE = np.isin(np.arange(256), [code for code in WHITE_SPACE if code < 0x80])
_WIDE_SPACES = tuple(chr(code).encode() for code in WHITE_SPACE if code >= 0x80)


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """Documents as ids, end to end.

    ids:             int32 [n].
    document_starts: int64 [D + 1], where each document's ids begin.
    byte_starts:     int64 [n + 1], where each token's bytes begin in `text_bytes`.
    num_words:       int64 [n], words that begin in each token: as str.split() finds them, or as
                     the protocol's tool counts them (`with_split_words`).
    text_bytes:      the UTF-8 of all documents.
    """

    ids: NDArray[np.int32]
    document_starts: NDArray[np.int64]
    byte_starts: NDArray[np.int64]
    num_words: NDArray[np.int64]
    text_bytes: bytes

    def document(self, index: int) -> "EncodedBatch":
        """Return one document as a batch of its own."""
        begin, end = self.document_starts[index : index + 2].tolist()
        byte_starts = self.byte_starts[begin : end + 1]
        first, last = int(byte_starts[0]), int(byte_starts[-1])
        return EncodedBatch(
            self.ids[begin:end],
            np.array([0, end - begin]),
            byte_starts - first,
            self.num_words[begin:end],
            self.text_bytes[first:last],
        )

    @classmethod
    def of(
        cls,
        ids: NDArray[np.int32],
        ids_per_document: ArrayLike,
        bytes_per_token: NDArray[np.int64],
        texts_utf8: Sequence[bytes],
    ) -> "EncodedBatch":
        """Make the batch of these documents; the words are found here."""
        document_starts = _starts(np.asarray(ids_per_document, dtype=np.int64))
        byte_starts = _starts(bytes_per_token)
        text_bytes = b"".join(texts_utf8)
        text_starts = _starts(np.fromiter(map(len, texts_utf8), np.int64, len(texts_utf8)))
        before = _starts(word_starts(text_bytes, text_starts[:-1]).astype(np.int64))
        return cls(ids, document_starts, byte_starts, np.diff(before[byte_starts]), text_bytes)

    def with_split_words(self) -> "EncodedBatch":
        r"""Return the batch with its words counted as `len(re.split(r"\s+", document))` does.

        That is a word more where a document begins with white space, and one where it ends with it:
        the empty strings on the far side. They are counted in the first and the last token.
        """
        text_starts = self.byte_starts[self.document_starts]
        space = white_space(self.text_bytes)
        words = word_starts(self.text_bytes, text_starts[:-1]).astype(np.int64)
        filled_D = np.diff(text_starts) > 0
        for ends_D in (text_starts[:-1][filled_D], text_starts[1:][filled_D] - 1):
            np.add.at(words, ends_D[space[ends_D]], 1)
        return replace(self, num_words=np.diff(_starts(words)[self.byte_starts]))

    @classmethod
    def without_text(cls, ids: NDArray[np.int32], ids_per_document: ArrayLike) -> "EncodedBatch":
        """Make a batch of documents of which only the ids are known: no bytes, no words."""
        document_starts = _starts(np.asarray(ids_per_document, dtype=np.int64))
        nothing = np.zeros(len(ids) + 1, dtype=np.int64)
        return cls(ids, document_starts, nothing, nothing[1:], b"")


def word_starts(text_bytes: bytes, text_starts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for each byte whether a word begins there: bool [len(text_bytes)].

    A word is a maximal run of characters that are no white space, as `str.split()` has it; one
    never reaches across `text_starts`, where documents begin.
    """
    space = white_space(text_bytes)
    begins = ~space
    begins[1:] &= space[:-1]
    starts = text_starts[text_starts < len(space)]
    begins[starts] = ~space[starts]
    return begins


def white_space(text_bytes: bytes) -> NDArray[np.bool_]:
    """Return for each byte whether its character is one that `str.split()` splits at.

    Bool [len(text_bytes)]; the bytes must be valid UTF-8.
    """
    data = np.frombuffer(text_bytes, dtype=np.uint8)
    space = _ASCII_SPACE[data]
    if text_bytes.isascii():
        return space
    leads = {byte: np.flatnonzero(data == byte) for byte in {code[0] for code in _WIDE_SPACES}}
    for pattern in _WIDE_SPACES:
        first = leads[pattern[0]]
        for step, byte in enumerate(pattern[1:], start=1):
            first = first[data[first + step] == byte]  # in range: the bytes are valid UTF-8
        for step in range(len(pattern)):
            space[first + step] = True
    return space


def bytes_from_spans(
    text: str,
    begin_chars: NDArray[np.int64],
    end_chars: NDArray[np.int64],
    own_lengths: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return how many bytes of `text` each token stands for, from character spans: int64 [n].

    own_lengths: the bytes that a token spells by itself, -1 where unknown. Tokens that share
    characters (byte fallback, byte-level pieces of one character) split them so, where that
    adds up; where it does not (one character expanded to several tokens) the first takes all
    and the rest get none. The sum over tokens is `len(text.encode())`.
    """
    byte_at = char_to_byte(text)
    begins = byte_at[begin_chars]
    reach = np.maximum.accumulate(byte_at[end_chars])
    opens = np.concatenate(([True], begins[1:] >= reach[:-1]))  # a group of overlapping spans
    heads = np.flatnonzero(opens)
    group = np.cumsum(opens) - 1
    known = np.where(own_lengths < 0, byte_at[-1] + 1, own_lengths)
    spelled = np.cumsum(known)
    spelled -= (spelled[heads] - known[heads])[group]
    tails = np.concatenate((heads[1:], [len(opens)])) - 1
    splits = spelled[tails] == reach[tails] - begins[heads]
    ends = np.where(splits[group], begins[heads][group] + spelled, reach)
    ends[-1] = byte_at[-1]
    return np.diff(np.maximum.accumulate(ends), prepend=0)


def char_to_byte(text: str) -> NDArray[np.int64]:
    """Return the byte offset of each character, and of the end: int64 [len(text) + 1]."""
    if text.isascii():
        return np.arange(len(text) + 1, dtype=np.int64)
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    width = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    return _starts(width)


def _starts(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    starts = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts
