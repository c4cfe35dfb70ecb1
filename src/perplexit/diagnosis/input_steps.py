"""From one prepared input to another, a setting at a time: the token files in between.

Windows are made anew from ids that are there already; nothing is tokenised.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from perplexit.errors import PerplexitError
from perplexit.fingerprints import canonical_json
from perplexit.inputs.protocol_table import PROTOCOLS
from perplexit.inputs.protocols import ResolvedProtocol
from perplexit.inputs.token_file import TokenFile

TEXT_ASPECTS = ("text", "tokenizer")
_WINDOW_SETTINGS = (("bos", ("bos", "prefix_id")), ("max_length", ("max_length",)))
_STRIDE = ("stride", ("stride",))


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
    for aspect, names in (*_WINDOW_SETTINGS, _STRIDE):
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
