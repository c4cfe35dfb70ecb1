"""Tokenise the text of a prepared input again: does a tokenizer give the ids that it holds?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import PerplexitError
from perplexit.inputs.token_file import TokenFile
from perplexit.inputs.tokenizer import Tokenizer

_MOST_BYTES = 1 << 20  # of the input's text that is tokenised again
_UNSURE_IDS = 16  # at the end of a document that was cut
_MOST_SPELLED = 20_000
_SAME_VOCABULARY = 0.9  # of the tokens: tokenizers that change text spell a few otherwise


@dataclass(frozen=True, slots=True)
class TokenizerMatch:
    """How a tokenizer agrees with an input.

    by: "fingerprint", "ids" (of the input's own text, tokenised again), or "nothing": the input
        has no text, so that it cannot be told.
    difference: where the ids differ; None where they do not.
    same_vocabulary: whether the ids stand for the same bytes, however text is split into them.
    """

    by: str
    difference: str | None = None
    same_vocabulary: bool = True


def match_tokenizer(tokens: TokenFile, own: Tokenizer) -> TokenizerMatch:
    """Compare an input with a tokenizer by the ids of its text, not by the tokenizer's files.

    Two files of one tokenizer may differ: another version of the library, other metadata, special
    tokens appended. What counts is that the input's text becomes the input's ids.
    """
    if tokens.tokenizer_fingerprint == own.fingerprint:
        return TokenizerMatch("fingerprint")
    if not tokens.has_text:
        return TokenizerMatch("nothing")
    found = _first_difference(tokens, own)
    if found is None:
        return TokenizerMatch("ids")
    return TokenizerMatch("ids", found, _spells_alike(tokens, own))


def first_difference(
    ours: Sequence[int] | NDArray[Any], theirs: Sequence[int] | NDArray[Any]
) -> str | None:
    """Say where `theirs` has another id than `ours`, the model's own; None where nowhere."""
    for position, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return f"id {int(other)} at position {position}, where the model's own has {int(one)}"
    if len(ours) != len(theirs):
        return f"{len(theirs)} ids, where the model's own has {len(ours)}"
    return None


def _first_difference(tokens: TokenFile, own: Tokenizer) -> str | None:
    for number, text, whole in _sample(tokens):
        start, stop = (int(edge) for edge in tokens.document_starts[number : number + 2])
        theirs = tokens.token_ids[start:stop]
        try:
            ours: Sequence[int] | NDArray[Any] = own.encode_batch([text]).ids
        except PerplexitError as error:
            return f"document {number}: {error}"
        if not whole:
            ours = ours[: max(0, len(ours) - _UNSURE_IDS)]
            theirs = theirs[: len(ours)]
        found = first_difference(ours, theirs)
        if found is not None:
            return f"document {number}: {found}"
    return None


def _sample(tokens: TokenFile) -> Iterator[tuple[int, str, bool]]:
    """Yield (document, its text, whether that is all of it) from every part of the input."""
    edges = np.asarray(tokens.byte_starts)[tokens.document_starts]
    step = max(1, int(edges[-1] - edges[0]) // _MOST_BYTES)
    left = _MOST_BYTES
    for number in range(0, len(edges) - 1, step):
        begin, end = int(edges[number]), int(edges[number + 1])
        stop = min(end, begin + left)
        data = np.asarray(tokens.text_bytes[begin:stop]).tobytes()
        yield number, data.decode("utf-8", "ignore"), stop == end
        left -= stop - begin
        if left <= 0:
            return


def _spells_alike(tokens: TokenFile, own: Tokenizer) -> bool:
    """Return whether the input's ids stand for the bytes that the tokenizer has for them."""
    ids = np.asarray(tokens.token_ids[:_MOST_SPELLED])
    edges = np.asarray(tokens.byte_starts[: len(ids) + 1])
    known = ids < own.vocab_size
    spelled = [own.spelled[index] for index in np.where(known, ids, 0).tolist()]
    data = np.asarray(tokens.text_bytes[: int(edges[-1])]).tobytes()
    alike = total = 0
    for place, (begin, end) in enumerate(pairwise(edges.tolist())):
        if begin == end:
            continue
        total += 1
        alike += bool(known[place]) and spelled[place].strip() == data[begin:end].strip()
    return alike >= _SAME_VOCABULARY * total
