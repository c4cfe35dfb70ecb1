"""CutRule of a tokenizer: where its texts may be cut, read from its own settings.

A Unigram model is cut at blanks alone: without a pre-tokenizer it compares sums of scores over the
whole text, whose rounding depends on what stands before.
Normalisers that look at neighbours (NFKC and its like) allow a cut only between characters that
never combine; there is no cut near an added token.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from perplexit.inputs.text_cuts import AbsentPairs, CutRule

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


def rule_of_tokenizers(
    serialised: Mapping[str, Any], spelled: Sequence[bytes], tokens: Mapping[str, int]
) -> CutRule:
    """Return the rule for a tokenizer in the form of a `tokenizer.json`."""
    normalisers = _steps(serialised.get("normalizer"), "normalizers")
    splitters = _steps(serialised.get("pre_tokenizer"), "pretokenizers")
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


def _steps(step: Mapping[str, Any] | None, children: str) -> list[Mapping[str, Any]]:
    """List the steps of a normaliser or pre-tokenizer, those of sequences one by one."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [each for child in step[children] for each in _steps(child, children)]


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
