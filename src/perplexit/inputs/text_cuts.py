"""Where a long text may be cut, so that the ids of its parts are the ids of the whole.

A cut between the characters a and b is safe where no token can reach across it, and where what
stands on one side changes nothing on the other:

- The pre-tokenizer splits every text between a character that is no white space and a blank
  (`at_blanks`). Words are encoded one by one, so nothing reaches across.
- Or no token of a BPE vocabulary has the end of a next to the beginning of b (`absent`). The
  result of a merge is in the vocabulary, so no merge reaches across, and the merges on the two
  sides do not influence each other.

A part is encoded with the character before it, whose own ids are then dropped: so a prefix that a
tokenizer puts before every text is not in it. `cut_rules` derives the rule from a tokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BLANK, _META = 0x20, 0x2581
_SPACE_CODES = np.array(
    [*range(0x09, 0x0E), *range(0x1C, 0x21), 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028,
     0x2029, 0x202F, 0x205F, 0x3000], dtype=np.int64,
)  # fmt: skip
# Characters that no normaliser joins to a neighbour: ASCII, kana, ideographs, Hangul, Cyrillic.
_INERT = ((0x20, 0x7E), (0x410, 0x44F), (0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x9FA5),
          (0xAC00, 0xD7A3))  # fmt: skip
_MOST_TRIES = 10_000


class AbsentPairs:
    """Pairs of neighbours that stand in no token: of bytes, or of characters.

    spelled: the tokens of a byte-level vocabulary; None: `tokens` are characters.
    """

    def __init__(self, spelled: Sequence[bytes] | None, tokens: Sequence[str]) -> None:
        self._by_bytes = spelled is not None
        codes, ends = _joined(spelled if spelled is not None else tokens)
        inside = np.ones(max(len(codes) - 1, 0), dtype=np.bool_)
        inside[ends[(ends > 0) & (ends < len(codes))] - 1] = False
        self._present = np.unique(_pair_keys(codes[:-1], codes[1:])[inside])
        self._known = np.array(sorted({ord(t) for t in tokens if len(t) == 1}), dtype=np.int64)

    def between(self, before: NDArray[np.int64], after: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return for each pair whether no token holds both characters next to each other."""
        if self._by_bytes:
            return ~_among(_pair_keys(_last_byte(before), _first_byte(after)), self._present)
        before, after = (np.where(codes == _BLANK, _META, codes) for codes in (before, after))
        # unknown characters are joined to one token, or become bytes
        known = _among(before, self._known) & _among(after, self._known)
        return known & ~_among(_pair_keys(before, after), self._present)


@dataclass(frozen=True)
class CutRule:
    """Where texts of one tokenizer may be cut.

    at_blanks: before a blank behind something else; absent: between pairs that no token holds.
    inert:     whether both characters must be ones that no normaliser joins.
    avoid:     strings that no cut comes near. reason: why there is no cut elsewhere.
    """

    at_blanks: bool = False
    absent: AbsentPairs | None = None
    inert: bool = False
    avoid: tuple[str, ...] = ()
    reason: str = ""
    margin: int = 1

    @property
    def cuts(self) -> bool:
        """Return whether there is any kind of cut."""
        return self.at_blanks or self.absent is not None

    def find(self, text: str, start: int) -> int | None:
        """Find the first place from `start` on where the text may be cut; None where there is none.

        The last `margin` characters are left alone: what follows them is not known yet.
        """
        stop = len(text) - self.margin - 1
        begin = max(start, 1)
        if stop <= begin or not self.cuts:
            return None
        codes = _codes(text[begin - 1 : stop])
        before, after = codes[:-1], codes[1:]
        fits = np.zeros(len(before), dtype=np.bool_)
        if self.at_blanks:
            fits |= after == _BLANK
        if self.absent is not None:
            fits |= self.absent.between(before, after)
        fits &= ~_among(before, _SPACE_CODES)
        if self.inert:
            fits &= _is_inert(before) & _is_inert(after)
        for place in (np.flatnonzero(fits)[:_MOST_TRIES] + begin).tolist():
            window = text[max(0, place - self.margin) : place + self.margin].casefold()
            if not any(content in window for content in self.avoid):
                return int(place)
        return None


def _joined(tokens: Sequence[bytes] | Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return all tokens end to end as numbers, and where each ends."""
    ends = np.cumsum(np.fromiter(map(len, tokens), np.int64, len(tokens)))
    if tokens and isinstance(tokens[0], bytes):
        data = b"".join(token for token in tokens if isinstance(token, bytes))
        return np.frombuffer(data, dtype=np.uint8).astype(np.int64), ends
    return _codes("".join(token for token in tokens if isinstance(token, str))), ends


def _codes(text: str) -> NDArray[np.int64]:
    data = text.encode("utf-32-le", "surrogatepass")
    return np.frombuffer(data, dtype=np.uint32).astype(np.int64)


def _pair_keys(before: NDArray[np.int64], after: NDArray[np.int64]) -> NDArray[np.int64]:
    keys: NDArray[np.int64] = (before << 21) | after
    return keys


def _among(values: NDArray[np.int64], ordered: NDArray[np.int64]) -> NDArray[np.bool_]:
    if not len(ordered):
        return np.zeros(len(values), dtype=np.bool_)
    place = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    found: NDArray[np.bool_] = ordered[place] == values
    return found


def _last_byte(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.where(codes < 0x80, codes, 0x80 | (codes & 0x3F))


def _first_byte(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    wide = np.where(codes < 0x10000, 0xE0 | (codes >> 12), 0xF0 | (codes >> 18))
    return np.where(codes < 0x80, codes, np.where(codes < 0x800, 0xC0 | (codes >> 6), wide))


def _is_inert(codes: NDArray[np.int64]) -> NDArray[np.bool_]:
    inert = np.zeros(len(codes), dtype=np.bool_)
    for first, last in _INERT:
        inert |= (codes >= first) & (codes <= last)
    return inert
