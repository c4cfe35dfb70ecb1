"""Whether a token file makes sense: what no honest `prepare` writes is refused, whatever its hash.

The tensors are looked at piece by piece while they are hashed, so that a file larger than memory is
opened in a few megabytes and read once.

Shape suffixes: D = documents, W = windows of one piece.
"""

import codecs
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import TokenFileError
from perplexit.inputs.protocol_table import PROTOCOLS, Aggregate
from perplexit.inputs.windows import COLUMNS, PrefixMode, WindowArray
from perplexit.untrusted_files import Expected, parse_json

EXPECTED = Expected("a token file", TokenFileError, "prepare the input again")
_LARGEST_VOCABULARY = 1 << 31


class _ProtocolSpec(TypedDict):
    name: str
    version: NotRequired[int]
    max_length: NotRequired[int | None]
    stride: NotRequired[int | None]
    bos: NotRequired[Literal["none", "first", "every"]]
    prefix_id: NotRequired[int]
    joined_with: NotRequired[str | None]
    aggregate: NotRequired[Aggregate]


class _TokenizerSpec(TypedDict):
    vocab_size: int
    library: NotRequired[str]
    bos_id: NotRequired[int | None]
    eos_id: NotRequired[int | None]
    added_prefix: NotRequired[list[int]]
    added_suffix: NotRequired[list[int]]


class SkippedSpec(TypedDict):
    """Documents that were left out for one reason, with the numbers of the first few."""

    count: int
    first: list[int]


class _UnscoredSpec(TypedDict):
    num_bytes: int
    num_words: int


class _CorpusSpec(TypedDict):
    num_read: NotRequired[int]
    skipped: NotRequired[dict[str, SkippedSpec]]
    num_special_tokens: NotRequired[int]
    num_documents_with_own_bos: NotRequired[int]
    without_tokens: NotRequired[_UnscoredSpec]


class _Spec(TypedDict):
    """The keys of a token file's spec that something depends on; there may be more."""

    protocol: _ProtocolSpec
    tokenizer: _TokenizerSpec
    domains: list[str]
    has_text: bool
    corpus: NotRequired[_CorpusSpec]


