"""Where a long text may be cut, so that the ids of its parts are the ids of the whole.

A cut between the characters a and b is safe where no token can reach across it, and where what
stands on one side changes nothing on the other:

- The pre-tokenizer splits every text between a character that is no white space and a blank
  (`at_blanks`). Words are encoded one by one, so nothing reaches across.
- Or no token of a BPE vocabulary has the end of a next to the beginning of b (`absent`). The
  result of a merge is in the vocabulary, so no merge reaches across, and the merges on the two
  sides do not influence each other.

A part is encoded with the character before it, whose own ids are then dropped: so a prefix that a
tokenizer puts before every text is not in it.

The rule of a tokenizer is read from its own settings. A Unigram model is cut at blanks alone:
without a pre-tokenizer it compares sums of scores over the whole text, whose rounding depends on
what stands before. Normalisers that look at neighbours (NFKC and its like) allow a cut only between
characters that never combine; there is no cut near an added token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.inputs.encoded_batch import WHITE_SPACE
from perplexit.inputs.vocabulary_spelling import steps_of

_BLANK, _META = 0x20, 0x2581
_SPACE_CODES = np.array(WHITE_SPACE, dtype=np.int64)
# Characters that no normaliser joins to a neighbour: ASCII, kana, ideographs, Hangul, Cyrillic.
_INERT = ((0x20, 0x7E), (0x410, 0x44F), (0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x9FA5),
          (0xAC00, 0xD7A3))  # fmt: skip
_MOST_TRIES = 10_000
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Regular expressions of which no alternative holds a blank behind anything else.
_BLANK_PATTERNS = frozenset({
    GPT2_PATTERN,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
})  # fmt: skip
_CHARACTERWISE = frozenset({"Prepend", "Strip", "ByteLevel"})
_NEIGHBOURLY = frozenset({
    "NFC", "NFD", "NFKC", "NFKD", "Precompiled", "Nmt", "Lowercase", "StripAccents",
    "BertNormalizer",
})  # fmt: skip
_SPACES_ALONE = frozenset({" {2,}", r"\s+", r"\s{2,}", " +"})
_SPLITS_AT_BLANKS = frozenset({"WhitespaceSplit", "Whitespace", "BertPreTokenizer"})


class AbsentPairs:
    """Pairs of neighbours that stand in no token: of bytes, or of characters.

    spelled: the tokens of a byte-level vocabulary; None: `tokens` are characters.
    """

    def __init__(self, spelled: Sequence[bytes] | None, tokens: Sequence[str]) -> None:
        self._by_bytes = spelled is not None
        codes = _codes("".join(tokens))
        if spelled is not None:
            codes = np.frombuffer(b"".join(spelled), dtype=np.uint8).astype(np.int64)
        lengths = [len(token) for token in (tokens if spelled is None else spelled)]
        ends = np.cumsum(lengths, dtype=np.int64)
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


def rule_of_tokenizers(
    serialised: Mapping[str, Any], spelled: Sequence[bytes], tokens: Mapping[str, int]
) -> CutRule:
    """Return the rule for a tokenizer in the form of a `tokenizer.json`."""
    normalisers = steps_of(serialised, "normalizer")
    splitters = steps_of(serialised, "pre_tokenizer")
    avoid = [entry["content"] for entry in serialised.get("added_tokens", [])]
    inert = moves_blanks = False
    for step in normalisers:
        kind = step["type"]
        if kind == "Replace":
            literal = step["pattern"].get("String")
            if literal is None and step["pattern"].get("Regex") not in _SPACES_ALONE:
                return CutRule(reason=f"its normaliser replaces {step['pattern']}")
            moves_blanks |= literal is None or " " in literal
            avoid += [literal] if literal is not None and len(literal) > 1 else []
        elif kind in _NEIGHBOURLY:
            inert = True
        elif kind not in _CHARACTERWISE:
            return CutRule(reason=f"its normaliser {kind} may look at any part of a text")
    at_blanks, inside = False, True
    seen_mapping = moves_blanks
    for step in splitters:
        splits, local = _splitter(step)
        if not local and not splits:
            return CutRule(
                reason=f"its pre-tokenizer {step['type']} may look at any part of a text"
            )
        at_blanks |= splits and (not seen_mapping or step["type"] == "Metaspace")
        inside &= local
        seen_mapping |= step["type"] in ("ByteLevel", "Metaspace")
    reason, pairs = _model_pairs(serialised, spelled, tokens, normalisers + splitters)
    return _rule(at_blanks, pairs if inside else None, inert, avoid, reason)


def rule_of_sentencepiece(proto: bytes, pieces: Sequence[str]) -> CutRule:
    """Return the rule for a SentencePiece model, from its serialised `ModelProto` and pieces."""
    trainer, normaliser = b"", b""
    for number, value in _fields(proto):
        if number == 2 and isinstance(value, bytes):
            trainer = value
        elif number == 3 and isinstance(value, bytes):
            normaliser = value
    options = dict(_fields(trainer))
    settings = dict(_fields(normaliser))
    if options.get(3, 1) != 2:
        return CutRule(
            reason="its model is no BPE: SentencePiece's Unigram adds up scores over the whole "
            "text, and their rounding depends on what stands before"
        )
    if options.get(24, 0) or not settings.get(5, 1):
        return CutRule(reason="its blanks are not written before words")
    name = settings.get(1, b"")
    named = name.decode("utf-8", "replace") if isinstance(name, bytes) else ""
    has_map = bool(settings.get(2))
    if has_map and named not in ("identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf"):
        return CutRule(reason=f"its normaliser {named or 'without a name'} is not a known one")
    return _rule(False, AbsentPairs(None, pieces), has_map and named != "identity", (), "")


def _rule(
    at_blanks: bool, pairs: AbsentPairs | None, inert: bool, avoid: Sequence[str], reason: str
) -> CutRule:
    contents = tuple(dict.fromkeys(content.casefold() for content in avoid if content))
    margin = max(map(len, contents), default=0) + 1
    return CutRule(at_blanks, pairs, inert, contents, reason, margin)


def _splitter(step: Mapping[str, Any]) -> tuple[bool, bool]:
    """Return (does the step split at blanks, does a split depend on two neighbours alone)."""
    kind = step["type"]
    if kind != "Split":
        return {
            "ByteLevel": (bool(step.get("use_regex", True)), True),
            "Metaspace": (bool(step.get("split", True)), step.get("replacement", "▁") == "▁"),
            "Digits": (False, True),
            "Punctuation": (False, True),
        }.get(kind, (kind in _SPLITS_AT_BLANKS, kind == "WhitespaceSplit"))
    pattern = step["pattern"].get("Regex")
    if pattern is None:
        return False, len(step["pattern"]["String"]) == 1
    whole = (step["behavior"], bool(step["invert"]))
    known = whole in (("Isolated", False), ("Removed", True)) and pattern in _BLANK_PATTERNS
    return known, known and pattern == GPT2_PATTERN


def _model_pairs(
    serialised: Mapping[str, Any],
    spelled: Sequence[bytes],
    tokens: Mapping[str, int],
    steps: Sequence[Mapping[str, Any]],
) -> tuple[str, AbsentPairs | None]:
    """Return (why no cut is inside words, the pairs that no token of a BPE vocabulary has)."""
    model = serialised["model"]
    if model.get("type") != "BPE":
        return f"its model is {model.get('type')}, which is cut at blanks alone", None
    settings = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    for name in settings:
        if model.get(name):
            return f"its BPE model has {name} = {model[name]!r}, and is cut at blanks alone", None
    byte_level = any(step["type"] == "ByteLevel" for step in steps)
    return "", AbsentPairs(spelled if byte_level else None, list(tokens))


def _fields(data: bytes) -> list[tuple[int, int | bytes]]:
    """List the fields of a protocol buffer: numbers, and bytes of what has a length."""
    found: list[tuple[int, int | bytes]] = []
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        if key & 7 == 0:
            value, place = _varint(data, place)
            found.append((key >> 3, value))
            continue
        size = 8 if key & 7 == 1 else 4
        if key & 7 == 2:
            size, place = _varint(data, place)
        found.append((key >> 3, data[place : place + size]))
        place += size
    return found


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
