"""How a vocabulary spells its tokens, in bytes.

Three alphabets are in use: byte-level BPE writes each byte as one printable character (GPT-2's
table); SentencePiece writes a blank as U+2581 and single bytes as `<0x41>`; WordPiece marks the
inside of a word (`##ing`) and does not spell blanks at all.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

_BLANK = "\N{LOWER ONE EIGHTH BLOCK}"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def byte_level_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for (GPT-2's table).

    Printable Latin-1 characters stand for themselves; the other bytes, in order, are written as
    the characters from U+0100 on.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in set(own))
    return {chr(byte): byte for byte in own} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


def spell_vocabulary(serialised: Mapping[str, Any], tokens: Mapping[str, int]) -> list[bytes]:
    """Return the bytes that each id spells, for a tokenizer in the form of `tokenizer.json`.

    A spelling is a claim to be checked against the text, never the last word: normalisers and
    unknown tokens break it.
    """
    added = {entry["id"] for entry in serialised.get("added_tokens", [])}
    steps = steps_of(serialised, "pre_tokenizer") + steps_of(serialised, "normalizer")
    byte_level = any(step["type"] == "ByteLevel" for step in steps)
    fallback = bool(serialised["model"].get("byte_fallback", False))
    written = _byte_level_tokens(tokens) if byte_level else {}
    spelled = [b""] * (max(tokens.values(), default=-1) + 1)
    for token, index in tokens.items():
        if index in added:
            spelled[index] = token.encode("utf-8", "replace")
        elif token in written:
            spelled[index] = written[token]
        else:
            spelled[index] = spell_piece(token, fallback=fallback)
    return spelled


def _byte_level_tokens(tokens: Iterable[str]) -> dict[str, bytes]:
    """Return the bytes of the tokens that are written in the byte-level alphabet."""
    alphabet = byte_level_alphabet()
    byte_of = {ord(character): byte for character, byte in alphabet.items()}
    characters = set(alphabet)
    spelled = [token for token in tokens if characters.issuperset(token)]
    data = "".join(spelled).translate(byte_of).encode("latin-1")  # at once: one byte a character
    stops = accumulate(map(len, spelled))
    return {
        token: data[stop - len(token) : stop] for token, stop in zip(spelled, stops, strict=True)
    }


def spell_piece(piece: str, *, fallback: bool) -> bytes:
    """Return the bytes of a SentencePiece piece; `fallback`: `<0x41>` is one byte."""
    match = _BYTE_TOKEN.fullmatch(piece) if fallback else None
    if match:
        return bytes([int(match.group(1), 16)])
    return piece.replace(_BLANK, " ").encode("utf-8", "replace")


def steps_of(serialised: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    """List the steps of the `normalizer` or `pre_tokenizer`, those of sequences one by one."""
    steps, found = [serialised.get(kind)], []
    while steps:
        step = steps.pop(0)
        if step and step["type"] == "Sequence":
            steps = [*step.get("normalizers", []), *step.get("pretokenizers", []), *steps]
        elif step:
            found.append(step)
    return found
