"""The schema of per-token columns: one entry for each, for all that fills, stores or shows them.

Sessions give columns by these names, a run's parts and `tokens.parquet` store them, comparisons,
reports and exports read them, and `docs/file-formats.md` lists them. A new column is one entry here
and one computation: in `functional.nll` for one that follows from the logits.

Shape suffixes: N = targets of one window, K = alternatives for each target.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

A = TypeVar("A")


class Needs(StrEnum):
    """What a column is made of, and so what a session must be able to do to give it."""

    INPUT = "the input"
    LOSS = "the loss of each target"
    DISTRIBUTION = "whole distributions"
    ALTERNATIVES = "the most likely tokens (`--top-k`)"
    REFERENCE = "whole distributions and a reference"


@dataclass(frozen=True, slots=True)
class TokenColumn:
    """One per-token column.

    dtype:    NumPy's name of a value's type; "bytes" and "text" are not NumPy's.
    unit:     of a value; "" for a plain number.
    lowest, highest: the smallest and largest possible value.
    unknown:  what stands for a value that is not known; "" where every token has one.
    """

    name: str
    dtype: str
    unit: str
    needs: Needs
    meaning: str
    lowest: float = -math.inf
    highest: float = math.inf
    unknown: str = ""

    @property
    def optional(self) -> bool:
        """Return whether a table has the column only where it was asked for."""
        return self.needs in (Needs.ALTERNATIVES, Needs.REFERENCE)

    @property
    def is_list(self) -> bool:
        """Return whether each token has K values."""
        return self.needs is Needs.ALTERNATIVES


_INPUT, _LOSS, _DISTRIBUTION, _ALTERNATIVES, _REFERENCE = Needs
_ENTRIES = (
    TokenColumn("document", "int32", "", _INPUT, "index of the document in the input", 0),
    TokenColumn("domain", "text", "", _INPUT, "the document's domain", unknown="null"),
    TokenColumn("window", "int32", "", _INPUT, "row of the window table", 0),
    TokenColumn("position", "int32", "", _INPUT, "index in the ids fed to the window", 0),
    TokenColumn("token_index", "int64", "", _INPUT, "index in the document", 0),
    TokenColumn(
        "byte_start", "int64", "bytes", _INPUT, "offset in the document's UTF-8", unknown="-1"
    ),
    TokenColumn("num_bytes", "int32", "bytes", _INPUT, "length of the token in UTF-8", 0),
    TokenColumn("num_words", "int32", "", _INPUT, "words that begin in the token", 0),
    TokenColumn("token_id", "int32", "", _INPUT, "id in the vocabulary"),
    TokenColumn("token_bytes", "bytes", "", _INPUT, "the token's UTF-8", unknown="null"),
    TokenColumn("nll", "float32", "nats", _LOSS, "negative log-likelihood", 0),
    TokenColumn("entropy", "float32", "nats", _DISTRIBUTION, "of the predicted distribution", 0),
    TokenColumn("rank", "int32", "", _DISTRIBUTION, "1 = no token was more likely", 1),
    TokenColumn("top_ids", "int32", "", _ALTERNATIVES, "most likely tokens, likeliest first"),
    TokenColumn("top_logprobs", "float32", "nats", _ALTERNATIVES, "their log-probabilities"),
    TokenColumn("kl", "float32", "nats", _REFERENCE, "KL(reference ‖ candidate)", 0),
    TokenColumn("reverse_kl", "float32", "nats", _REFERENCE, "KL(candidate ‖ reference)", 0),
    TokenColumn("js", "float32", "nats", _REFERENCE, "Jensen–Shannon divergence", 0, math.log(2)),
    TokenColumn("same_top1", "bool", "share", _REFERENCE, "both find one token most likely", 0, 1),
    TokenColumn(
        *("top_k_agreement", "float32", "share", _REFERENCE),
        "share of the reference's 10 most likely tokens that the candidate has among its own",
        lowest=0,
        highest=1,
    ),
    TokenColumn(
        *("delta_p", "float32", "probability", _REFERENCE),
        "the target's probability under the candidate minus that under the reference",
        lowest=-1,
        highest=1,
    ),
    TokenColumn(
        *("reference_top_p", "float32", "probability", _REFERENCE),
        "the reference's probability of its most likely token",
        lowest=0,
        highest=1,
    ),
    TokenColumn(
        *("kl_high", "float32", "nats", _REFERENCE),
        "upper bound of the KL where a part of the reference is known (`kl` is then a lower one)",
        lowest=0,
    ),
)
TOKEN_COLUMNS = {column.name: column for column in _ENTRIES}


def columns_that_need(*needs: Needs) -> tuple[str, ...]:
    """Return the names of the columns that need this, in the order of the schema."""
    return tuple(column.name for column in _ENTRIES if column.needs in needs)


class ColumnSet(Generic[A]):
    """Results of some targets by column name, one entry per target.

    A column that was not computed is absent. `results.entropy_N` is the column `entropy`, or None;
    the suffix names the axes.
    """

    __slots__ = ("columns",)

    def __init__(self, columns: Mapping[str, A | None]) -> None:
        """Take the columns that are not None.

        Raises ValueError for a name that the schema does not have.
        """
        if not columns.keys() <= TOKEN_COLUMNS.keys():
            unknown = ", ".join(sorted(columns.keys() - TOKEN_COLUMNS.keys()))
            raise ValueError(f"expected columns of the schema, got {unknown}")
        self.columns = {name: column for name, column in columns.items() if column is not None}

    @property
    def nll_N(self) -> A:  # noqa: N802 - the suffix is the axis
        """Return the loss of each target in nats."""
        return self.columns["nll"]

    def __getattr__(self, name: str) -> A | None:
        column, _, axes = name.rpartition("_")
        if column not in TOKEN_COLUMNS or axes not in ("N", "NK"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return self.columns.get(column)


class TokenDetails(ColumnSet[NDArray[Any]]):
    """What a session gives for one or several windows: columns of equal length, without padding.

    Every session gives `nll`; what else depends on its abilities and on what is asked for.
    known: for a column that was given for some targets only, a flag for each target. The values of
        the others mean nothing.
    """

    __slots__ = ("known",)

    def __init__(
        self,
        columns: Mapping[str, NDArray[Any] | None],
        known: Mapping[str, NDArray[np.bool_]] | None = None,
    ) -> None:
        super().__init__(columns)
        self.known = dict(known or {})

    def __len__(self) -> int:
        return len(self.columns["nll"])

    @classmethod
    def empty(cls, *, with_details: bool, num_alternatives: int) -> "TokenDetails":
        """Return the results of a window without targets: columns of no rows."""
        needs = [Needs.LOSS]
        needs += [Needs.DISTRIBUTION] if with_details else []
        columns: dict[str, NDArray[Any]] = {
            name: np.empty(0, TOKEN_COLUMNS[name].dtype) for name in columns_that_need(*needs)
        }
        for name in columns_that_need(Needs.ALTERNATIVES) if num_alternatives else ():
            columns[name] = np.empty((0, num_alternatives), TOKEN_COLUMNS[name].dtype)
        return cls(columns)

    @classmethod
    def joined(cls, parts: Sequence["TokenDetails"]) -> "TokenDetails":
        """Return the results of consecutive targets as one; `parts` holds at least one."""
        parts = [part for part in parts if len(part)] or parts[:1]
        if len(parts) == 1:
            return parts[0]
        whole = cls({}, {})
        starts = np.cumsum([0, *(len(part) for part in parts)])
        for start, stop, part in zip(starts, starts[1:], parts, strict=False):
            whole.put(slice(start, stop), part, num_targets=int(starts[-1]))
        return whole

    def put(
        self, rows: slice | NDArray[np.int64], part: "TokenDetails", *, num_targets: int
    ) -> None:
        """Fill in the results of some rows of a table of `num_targets`.

        Rows that were never filled in are zero, and not known.
        """
        for name, values in part.columns.items():
            if name not in self.columns:
                self.columns[name] = np.zeros((num_targets, *values.shape[1:]), values.dtype)
                self.known[name] = np.zeros(num_targets, np.bool_)
            self.columns[name][rows] = values
            self.known[name][rows] = part.known.get(name, True)

    def split(self, counts: Sequence[int] | NDArray[np.int64]) -> Iterator["TokenDetails"]:
        """Yield the results of consecutive windows of `counts` targets, as views."""
        stops = np.cumsum(counts)
        for start, stop in zip(stops - counts, stops, strict=True):
            yield TokenDetails({n: column[start:stop] for n, column in self.columns.items()})
