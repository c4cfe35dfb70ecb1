"""The contenders: how each one is opened, what it scores, and what one of its turns gives back.

With `--against`, this module, `workers` and `perplexit_contenders` run over an older version: they
use only what older versions have.
"""

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import perplexit as px

open_token_file = cache(px.TokenFile.open)


@dataclass(frozen=True, slots=True)
class Setting:
    """What a contender is opened with: a checkpoint folder, and a program of it or None."""

    model: str
    dtype: str
    threads: int
    program: str | None = None
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Workload:
    """A token file of one text's windows, each of `max_length` ids, the last target included.

    strided:    windows advance by half a window and score what is new, as the guide of Hugging Face
        does. Else windows share one id with the one before, so that every id but the text's first
        is scored once, with the context that lm-evaluation-harness gives it.
    batch_size: windows per call, for those contenders that can be told; None: their own default.
    """

    path: Path
    max_length: int
    strided: bool = False
    batch_size: int | None = None

    @property
    def tokens(self) -> px.TokenFile:
        """Return the token file, which is opened once."""
        return open_token_file(self.path)

    def windows(self) -> list[Any]:
        """Return the ids of each window and the positions in it that are scored."""
        return [self.tokens.window_ids(index) for index in range(self.tokens.num_windows)]


@dataclass(frozen=True, slots=True)
class Scored:
    """What a turn gives back.

    nll_sum: nats; None where the turn has no loss (a bare product of matrices, labels of gain).
    num_tokens: what the turn made: scored tokens, or labels.
    own_perplexity: the tool's own aggregate, where it is not exp(nll_sum / num_tokens).
    seconds: of the part that counts, where that is not the whole turn.
    nll:     of each token, in the text's order, where the contender gives them.
    flops:   floating-point operations of one forward pass over the workload, a multiply-add
        counting as two: "products" of weight matrices, the head on scored rows alone, and
        "attention" (the causal half); given by the ceiling alone.
    """

    nll_sum: float | None
    num_tokens: int
    own_perplexity: float | None = None
    seconds: float | None = None
    nll: list[float] | None = None
    flops: dict[str, float] | None = None


# An opened contender. One with a method `prepare` is given the workload there before its turns.
Score = Callable[[Workload], Scored]


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to score.

    opener:  `module:function` of this package; the function takes a Setting and returns a Score. It
        is imported in the worker process alone, because each one brings its own libraries.
    options: keyword arguments of the function.
    program: keyword arguments of `perplexit.compile`, which is called first; None: no program.
    without: an engine trick that is switched off. before: whether the version of `--against` runs.
    """

    opener: str
    options: Mapping[str, Any] = field(default_factory=dict)
    program: Mapping[str, Any] | None = None
    without: str = ""
    before: bool = False


CEILING = "gemm"
TABLES = tomllib.loads((Path(__file__).parent / "sections.toml").read_text(encoding="utf-8"))
CONTENDERS = {name: Contender(**entry) for name, entry in TABLES["contenders"].items()}


def contender_named(name: str) -> Contender:
    """Return the contender NAME, also as `NAME without TRICK` and `NAME, before`.

    Raises KeyError for a name that CONTENDERS does not have.
    """
    named, _, trick = name.partition(" without ")
    plain = named.removesuffix(", before")
    return replace(CONTENDERS[plain], without=trick, before=plain != named)
