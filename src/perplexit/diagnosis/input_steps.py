"""From one prepared input to another, a setting at a time: the token files in between.

Windows are made anew from ids that are there already; nothing is tokenised.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np

from perplexit.errors import PerplexitError
from perplexit.fingerprints import canonical_json
from perplexit.inputs.protocol_table import PROTOCOLS
from perplexit.inputs.protocols import ResolvedProtocol
from perplexit.inputs.token_file import TokenFile
from perplexit.runs.run_text import RunText

TEXT_ASPECTS = ("text", "tokenizer")
_WINDOW_SETTINGS = {
    "bos": ("bos", "prefix_id"),
    "max_length": ("max_length",),
    "stride": ("stride",),
}


class InputStep(NamedTuple):
    """The aspects that are turned, and the input after it; None where there can be none."""

    aspects: tuple[str, ...]
    tokens: TokenFile | None


def input_steps(first: TokenFile, second: TokenFile, aspects: Sequence[str]) -> list[InputStep]:
    """Return steps from `first` to `second`, which is the last one's input; empty for one input.

    aspects: the differences by name; each step takes those that are its own.
    """
    if first.input_fingerprint == second.input_fingerprint:
        return []
    steps = list(_steps(first, second)) or [InputStep(("input",), second)]
    steps[-1] = InputStep(steps[-1].aspects, second)
    return _named(steps, aspects)


def _steps(first: TokenFile, second: TokenFile) -> Iterator[InputStep]:
    ours, theirs = dict(first.spec["protocol"]), dict(second.spec["protocol"])
    protocol = dict(ours)
    if not _same_ids(first, second):
        if (
            protocol["bos"] != "none"
            and first.tokenizer_fingerprint != second.tokenizer_fingerprint
        ):
            own = second.spec["tokenizer"].get("bos_id")
            protocol["prefix_id"] = theirs["prefix_id"] if theirs["prefix_id"] >= 0 else own
        # Plain id lines are windows already: no protocol but their own applies to them.
        with_text = first.has_text and second.has_text
        yield InputStep(TEXT_ASPECTS, rewindowed(second, protocol) if with_text else None)
    elif not _same_mask(first, second):
        yield InputStep(("denominator",), rewindowed(second, protocol))
    for aspect, names in _WINDOW_SETTINGS.items():
        if all(protocol[name] == theirs[name] for name in names):
            continue
        if any(theirs[name] is None for name in names):
            continue  # the other protocol has no such setting: it changes with the protocol
        protocol |= {name: theirs[name] for name in names}
        yield InputStep((aspect,), rewindowed(second, protocol))
    if protocol != theirs:
        yield InputStep(("protocol",), second)


def rewindowed(tokens: TokenFile, protocol: Mapping[str, Any]) -> TokenFile | None:
    """Return the ids, text and mask of `tokens` under the windows of another protocol entry.

    It lives in memory. None where the protocol cannot be applied to these ids.
    """
    known = PROTOCOLS.get(str(protocol["name"]))
    if known is None or known.version != protocol["version"]:
        return None  # written by another version, whose windows are not ours to guess
    try:
        plan = ResolvedProtocol(**protocol)
        if (plan.stride or 0) > (plan.max_length or 0):
            return None
        own_bos_D = np.asarray(tokens.token_ids)[tokens.document_starts[:-1]] == plan.prefix_id
        windows = plan.windows(np.diff(tokens.document_starts), own_bos_D=own_bos_D)
    except (PerplexitError, TypeError, ValueError, ZeroDivisionError):
        return None
    spec = {**tokens.spec, "protocol": dict(protocol)}
    text = canonical_json({"base": tokens.input_fingerprint, "protocol": dict(protocol)})
    metadata = {
        "spec": json.dumps(spec),
        "text_fingerprint": tokens.text_fingerprint,
        "tokenizer_fingerprint": tokens.tokenizer_fingerprint,
        "input_fingerprint": hashlib.sha256(text.encode()).hexdigest(),
    }
    tensors: dict[str, Any] = {
        "token_ids": tokens.token_ids,
        "document_starts": tokens.document_starts,
        "document_domains": tokens.document_domains,
        "byte_starts": tokens.byte_starts,
        "num_words": tokens.num_words,
        "text_bytes": tokens.text_bytes,
        "windows": windows,
    }
    if tokens.scored_mask is not None:
        tensors["scored_mask"] = tokens.scored_mask
    return TokenFile(tokens.path, metadata, tensors)


def _named(steps: list[InputStep], aspects: Sequence[str]) -> list[InputStep]:
    """Return each aspect of an input with the step that turns it; the rest go with the last one."""
    own = {"bos", "max_length", "stride", "protocol", "tail", "denominator", "tokenizer"}
    texts = tuple(aspect for aspect in aspects if aspect not in own)
    named = []
    for step in steps:
        if step.aspects == TEXT_ASPECTS:
            kept = texts + tuple(a for a in aspects if a == "tokenizer")
        else:
            kept = tuple(a for a in step.aspects if a in aspects) or step.aspects
        named.append(InputStep(tuple(dict.fromkeys(kept)), step.tokens))
    told = {aspect for step in named for aspect in step.aspects}
    late = tuple(a for a in dict.fromkeys(aspects) if a in own and a not in told)
    named[-1] = InputStep(named[-1].aspects + late, named[-1].tokens)
    return named


def _same_ids(first: TokenFile, second: TokenFile) -> bool:
    return np.array_equal(first.document_starts, second.document_starts) and np.array_equal(
        first.token_ids, second.token_ids
    )


def _same_mask(first: TokenFile, second: TokenFile) -> bool:
    ours, theirs = first.scored_mask, second.scored_mask
    if ours is None or theirs is None:
        return ours is theirs
    return np.array_equal(ours, theirs)


CONTEXT_CHARACTERS = 30
MAX_CHARACTERS = 20_000_000  # beyond it, only the first difference is looked for
_COARSE = {"whitespace", "letter case"}  # they hide what the others tell apart
_BETWEEN = "\x1e"  # stands between documents; no text file holds a record separator
_MOST_AT_ONCE = 3

# What turns one of two common versions of a text into the other, the mildest first.
_NORMALISATIONS: dict[str, Callable[[str], str]] = {
    "newlines": lambda text: text.replace("\r\n", "\n").replace("\r", "\n"),
    "byte order mark": lambda text: text.replace("\ufeff", ""),
    "trailing whitespace": lambda text: re.sub(r"[ \t]+(?=[\n\r\x1e]|\Z)", "", text),
    "outer whitespace": lambda text: re.sub(
        r"\A\s+|\s+\Z", "", re.sub(r"\s*\x1e\s*", "\x1e", text)
    ),
    "document joining": lambda text: text.replace(_BETWEEN, "\n\n"),
    "Unicode form": lambda text: unicodedata.normalize("NFC", text),
    "blank lines": lambda text: re.sub(r"\n(?:[ \t]*\n)+", "\n", text),
    "whitespace": lambda text: re.sub(r"\s+", "", text),
    "letter case": str.casefold,
}


class FirstDifference(NamedTuple):
    """Where two texts part: offsets in the document, and what stands there on both sides."""

    document: int
    byte: int
    character: int
    first: str
    second: str

    def __str__(self) -> str:
        return (
            f"they part at byte {self.byte:,} (character {self.character:,}) of document "
            f"{self.document:,}: {self.first!r} and {self.second!r}"
        )


def documents_of_run(text: RunText) -> list[bytes]:
    """Return the UTF-8 in a run's rows; what was not scored is zeros, or missing at the end."""
    edges = text.document_byte_starts.tolist()
    return [text.text_bytes[begin:end] for begin, end in pairwise(edges)]


