"""Short contexts drawn at random from articles; a seed gives the same ones in every run.

Shape suffixes: N = contexts, T = ids of a context.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import CorpusError, UsageError
from perplexit.igf.articles import Articles, read_articles

_BLOCK = 256  # candidates drawn from one random generator


@dataclass(frozen=True)
class Contexts:
    """Windows of one length: ids int32 [N, T], and the fingerprint of each one's article."""

    ids_NT: NDArray[np.int32]
    article_N: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids_NT)

    def fingerprint(self) -> str:
        """Return the SHA-256 of ids and articles."""
        content = hashlib.sha256(repr(self.ids_NT.shape).encode())
        content.update(self.ids_NT.astype("<i4").tobytes() + self.article_N.astype("<i8").tobytes())
        return content.hexdigest()


class ContextStream:
    """Candidate contexts by number: each is a random window of a random article.

    Articles are drawn with equal probability, as in the original, and so are the windows of an
    article. A candidate follows from the seed and its number alone, so a checkpoint keeps only the
    number of the next one.
    """

    def __init__(self, articles: Articles, length: int, seed: int) -> None:
        if length < 2:
            raise UsageError(f"expected contexts of at least 2 ids, got {length}")
        self._articles = articles.longer_than(length - 1)
        self._fingerprints = self._articles.fingerprints()
        self._lengths = np.array([len(ids) for ids in self._articles.ids])
        self._length = length
        self._seed = seed

    def take(self, start: int, count: int) -> Contexts:
        """Return candidates `start … start + count - 1`."""
        first, last = start // _BLOCK, (start + max(1, count) - 1) // _BLOCK
        drawn = [self._block(number) for number in range(first, last + 1)]
        offset = start - first * _BLOCK
        article, begin = np.concatenate(drawn, axis=1)[:, offset : offset + count]
        ids = [
            self._articles.ids[a][b : b + self._length] for a, b in zip(article, begin, strict=True)
        ]
        return Contexts(
            np.array(ids, dtype=np.int32).reshape(count, self._length), self._fingerprints[article]
        )

    def _block(self, number: int) -> NDArray[np.int64]:
        """Return the articles of the block's candidates, and their first ids' places in them."""
        random = np.random.default_rng([self._seed, number])
        article = random.integers(0, len(self._articles), _BLOCK)
        begin = random.integers(0, self._lengths[article] - self._length + 1)
        return np.stack([article, begin])


def derived_seed(*numbers: int) -> int:
    """Return a seed that follows from these numbers and is unlike those of other numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def objective_contexts(
    articles: Articles, *, number: int = 100, length: int = 32, min_len: int = 1026, seed: int = 0
) -> Contexts:
    """Draw `number` windows from articles longer than `min_len` ids, one from each article.

    Where there are fewer articles than `number`, each gives further windows in turn.
    """
    if number < 1:
        raise UsageError(f"expected at least 1 context in the objective set, got {number}")
    chosen = articles.longer_than(max(min_len, length - 1))
    random = np.random.default_rng(seed)
    rounds = [i % len(chosen) for i in range(number)]
    ids = np.empty((number, length), dtype=np.int32)
    for row, article in enumerate(rounds):
        begin = int(random.integers(0, len(chosen.ids[article]) - length + 1))
        ids[row] = chosen.ids[article][begin : begin + length]
    return Contexts(ids, chosen.fingerprints()[rounds])


def train_and_test(
    corpus: Any,
    test: Any = None,
    *,
    part: Literal["test", "objective"] = "test",
    tokenizer: Any = None,
    number: int = 100,
    length: int = 32,
    min_len: int = 1026,
    seed: int = 0,
    allow_pickle: bool = False,
) -> tuple[Articles, Contexts]:
    """Return articles to train on and contexts to test on, disjoint by article.

    test: a corpus of its own; None: the part `part` of the hash split of `corpus`, of which the
        third part is left out.
    part: "objective" for contexts that gains are measured on; `collect_pairs` then checks that
        the contexts that it is given are of other articles.
    """
    articles = read_articles(corpus, tokenizer, allow_pickle=allow_pickle)
    if test is None:
        train, held = articles.split("train"), articles.split(part)
    else:
        train, held = articles, read_articles(test, tokenizer, allow_pickle=allow_pickle)
    contexts = objective_contexts(held, number=number, length=length, min_len=min_len, seed=seed)
    if part == "test":
        check_disjoint(train=train, test=contexts)
    return train, contexts


def contexts_of(data: Any, context_len: int) -> Contexts:
    """Return Contexts from Contexts, or from rows of at least `context_len` ids, cut there."""
    if isinstance(data, Contexts):
        return data
    rows = [np.asarray(row).reshape(-1)[:context_len] for row in data]
    if not rows or min(map(len, rows)) < context_len:
        raise UsageError(
            f"expected contexts of {context_len} ids, got "
            f"{min(map(len, rows)) if rows else 'none'}; take them from generate_datasets"
        )
    articles = Articles.of(data)
    return Contexts(np.stack(rows).astype(np.int32), articles.fingerprints())


def check_disjoint(**contexts_or_articles: Contexts | Articles) -> None:
    """Raise CorpusError where an article is in two of the named sets, which would be a leak."""
    seen: dict[int, str] = {}
    for name, item in contexts_or_articles.items():
        owned = item.article_N if isinstance(item, Contexts) else item.fingerprints()
        for fingerprint in set(owned.tolist()):
            other = seen.setdefault(fingerprint, name)
            if other != name:
                raise CorpusError(
                    f"expected disjoint articles, got one that is both in {other} and in {name}; "
                    "the model would be measured on what it was trained on; take it out of one"
                )
