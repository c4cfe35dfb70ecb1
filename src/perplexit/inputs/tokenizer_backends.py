"""The two libraries that turn text into ids: two classes with the same members.

    spelled:    the bytes that each id spells, if the text is left as it is.
    vocab_size: the largest id, plus one.
    is_special: bool [vocab_size], which ids are control tokens.
    unknown_id: the id that stands for what the vocabulary lacks, or None.
    added:      the special ids that the tokenizer itself puts before and after a text.

Neither `encode_ids` nor `encode_spans` adds special tokens or cuts a text off.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from perplexit.fingerprints import json_fingerprint
from perplexit.inputs.text_cuts import CutRule, rule_of_sentencepiece, rule_of_tokenizers
from perplexit.inputs.vocabulary_spelling import spell_piece, spell_vocabulary

_SET_TYPES = {str, int, float}  # of which no value is null or false; bool is another type

Spans = tuple[list[int], NDArray[np.int64], NDArray[np.int64]]  # ids, first and last + 1 character


class HuggingFaceBackend:
    """A `tokenizers.Tokenizer`: everything that has a `tokenizer.json`.

    It should be our own copy: its truncation and padding are switched off.
    """

    library = "tokenizers"

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        self._serialised: dict[str, Any] = json.loads(tokenizer.to_str())
        del self._serialised["truncation"], self._serialised["padding"]
        self.spelled = spell_vocabulary(self._serialised, self._vocabulary)
        self.vocab_size = len(self.spelled)
        self.unknown_id = self._unknown_id()
        self.added = self._added()
        self.is_special = np.zeros(self.vocab_size, dtype=np.bool_)
        for index, token in tokenizer.get_added_tokens_decoder().items():
            self.is_special[index] = token.special

    @cached_property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the canonical serialisation, of what is set in it.

        Settings that are null or false are left out: a later release of the library may write new
        ones, which must not make another tokenizer of the same one.
        """
        return json_fingerprint(_set_values(self._serialised))

    def _unknown_id(self) -> int | None:
        model = self._serialised["model"]
        if model.get("unk_id") is not None:
            return int(model["unk_id"])
        token = model.get("unk_token")
        return None if token is None else self._tokenizer.token_to_id(token)

    def _added(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        with_special = self._tokenizer.encode("a", add_special_tokens=True).ids
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        for start in range(len(with_special) - len(plain) + 1):
            if with_special[start : start + len(plain)] == plain:
                return tuple(with_special[:start]), tuple(with_special[start + len(plain) :])
        return (), ()

    @cached_property
    def cut_rule(self) -> CutRule:
        """Return where a long text may be cut without changing its ids."""
        return rule_of_tokenizers(self._serialised, self.spelled, self._vocabulary)

    def encode_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_spans(self, texts: Sequence[str]) -> list[Spans]:
        """Return the ids of each text, and the characters that each token covers."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [_spans_of(encoding.ids, encoding.offsets) for encoding in encodings]


class SentencePieceBackend:
    """A SentencePiece `.model` file in its own library's `SentencePieceProcessor`."""

    library = "sentencepiece"
    added: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())  # the bare model adds nothing

    def __init__(self, processor: Any) -> None:
        ids = range(int(processor.get_piece_size()))
        self._processor = processor
        self._pieces = [processor.id_to_piece(index) for index in ids]
        self._is_byte = np.array([processor.is_byte(index) for index in ids], dtype=np.bool_)
        self.is_special = np.array([processor.is_control(index) for index in ids], dtype=np.bool_)
        self.vocab_size = len(ids)
        self.spelled = [
            spell_piece(piece, fallback=fallback)
            for piece, fallback in zip(self._pieces, self._is_byte.tolist(), strict=True)
        ]
        unknown = int(processor.unk_id())
        self.unknown_id: int | None = unknown if unknown >= 0 else None

    @cached_property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the model file's content."""
        return hashlib.sha256(self._processor.serialized_model_proto()).hexdigest()

    @cached_property
    def cut_rule(self) -> CutRule:
        """Return where a long text may be cut without changing its ids."""
        return rule_of_sentencepiece(self._processor.serialized_model_proto(), self._pieces)

    def encode_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        ids: list[list[int]] = self._processor.encode(list(texts), add_bos=False, add_eos=False)
        return ids

    def encode_spans(self, texts: Sequence[str]) -> list[Spans]:
        """Return the ids of each text, and the characters that each token covers."""
        return [self._spans(ids, offsets) for ids, offsets in self._offsets(list(texts))]

    def _spans(self, ids: list[int], offsets: Sequence[tuple[int, int]]) -> Spans:
        _, begin, end = _spans_of(ids, offsets)
        # a run of byte pieces has its characters on the last piece alone: give all the whole run
        is_byte = self._is_byte[np.array(ids, dtype=np.int64)]
        edges = np.flatnonzero(np.diff(is_byte, prepend=False, append=False))
        for start, stop in edges.reshape(-1, 2).tolist():
            begin[start:stop], end[start:stop] = begin[start], end[stop - 1]
        return ids, begin, end

    def _offsets(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        plain = {"add_bos": False, "add_eos": False}
        try:
            mappings = self._processor.encode(texts, return_type="offset_mapping", **plain)
        except TypeError:  # sentencepiece before 0.2.2 has another name for it
            protos = self._processor.encode(texts, out_type="immutable_proto", **plain)
            pieces = [list(proto.pieces) for proto in protos]
            return [([p.id for p in row], [(p.begin, p.end) for p in row]) for row in pieces]
        return [(mapping["ids"], mapping["offsets"]) for mapping in mappings]


TokenizerBackend = HuggingFaceBackend | SentencePieceBackend


def _set_values(value: Any) -> Any:
    """Return the JSON value without the entries of objects that are null or false."""
    if _is_set_throughout(value):
        return value
    if isinstance(value, dict):
        entries = ((key, _set_values(entry)) for key, entry in value.items())
        return {key: entry for key, entry in entries if entry is not None and entry is not False}
    return [_set_values(entry) for entry in value] if isinstance(value, list) else value


def _is_set_throughout(value: Any) -> bool:
    """Return whether nothing in a vocabulary or list of merges is null or false, quickly."""
    entries = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list):
        return True
    types = set(map(type, entries))
    if types == {list}:
        types = set(map(type, chain.from_iterable(entries)))
    return types <= _SET_TYPES


def _spans_of(ids: list[int], offsets: Sequence[tuple[int, int]]) -> Spans:
    span = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(ids)).reshape(-1, 2)
    return ids, span[:, 0].copy(), span[:, 1].copy()