class SenseChecks:
    """Looks at every piece of every tensor, in the order of `ORDER`; see `look`."""

    # What later checks need comes first: the documents before the windows in them.
    ORDER = ("document_starts", "byte_starts")

    def __init__(self, path: Path, spec_text: str, tensors: dict[str, NDArray[Any]]) -> None:
        """Check the spec and the tensors' shapes. Raises TokenFileError, as `finish` does."""
        self._path = path
        spec = parse_json(spec_text, EXPECTED, _Spec, place=path)
        self._protocol = spec["protocol"]
        self._vocab_size = spec["tokenizer"]["vocab_size"]
        self._num_domains = len(spec["domains"])
        self._has_text = spec["has_text"]
        self._num_ids, self._num_bytes = len(tensors["token_ids"]), len(tensors["text_bytes"])
        self._starts_D = np.empty(len(tensors["document_starts"]), dtype=np.int64)
        self._text_starts_D = np.empty_like(self._starts_D)
        self._last: dict[str, Any] = {}
        self._problem: TokenFileError | None = None
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._check_shapes(tensors)
        vocabulary = 0 < self._vocab_size <= _LARGEST_VOCABULARY
        self._require(vocabulary, f"a vocabulary of {self._vocab_size} ids")
        known = PROTOCOLS.get(self._protocol["name"])
        self._repeats = known is not None and known.scores_repeatedly
        self._longest = self._protocol.get("max_length")
        if self._longest is not None:
            self._require(self._longest >= 2, f"windows of max_length {self._longest}")
            self._longest += known.beyond_max_length if known is not None else 0

    def look(self, name: str, first: int, piece: NDArray[Any]) -> None:
        """Check the rows `first …` of a tensor; each tensor's pieces come in order.

        What is wrong is told by `finish`, when the caller knows whether the hashes are right.
        """
        check: Callable[[int, NDArray[Any]], None] | None = getattr(self, f"_look_at_{name}", None)
        if check is not None and len(piece) and self._problem is None:
            try:
                check(first, piece)
            except TokenFileError as error:
                self._problem = error

    def finish(self) -> None:
        """Raise what was found, and check what only the whole can show."""
        if self._problem is not None:
            raise self._problem
        self._require(self._last.get("document_starts", 0) == self._num_ids, "ids of no document")
        text_ends = self._last.get("byte_starts", 0) == self._num_bytes
        self._require(text_ends, "bytes of text that belong to no token")
        try:
            self._utf8.decode(b"", final=True)
        except UnicodeDecodeError:
            self._refuse("text that ends within a character")

    @cached_property
    def _lengths(self) -> NDArray[np.int64]:
        return np.diff(self._starts_D)

    def _refuse(self, got: str) -> NoReturn:
        EXPECTED.refuse(self._path, f"{got}, although its hash is right")

    def _require(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self._refuse(otherwise)

    def _check_shapes(self, tensors: dict[str, NDArray[Any]]) -> None:
        num_documents = len(tensors["document_domains"])
        lengths = {
            "token_ids": self._num_ids,
            "document_domains": num_documents,
            "text_bytes": self._num_bytes,
            "document_starts": num_documents + 1,
            "byte_starts": self._num_ids + 1,
            "num_words": self._num_ids,
            "scored_mask": self._num_ids,
        }
        for name, length in lengths.items():
            if name in tensors and tensors[name].shape != (length,):
                found = list(tensors[name].shape)
                self._refuse(f"the tensor {name} of shape {found} where [{length}] belongs")
        table = tensors["windows"]
        shaped = table.ndim == 2 and table.shape[1] == len(COLUMNS) and len(table) > 0
        self._require(shaped, f"a window table of shape {list(table.shape)}")
        self._require(self._has_text or not self._num_bytes, "text where it says it has none")

    def _look_at_token_ids(self, first: int, piece: NDArray[np.int32]) -> None:
        low, high = int(piece.min()), int(piece.max())
        wrong = low if low < 0 else high
        inside = low >= 0 and high < self._vocab_size
        self._require(inside, f"the id {wrong}, outside its vocabulary of {self._vocab_size}")

    def _look_at_document_starts(self, first: int, piece: NDArray[np.int64]) -> None:
        self._ascending("document_starts", first, piece, self._num_ids)
        self._starts_D[first : first + len(piece)] = piece

    def _look_at_byte_starts(self, first: int, piece: NDArray[np.int64]) -> None:
        self._ascending("byte_starts", first, piece, self._num_bytes)
        low, high = np.searchsorted(self._starts_D, (first, first + len(piece)))
        self._text_starts_D[low:high] = piece[self._starts_D[low:high] - first]

    def _ascending(self, name: str, first: int, piece: NDArray[np.int64], end: int) -> None:
        before = self._last.get(name, 0)
        self._require(first > 0 or int(piece[0]) == 0, f"{name} that do not begin at 0")
        ordered = int(piece[0]) >= before and bool((piece[1:] >= piece[:-1]).all())
        self._require(ordered, f"{name} that do not ascend")
        self._require(int(piece[-1]) <= end, f"{name} beyond the end ({end})")
        self._last[name] = int(piece[-1])

    def _look_at_document_domains(self, first: int, piece: NDArray[np.int32]) -> None:
        inside = int(piece.min()) >= -1 and int(piece.max()) < self._num_domains
        self._require(inside, f"a domain that is none of its {self._num_domains}")

    def _look_at_text_bytes(self, first: int, piece: NDArray[np.uint8]) -> None:
        try:
            self._utf8.decode(piece.data)
        except UnicodeDecodeError:
            self._refuse("text that is no UTF-8")
        low, high = np.searchsorted(self._text_starts_D, (first, first + len(piece)))
        heads = piece[self._text_starts_D[low:high] - first]
        self._require(not ((heads & 0xC0) == 0x80).any(), "a document that begins within a letter")

    def _look_at_scored_mask(self, first: int, piece: NDArray[np.bool_]) -> None:
        self._require(int(piece.view(np.uint8).max()) <= 1, "a scored_mask of other than 0 and 1")

    def _look_at_windows(self, first: int, piece: WindowArray) -> None:
        wrong = np.flatnonzero(impossible_windows(piece, self._lengths))
        if len(wrong):
            self._refuse(
                f"window {first + int(wrong[0])} = {piece[wrong[0]].tolist()} "
                f"({', '.join(COLUMNS)}), which lies outside its document or scores a token "
                f"without context"
            )
        self._check_prefixes(first, piece)
        fed_W = piece[:, 2] - piece[:, 1] + (piece[:, 5] == PrefixMode.INSERT)
        if self._longest is not None and int(fed_W.max()) > self._longest:
            at = int(fed_W.argmax())
            self._refuse(
                f"window {first + at} of {int(fed_W[at])} ids, longer than its protocol's "
                f"max_length ({self._longest})"
            )
        self._check_order(first, piece)

    def _check_prefixes(self, first: int, piece: WindowArray) -> None:
        prefix_W = piece[:, 6]
        at = int(prefix_W.argmax())
        inside = int(prefix_W[at]) < self._vocab_size
        self._require(inside, f"the prefix {int(prefix_W[at])} of window {first + at}, no id of it")
        own = self._protocol.get("prefix_id")
        if own is not None:
            others = np.flatnonzero((prefix_W >= 0) & (prefix_W != own))
            self._require(not len(others), f"window prefixes other than its protocol's ({own})")

    def _check_order(self, first: int, piece: WindowArray) -> None:
        """Refuse a target that is scored twice, or a window that stands there twice."""
        before = self._last.get("windows")
        rows = piece if before is None else np.concatenate((before, piece))
        self._last["windows"] = np.array(piece[-1:])
        same = rows[1:, 0] == rows[:-1, 0]
        # tools that score overlaps repeatedly still never feed one window twice
        ends = rows[:-1, 1] + 1 if self._repeats else rows[:-1, 4]
        begins = rows[1:, 1] if self._repeats else rows[1:, 3]
        wrong = np.flatnonzero((rows[1:, 0] < rows[:-1, 0]) | (same & (begins < ends)))
        if len(wrong):
            at = first + int(wrong[0]) + (before is None)
            what = "is fed twice" if self._repeats else "scores a target for a second time"
            self._refuse(f"window {at}, which {what} or is out of order")


def impossible_windows(
    windows: WindowArray, lengths_D: NDArray[np.int64], first_document: int = 0
) -> NDArray[np.bool_]:
    """Return which windows leave their document or score what has no context: bool [W].

    lengths_D: ids of the documents `first_document …`, the only ones that windows may name.
    """
    document, start, stop, target_start, target_stop, mode, prefix_id = windows.T
    inside = (document >= first_document) & (document - first_document < len(lengths_D))
    place_W = np.where(inside, document - first_document, 0)
    length_W = lengths_D[place_W] if len(lengths_D) else np.full(len(windows), -1)
    ordered = (start >= 0) & (start <= target_start) & (target_start < target_stop)
    # the id fed first is predicted by nothing, so only an inserted prefix lets `start` be scored
    ordered &= (target_stop <= stop) & (stop <= length_W)
    ordered &= (mode == PrefixMode.INSERT) | (target_start > start)
    prefixed = np.isin(mode, list(PrefixMode)) & ((prefix_id >= 0) == (mode != PrefixMode.NONE))
    wrong_W: NDArray[np.bool_] = ~(inside & ordered & prefixed)
    return wrong_W
