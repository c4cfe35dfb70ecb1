"""Articles as token ids, and their three disjoint splits by a stable hash."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import CorpusError, UsageError
from perplexit.igf.pickles import read_pickle
from perplexit.igf.tensors_with_record import PICKLE_SUFFIXES, TensorFile, tensor_path
from perplexit.inputs.corpus import documents
from perplexit.inputs.corpus_document import Keys
from perplexit.inputs.tokenizer_sources import load_tokenizer

Split = Literal["train", "objective", "test"]
_FILE = TensorFile("tokenised articles")
_TEXTS_PER_BATCH = 16
_TEXT = (str, Path, dict)  # what a sequence of texts holds, not one of ids


@dataclass(frozen=True)
class Articles:
    """Token ids, one int32 array per article, each with a name for messages and records."""

    ids: tuple[NDArray[np.int32], ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, ids: Iterable[Any], names: Sequence[str] | None = None) -> "Articles":
        """Make articles from sequences of ids; a leading axis of 1, as in the original, is dropped.

        Raises CorpusError for anything but whole numbers of at least 0.
        """
        try:
            arrays = tuple(_checked(item, number) for number, item in enumerate(ids))
        except (TypeError, ValueError) as error:
            raise CorpusError(
                f"expected articles as sequences of token ids, got something else ({error})"
            ) from None
        return cls(arrays, tuple(names or (f"article {i}" for i in range(len(arrays)))))

    def take(self, indices: Iterable[int]) -> "Articles":
        """Return the articles at these indices, in that order."""
        chosen = list(indices)
        return Articles(tuple(self.ids[i] for i in chosen), tuple(self.names[i] for i in chosen))

    def longer_than(self, min_len: int) -> "Articles":
        """Return the articles of more than `min_len` ids.

        Raises CorpusError where there is none.
        """
        chosen = self.take(i for i, ids in enumerate(self.ids) if len(ids) > min_len)
        if not len(chosen):
            longest = max((len(ids) for ids in self.ids), default=0)
            raise CorpusError(
                f"expected articles longer than {min_len} ids, got {len(self)} of which the "
                f"longest has {longest} ids; give longer texts, or a smaller --min-length "
                "(min_len in Python)"
            )
        return chosen

    def fingerprints(self) -> NDArray[np.int64]:
        """Return 63 bits of the SHA-256 of each article's ids, int64 [articles]."""
        return np.array([_hash(ids) >> 1 for ids in self.ids], dtype=np.int64)

    def split(self, part: Split, *, objective: float = 0.2, test: float = 0.2) -> "Articles":
        """Return the articles of one of three disjoint parts.

        An article's part follows from its content alone: it stays there when other articles are
        added or removed, and two copies of one text are never in two parts.
        """
        if not (objective > 0 and test > 0 and objective + test < 1):
            raise UsageError(
                "expected shares above 0 whose sum is below 1 for objective and test, got "
                f"{objective} and {test}"
            )
        bounds = {"objective": (0.0, objective), "test": (objective, objective + test)}
        low, high = bounds.get(part, (objective + test, 1.0))
        chosen = [i for i, ids in enumerate(self.ids) if low <= _hash(ids) / 2**64 < high]
        if not chosen:
            raise CorpusError(
                f"expected articles for the split {part}, got none of {len(self)}; "
                "give more articles, or a larger share"
            )
        return self.take(chosen)

    def save(self, path: str | Path) -> Path:
        """Write the articles as a safetensors file; return its path."""
        lengths = np.array([len(ids) for ids in self.ids], dtype=np.int64)
        flat = np.concatenate(self.ids) if self.ids else np.zeros(0, np.int32)
        return _FILE.write(path, {"ids": flat, "lengths": lengths}, {"names": list(self.names)})

    @classmethod
    def open(cls, path: str | Path) -> "Articles":
        """Return the articles that `save` wrote. Raises StoredFileError for any other file."""
        with _FILE.opened(path) as (tensors, record):
            ids, lengths, names = tensors["ids"], tensors["lengths"], record["names"]
            kinds = ids.dtype.kind == lengths.dtype.kind == "i" and ids.ndim == lengths.ndim == 1
            if not kinds or int(lengths.min(initial=0)) < 0 or int(ids.min(initial=0)) < 0:
                raise ValueError("ids or lengths that are none")
            if int(lengths.sum()) != len(ids) or len(names) != len(lengths):
                raise ValueError(f"{len(names)} names and {int(lengths.sum())} of {len(ids)} ids")
            bounds = np.cumsum(lengths)[:-1]
            return cls(tuple(np.split(ids, bounds)), tuple(map(str, names)))


def read_articles(
    corpus: Any, tokenizer: Any = None, *, text_key: str = "text", allow_pickle: bool = False
) -> Articles:
    """Return the articles of a corpus, one per document, tokenised without special tokens.

    corpus:    Articles; a `.safetensors` file of them; text, JSON Lines, Parquet, a folder or
        several paths of those; sequences of ids; or, with `allow_pickle`, the original's `.jbl`.
    tokenizer: anything that `perplexit prepare --tokenizer` takes; needed for text.
    """
    if isinstance(corpus, Articles):
        return corpus
    if isinstance(corpus, str | Path):
        stored = tensor_path(corpus)
        if stored.suffix == ".safetensors" and stored.exists():
            return Articles.open(stored)
        if Path(corpus).suffix in PICKLE_SUFFIXES:
            return Articles.of(read_pickle(corpus, allowed=allow_pickle))
    elif isinstance(corpus, list | tuple) and not isinstance(next(iter(corpus), ""), _TEXT):
        return Articles.of(corpus)
    if tokenizer is None:
        raise UsageError(f"expected a tokenizer for the text in {corpus}; name one")
    return _tokenised(corpus, tokenizer, text_key)


def _tokenised(corpus: Any, tokenizer: Any, text_key: str) -> Articles:
    loaded = load_tokenizer(tokenizer)
    found = [d for d in documents(corpus, Keys(text=text_key)) if d.text and d.text.strip()]
    if not found:
        raise CorpusError(f"expected at least one article with text in it, got none in {corpus}")
    ids: list[NDArray[np.int32]] = []
    for start in range(0, len(found), _TEXTS_PER_BATCH):
        texts = [d.text for d in found[start : start + _TEXTS_PER_BATCH] if d.text]
        batch = loaded.encode_batch(texts, first_document=start)
        ids += np.split(batch.ids, batch.document_starts[1:-1])
    return Articles(tuple(ids), tuple(Path(d.origin).name for d in found))


def _checked(item: Any, number: int) -> NDArray[np.int32]:
    ids = np.asarray(item)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise CorpusError(
            f"expected article {number} as one row of token ids, got {ids.dtype} of shape "
            f"{ids.shape}; tokenise it first"
        )
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= 2**31):
        raise CorpusError(f"expected token ids of at least 0 in article {number}")
    return ids.astype(np.int32)


def _hash(ids: NDArray[np.int32]) -> int:
    digest = hashlib.sha256(b"perplexit igf article" + ids.astype("<i4").tobytes()).digest()
    return int.from_bytes(digest[:8], "big")
