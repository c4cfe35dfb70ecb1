"""Surprisal a word: the losses of tokens summed over the words that they spell.

A word is a maximal run of characters that are no white space, as `str.split()` finds it. A token's
loss goes to one word, whole:

- to the word that holds the token's first byte that is no white space, so ` the` counts for `the`,
  whatever the blank's side in the vocabulary;
- a token of white space alone goes to the word that follows it, and at the document's end to the
  last word; `nll_white_space` says how much of the word's loss came that way;
- a token that reaches over several words goes to the first of them. All of them are marked
  `shares_token`, and a word without any token of its own has no loss (null, not 0).

So the sum over words is the sum over the scored tokens. That is the usual sum (the chain rule over
subwords). It is not the exact probability of a word: with blanks in front of words, whether a word
*ends* is decided by the token after it. Oh & Schuler 2024 (arXiv:2406.10851) and Pimentel & Meister
2024 (arXiv:2406.14561) correct for it with the whole distribution at each word's end, which a run
does not hold.

Shape suffixes: M = tokens in reading order; W = words.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from perplexit.errors import RunError, TokenFileError, UsageError
from perplexit.inputs.encoded_batch import white_space, word_starts
from perplexit.inputs.token_file import TokenFile
from perplexit.runs.run import Run
from perplexit.runs.run_text import RunText

COLUMNS = {
    "document": "index of the document in the input",
    "word_index": "index of the word in the document",
    "word": "the word's characters",
    "char_start": "offset of its first character in the document's text",
    "char_stop": "offset after its last character",
    "byte_start": "offset of its first byte in the document's UTF-8",
    "byte_stop": "offset after its last byte",
    "num_tokens": "tokens whose loss is counted for this word",
    "nll": "their loss in nats; null where none was scored",
    "surprisal_bits": "the same in bits",
    "nll_white_space": "the part of `nll` from tokens of white space alone, in nats",
    "complete": "every token that holds a byte of the word was scored, and is counted here",
    "shares_token": "a token holds bytes of this word and of another one",
}


def surprisal_of_words(run: Run, tokens: TokenFile | None = None) -> pa.Table:
    """Return one row per word, in reading order, with the columns of `COLUMNS`.

    tokens: the run's input, which holds the text of the tokens that were not scored too (a
        document's first token, a prompt); None: the file that the run was made from, where it is
        still there.
    A token that several windows scored counts once, with the most context.
    A document of white space alone has one row, with the word "".
    Raises UsageError where the input is needed and not there, FingerprintMismatchError for another
    input, RunError where the input has no text or the run is not complete.
    """
    tokens = input_of(run) if tokens is None else tokens
    if tokens is None:
        raise UsageError(
            "expected the run's input, got none: what the run was made from "
            f"({run.input_path or 'its place was not recorded'}) is not there any more; name the "
            "token file with --input (in Python: tokens=)"
        )
    text = RunText.of(run, tokens)
    if not text.has_text:
        raise RunError(
            "expected a run over text, got one over imported ids, which have no words; "
            "prepare the text itself"
        )
    return _word_table(text, text.values(run.tokens.nll))


def input_of(run: Run) -> TokenFile | None:
    """Return the token file of a run, if it is still at its place and unchanged."""
    if run.input_path is None or not Path(run.input_path).is_file():
        return None
    try:
        tokens = TokenFile.open(run.input_path)
    except TokenFileError:
        return None
    return tokens if tokens.input_fingerprint == run.input_fingerprint else None


def _word_table(text: RunText, nll_M: NDArray[np.float64]) -> pa.Table:
    raw = text.text_bytes
    begin_M, stop_M = text.byte_starts[:-1], text.byte_starts[1:]
    words = _Words.of(raw, text.document_byte_starts)
    word_M, only_blank_M = words.of_tokens(begin_M, stop_M)
    scored_M = np.isfinite(nll_M)
    num_words = len(words.start)
    count_W = np.bincount(word_M[scored_M], minlength=num_words)
    nll_W = np.bincount(word_M[scored_M], nll_M[scored_M], minlength=num_words)
    blank = scored_M & only_blank_M
    blank_W = np.bincount(word_M[blank], nll_M[blank], minlength=num_words)
    shares_W, cut_W = words.sharing_a_token(begin_M, stop_M)
    complete_W = ~cut_W & (np.bincount(word_M[~scored_M], minlength=num_words) == 0)
    spans = zip(words.start.tolist(), words.stop.tolist(), strict=True)
    base_W = text.document_byte_starts[words.document]
    before = _characters_before(raw)
    columns = {
        "document": pa.array(words.document, pa.int32()),
        "word_index": pa.array(words.index),
        "word": pa.array([raw[a:b].decode("utf-8") for a, b in spans], pa.string()),
        "char_start": pa.array(before[words.start] - before[base_W]),
        "char_stop": pa.array(before[words.stop] - before[base_W]),
        "byte_start": pa.array(words.start - base_W),
        "byte_stop": pa.array(words.stop - base_W),
        "num_tokens": pa.array(count_W, pa.int32()),
        "nll": pa.array(nll_W, mask=count_W == 0),
        "surprisal_bits": pa.array(nll_W / math.log(2), mask=count_W == 0),
        "nll_white_space": pa.array(blank_W, mask=count_W == 0),
        "complete": pa.array(complete_W),
        "shares_token": pa.array(shares_W),
    }
    return pa.table({name: columns[name] for name in COLUMNS})


@dataclass(frozen=True)
class _Words:
    """The words of all documents: bytes `start … stop - 1` of the joined text, in `document`.

    word_of_byte: the word that a byte belongs to, or follows (white space in front of a word
        counts for it; behind a document's last word, for that one).
    is_blank: per byte.
    """

    document: NDArray[np.int64]
    index: NDArray[np.int64]  # in the document
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    word_of_byte: NDArray[np.int64]
    is_blank: NDArray[np.bool_]

    @classmethod
    def of(cls, raw: bytes, document_starts: NDArray[np.int64]) -> "_Words":
        """Return the words of the documents that begin at `document_starts[:-1]`."""
        blank = white_space(raw)
        start = np.flatnonzero(word_starts(raw, document_starts[:-1]))
        ends = np.append(blank[1:], True) & ~blank
        ends[document_starts[1:] - 1] = ~blank[document_starts[1:] - 1]
        stop = np.flatnonzero(ends) + 1
        document = np.searchsorted(document_starts, start, side="right") - 1
        empty = np.setdiff1d(np.arange(len(document_starts) - 1), document)
        place = np.searchsorted(document, empty)
        start = np.insert(start, place, document_starts[empty])
        stop = np.insert(stop, place, document_starts[empty])
        document = np.insert(document, place, empty)
        first = np.searchsorted(document, document, side="left")
        return cls(
            document=document,
            index=np.arange(len(document)) - first,
            start=start,
            stop=stop,
            word_of_byte=_word_of_byte(stop, document, document_starts),
            is_blank=blank,
        )

    def of_tokens(
        self, begin_M: NDArray[np.int64], stop_M: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the word that each token's loss goes to, and which tokens are white space alone.

        A token without bytes (one character spelled by several tokens) goes where the byte before
        it goes.
        """
        solid = np.concatenate(([0], np.cumsum(~self.is_blank)))
        without_bytes = begin_M == stop_M
        only_blank_M = (solid[stop_M] == solid[begin_M]) & ~without_bytes
        at_M = np.where(without_bytes, np.maximum(begin_M - 1, 0), begin_M)
        return self.word_of_byte[at_M], only_blank_M

    def sharing_a_token(
        self, begin_M: NDArray[np.int64], stop_M: NDArray[np.int64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return for each word whether it shares a token, and whether its token begins before it.

        The first says that a token holds bytes of it and of another word. Bool [W] each.
        """
        solid = np.concatenate(([0], np.cumsum(~self.is_blank)))
        where = np.flatnonzero(~self.is_blank)  # the bytes that are in words, in order
        holds = solid[stop_M] > solid[begin_M]
        first_M = self.word_of_byte[where[solid[begin_M[holds]]]]
        last_M = self.word_of_byte[where[solid[stop_M[holds]] - 1]]
        over = last_M > first_M
        first, last = first_M[over], last_M[over]
        num_words = len(self.start)
        return _covered(first, last, num_words), _covered(first + 1, last, num_words)


def _covered(
    first: NDArray[np.int64], last: NDArray[np.int64], num_words: int
) -> NDArray[np.bool_]:
    """Return which words lie in any of the ranges `first … last`: bool [num_words]."""
    change = np.zeros(num_words + 1, dtype=np.int64)
    np.add.at(change, first, 1)
    np.add.at(change, last + 1, -1)
    inside: NDArray[np.bool_] = np.cumsum(change)[:-1] > 0
    return inside


def _word_of_byte(
    stop_W: NDArray[np.int64], document_W: NDArray[np.int64], document_starts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the first word that ends behind each byte, and at a document's end its last word."""
    word = np.searchsorted(stop_W, np.arange(document_starts[-1]), side="right")
    last_D = np.searchsorted(document_W, np.arange(len(document_starts) - 1), side="right") - 1
    own: NDArray[np.int64] = np.minimum(word, np.repeat(last_D, np.diff(document_starts)))
    return own


def _characters_before(raw: bytes) -> NDArray[np.int64]:
    """Return how many characters begin before each byte and the end: int64 [len(raw) + 1]."""
    begins = (np.frombuffer(raw, dtype=np.uint8) & 0xC0) != 0x80
    return np.concatenate(([0], np.cumsum(begins, dtype=np.int64)))
