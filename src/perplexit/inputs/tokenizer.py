"""Text → ids, and the exact bytes that each id stands for.

Special tokens are never added here: a BOS enters through a window's prefix alone. Special tokens in
the text itself are parsed as the tokenizer (and transformers) parses them, and counted.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import CorpusError, TokenizerError
from perplexit.inputs.encoded_batch import EncodedBatch, bytes_from_spans
from perplexit.inputs.long_text import parts_of
from perplexit.inputs.tokenizer_backends import Spans, TokenizerBackend

_LONG_TEXT = 64  # characters that no honest vocabulary turns into next to nothing
_NEARLY_ALL = 0.9
_NUM_PROBES = 8
_PROBE_CHARACTERS = 500
_PARTS_AT_A_TIME = 4


class Tokenizer:
    """Turns documents into an EncodedBatch. Made by `load_tokenizer`.

    bos_id, eos_id: as the tokenizer's surroundings (configuration files) name them.
    spelled:        the bytes that each id spells, if the text is left as it is.
    added_prefix, added_suffix: the special ids that the tokenizer itself puts around a text.
    """

    def __init__(self, backend: TokenizerBackend, bos_id: int | None, eos_id: int | None) -> None:
        self._backend = backend
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.library = backend.library
        self.vocab_size = backend.vocab_size
        self.spelled = backend.spelled
        self.added_prefix, self.added_suffix = backend.added
        lengths = np.fromiter(map(len, self.spelled), np.int64, len(self.spelled))
        self._spelled_length_V: NDArray[np.int64] = lengths
        self._own_length_V = lengths.copy()
        if backend.unknown_id is not None:
            self._own_length_V[backend.unknown_id] = -1  # it spells its name, not the text
        self._spells_text: bool | None = None  # found out on the first texts

    def __repr__(self) -> str:
        return (
            f"Tokenizer(library={self.library!r}, vocab_size={self.vocab_size}, "
            f"bos_id={self.bos_id}, eos_id={self.eos_id}, fingerprint='{self.fingerprint[:12]}…')"
        )

    @property
    def fingerprint(self) -> str:
        """Return the tokenizer's identity; computed when first asked for, which takes a while."""
        return self._backend.fingerprint

    def encode_batch(
        self, texts: Sequence[str], *, first_document: int = 0, names: Sequence[str] | None = None
    ) -> EncodedBatch:
        """Return the ids of each text, with the bytes and words of each id.

        The bytes sum to the text's; a text of blanks that has no tokens is left out.
        names: of the texts, in messages; None: their numbers, counted from `first_document`.
        Raises TokenizerError where a text that is not blank gives no tokens, or a long one next to
        none or nearly all unknown; CorpusError for lone surrogates, which are not Unicode.
        """
        if names is None:
            names = [f"document {first_document + number}" for number in range(len(texts))]
        utf8 = [_utf8(text, name) for text, name in zip(texts, names, strict=True)]
        spans: list[Spans] | None = None
        if self._spells(texts):
            ids = self._backend.encode_ids(texts)
        else:
            spans = self._backend.encode_spans(texts)
            ids = [entry[0] for entry in spans]
        flat = np.fromiter(chain.from_iterable(ids), np.int32, sum(map(len, ids)))
        bounds = list(accumulate(map(len, ids), initial=0))
        lengths = self._spelled_length_V[flat]
        misspelled: list[int] = []
        for index, text in enumerate(texts):
            spelled = b"".join(map(self.spelled.__getitem__, ids[index]))
            if spelled == utf8[index]:
                continue
            if spelled == b" " + utf8[index] and lengths[bounds[index]]:
                lengths[bounds[index]] -= 1  # the tokenizer put a blank in front, which is no text
            elif ids[index]:
                self._check_sense(text, ids[index], names[index])
                misspelled.append(index)
            elif text.strip():
                raise TokenizerError(
                    f"The tokenizer returned no tokens for {names[index]}, which has {len(text)} "
                    f"characters. {_REMEDY}"
                )
            else:
                utf8[index] = b""  # without tokens nothing holds its bytes
        if misspelled and spans is None:
            asked = self._backend.encode_spans([texts[index] for index in misspelled])
        else:
            asked = [] if spans is None else [spans[index] for index in misspelled]
        for index, (_, begins, ends) in zip(misspelled, asked, strict=True):
            part = slice(bounds[index], bounds[index + 1])
            own_lengths = self._own_length_V[flat[part]]
            lengths[part] = bytes_from_spans(texts[index], begins, ends, own_lengths)
        return EncodedBatch.of(flat, np.diff(bounds), lengths, utf8)

    def encode_long(self, pieces: Iterable[str], *, name: str) -> Iterator[EncodedBatch]:
        """Yield the tokens of one long text, part after part; the ids are those of the whole.

        pieces: the text, in pieces of any size. Raises as `encode_batch` does, and TokenizerError
        where the text has no place for a cut (see `text_cuts`).
        """
        before = ""
        parts = parts_of(pieces, self._backend.cut_rule, name)
        while group := list(islice(parts, _PARTS_AT_A_TIME)):
            contexts = [before, *(part[-1] for part in group[:-1])]
            before = group[-1][-1:]
            texts = [context + part for context, part in zip(contexts, group, strict=True)]
            batch = self.encode_batch(texts, names=[name] * len(texts))
            for index, context in enumerate(contexts):
                yield self._without_context(batch.document(index), context, name)

    def _without_context(self, part: EncodedBatch, context: str, name: str) -> EncodedBatch:
        """Return a part without the tokens of the character before it."""
        own = self._backend.encode_ids([context])[0] if context else []
        num_bytes = len(context.encode())
        first = len(own)
        if part.ids[:first].tolist() != own or int(part.byte_starts[first]) != num_bytes:
            raise TokenizerError(
                f"expected the tokens of {name} to be independent of a cut behind {context!r}, but "
                "they are not. Divide the text into documents, for example one for each line."
            )
        return EncodedBatch(
            part.ids[first:],
            np.array([0, len(part.ids) - first]),
            part.byte_starts[first:] - num_bytes,
            part.num_words[first:],
            part.text_bytes[num_bytes:],
        )

    def num_special(self, ids: NDArray[np.int32]) -> int:
        """Count the special tokens in `ids`."""
        return int(np.count_nonzero(self._backend.is_special[ids]))

    def to_json(self) -> dict[str, Any]:
        """Return what the token file's spec records of the tokenizer."""
        return {
            "library": self.library,
            "vocab_size": self.vocab_size,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "added_prefix": list(self.added_prefix),
            "added_suffix": list(self.added_suffix),
        }

    def _spells(self, texts: Sequence[str]) -> bool:
        """Return whether this vocabulary mostly spells text as it is, so offsets can be spared.

        It decides the time that a batch takes, never its result.
        """
        if self._spells_text is None and texts:
            probes = [text[:_PROBE_CHARACTERS] for text in texts[:_NUM_PROBES]]
            hits = 0
            for text, ids in zip(probes, self._backend.encode_ids(probes), strict=True):
                spelled = b"".join(map(self.spelled.__getitem__, ids))
                hits += spelled.removeprefix(b" ") == text.encode().removeprefix(b" ")
            self._spells_text = hits * 2 >= len(probes)
        return bool(self._spells_text)

    def _check_sense(self, text: str, ids: list[int], name: str) -> None:
        """Raise TokenizerError where a long text became next to nothing."""
        unknown_id = self._backend.unknown_id
        unknown = 0 if unknown_id is None else ids.count(unknown_id)
        if len(text) > _LONG_TEXT and (len(ids) == 1 or unknown > _NEARLY_ALL * len(ids)):
            raise TokenizerError(
                f"The tokenizer turned the {len(text)} characters of {name} into "
                f"{len(ids)} tokens, {unknown} of them unknown. {_REMEDY}"
            )


_REMEDY = (
    "It was probably built without its vocabulary or merges (a constructor that takes `vocab=` and "
    "`merges=` ignores file names), or is made for another script. Load it from its folder or "
    "tokenizer.json, or take another tokenizer."
)


def _utf8(text: str, name: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{name.replace('document ', 'Document ', 1)} is not Unicode text: character "
            f"{error.start} is a lone surrogate (U+{ord(text[error.start]):04X}), which has no "
            "UTF-8. Repair the source."
        ) from error