def first_difference(first: Sequence[bytes], second: Sequence[bytes]) -> FirstDifference | None:
    """Return the first place where two texts part; None where they are equal."""
    for document in range(max(len(first), len(second))):
        one = first[document] if document < len(first) else b""
        other = second[document] if document < len(second) else b""
        if one != other:
            byte = _first_byte(one, other)
            before = one[:byte].decode("utf-8", errors="ignore")
            return FirstDifference(
                document, byte, len(before), _around(one, byte), _around(other, byte)
            )
    return None if len(first) == len(second) else FirstDifference(len(second), 0, 0, "", "")


def text_aspects(first: Sequence[bytes], second: Sequence[bytes]) -> tuple[str, ...]:
    """Return the smallest set of normalisations that makes the texts equal, by name.

    `("newlines",)` for a file that was read with newline translation. Where none does, the words
    themselves differ: `("text",)`. Empty for equal texts.
    """
    one, other = (_BETWEEN.join(map(_decoded, side)) for side in (first, second))
    if one == other:
        return ()
    if len(one) + len(other) <= MAX_CHARACTERS:
        for names in _candidates(one, other):
            if _normalised(one, names) == _normalised(other, names):
                return names
    return ("text",)


def _candidates(one: str, other: str) -> Iterator[tuple[str, ...]]:
    """Yield sets of normalisations that change one of the texts: mild first, then small."""
    active = [
        name
        for name, apply in _NORMALISATIONS.items()
        if apply(one) != one or apply(other) != other
    ]
    sets = [names for size in range(1, _MOST_AT_ONCE + 1) for names in combinations(active, size)]
    yield from sorted(sets, key=lambda names: not _COARSE.isdisjoint(names))


def _normalised(text: str, names: Sequence[str]) -> str:
    for name in names:
        text = _NORMALISATIONS[name](text)
    return text


def _first_byte(one: bytes, other: bytes) -> int:
    length = min(len(one), len(other))
    differ = np.frombuffer(one, np.uint8, length) != np.frombuffer(other, np.uint8, length)
    return int(np.argmax(differ)) if differ.any() else length


def _around(data: bytes, byte: int) -> str:
    before = _decoded(data[max(0, byte - 4 * CONTEXT_CHARACTERS) : byte])[-CONTEXT_CHARACTERS:]
    after = _decoded(data[byte : byte + 4 * CONTEXT_CHARACTERS])[:CONTEXT_CHARACTERS]
    return before + after


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")
