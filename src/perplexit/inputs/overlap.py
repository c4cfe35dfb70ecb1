"""ngram_overlap: how much of a test text is in other data too (calibration, training).

The perplexity of a model on text that it was trained or calibrated on says nothing. Words are
compared, not tokens, so that the two may have different tokenizers.

Shape suffixes: A = words of one side with a separator after each document, G = its n-grams.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import CorpusError, UsageError
from perplexit.inputs.corpus import documents
from perplexit.inputs.corpus_document import Keys
from perplexit.inputs.token_file import TokenFile

Texts = TokenFile | str | Path | Iterable[str]

_WORD = re.compile(r"\w+")
_NUM_EXAMPLES = 3
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd: nothing is lost on the way


@dataclass(frozen=True, slots=True)
class NgramOverlap:
    """What two texts share, in words of the first; case and punctuation do not count.

    num_shared_words: words of the first that lie in a run of `n` or more words which the second
                      has too. num_untested_documents: documents of the first shorter than n words,
                      of which nothing can be said.
    examples:         the first few n-grams that both have.
    """

    n: int
    num_words: int
    num_shared_words: int
    num_documents: int
    num_shared_documents: int
    num_untested_documents: int
    examples: tuple[str, ...]

    @property
    def share(self) -> float:
        """Return `num_shared_words / num_words`."""
        return self.num_shared_words / self.num_words

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain JSON values."""
        return asdict(self) | {"share": self.share}

    def __str__(self) -> str:
        example = f"; the first: {self.examples[0]!r}" if self.examples else ""
        return (
            f"{self.share:.2%} of {self.num_words:,} words, in {self.num_shared_documents:,} of "
            f"{self.num_documents:,} documents, stand in the other text too (runs of {self.n} "
            f"words or more){example}"
        )


def ngram_overlap(
    test: Texts, other: Texts, *, n: int = 13, text_key: str = "text"
) -> NgramOverlap:
    """Count the words of `test` that lie in an n-gram which `other` has too.

    Each is a token file, the path of one or of a corpus (with `text_key`), or an iterable of texts.
    13 words is what GPT-3's authors took (Brown et al. 2020, appendix C): shorter runs are shared
    by chance, longer ones miss copies with small changes.
    Raises UsageError for n below 1, CorpusError where `test` has no word.
    """
    if n < 1:
        raise UsageError(f"n must be at least 1 word, got {n}; 13 is usual")
    vocabulary: dict[str, int] = {}
    ids_A, document_A = _word_ids(_texts(test, text_key), vocabulary, grow=True)
    others_A, _ = _word_ids(_texts(other, text_key), vocabulary, grow=False)
    is_word_A = ids_A > 0
    if not is_word_A.any():
        raise CorpusError("expected a test text with words in it, got none: name another text")
    grams_G, known_G = _hashes(ids_A, n)
    others_G, other_known_G = _hashes(others_A, n)
    shared_G = known_G & np.isin(grams_G, np.unique(others_G[other_known_G]))
    covered_A = _covered(shared_G, n, len(ids_A))
    names = list(vocabulary)
    lengths_D = np.bincount(document_A[is_word_A], minlength=int(document_A.max()) + 1)
    return NgramOverlap(
        n=n,
        num_words=int(is_word_A.sum()),
        num_shared_words=int(covered_A.sum()),
        num_documents=len(lengths_D),
        num_shared_documents=len(np.unique(document_A[covered_A])),
        num_untested_documents=int(np.count_nonzero(lengths_D < n)),
        examples=tuple(
            " ".join(names[word - 1] for word in ids_A[start : start + n].tolist())
            for start in np.flatnonzero(shared_G)[:_NUM_EXAMPLES].tolist()
        ),
    )


def _texts(source: Texts, text_key: str) -> Iterator[str]:
    if isinstance(source, str | Path) and Path(source).suffix == ".safetensors":
        source = TokenFile.open(source)
    if isinstance(source, TokenFile):
        if not source.has_text:
            raise CorpusError(f"{source.path} holds ids without text; name a file with the text")
        yield from (data.decode("utf-8", errors="replace") for data in source.documents_utf8())
    elif isinstance(source, str | Path):
        for document in documents(source, Keys(text_key)):
            yield (document.prompt or "") + (document.text or "")
    else:
        yield from source


def _word_ids(
    texts: Iterable[str], vocabulary: dict[str, int], *, grow: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (word ids from 1, or 0 after a document and for an unknown word; documents)."""
    ids: list[int] = []
    lengths = []
    for text in texts:
        before = len(ids)
        for word in _WORD.findall(text.casefold()):
            if grow:
                vocabulary.setdefault(word, len(vocabulary) + 1)
            ids.append(vocabulary.get(word, 0))
        ids.append(0)
        lengths.append(len(ids) - before)
    return np.array(ids, dtype=np.int64), np.repeat(np.arange(len(lengths)), lengths)


def _hashes(ids_A: NDArray[np.int64], n: int) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Return (a 64-bit hash of each n-gram, is it in one document with known words alone)."""
    num_grams = max(len(ids_A) - n + 1, 0)
    hashes_G = np.zeros(num_grams, dtype=np.uint64)
    known_G = np.ones(num_grams, dtype=np.bool_)
    for offset in range(n):
        word_G = ids_A[offset : offset + num_grams]
        known_G &= word_G > 0
        hashes_G = (hashes_G ^ word_G.astype(np.uint64)) * _MULTIPLIER
        hashes_G ^= hashes_G >> np.uint64(29)
    return hashes_G, known_G


def _covered(shared_G: NDArray[np.bool_], n: int, length: int) -> NDArray[np.bool_]:
    """Return which words lie in at least one shared n-gram."""
    edges = np.zeros(length + 1, dtype=np.int64)
    starts = np.flatnonzero(shared_G)
    np.add.at(edges, starts, 1)
    np.add.at(edges, starts + n, -1)
    covered: NDArray[np.bool_] = np.cumsum(edges[:-1]) > 0
    return covered
