"""What a server's answer says of a prompt's ids, checked for type, length, identity and sign."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from perplexit.errors import ModelError
from perplexit.untrusted_files import Expected, parse_json

# `prompt_logprobs` names ids and is looked up; `echo` names strings and is counted.
Style = Literal["prompt_logprobs", "echo"]
STYLES: tuple[Style, ...] = ("prompt_logprobs", "echo")

NUM_GENERATED = 1  # servers disagree on what 0 means: none, or as many as fit
_ID_PREFIX = "token_id:"
_LONGEST_ID = 10  # digits
_ROUNDING_NATS = 1e-4  # above 0, of a certain token
_MOST_NATS = 1e5  # vLLM writes -9999 for an impossible token
_FEWEST_COMPARED, _MOST_DIFFERENT = 4, 0.25


class PromptAnswerError(ModelError):
    """An answer that cannot be the prompt's log-probabilities; the message says why."""


class Card(msgspec.Struct, frozen=True):
    """What a server's list of models says of one of them."""

    id: str
    root: str | None = None
    max_model_len: int | None = None
    owned_by: str | None = None


class Entry(msgspec.Struct, frozen=True):
    """A token in the place of a prompt's id."""

    logprob: float | None = None
    rank: int | None = None
    decoded_token: str | None = None


class Echoed(msgspec.Struct, frozen=True):
    """The `logprobs` of a choice, one per token."""

    token_logprobs: list[float | None] | None = None
    tokens: list[str | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


Entries = list[dict[str, Entry | float | None] | None]


class Choice(msgspec.Struct, frozen=True):
    """The one choice of a completion, or the parts of it that are used."""

    prompt_logprobs: Entries | None = None
    logprobs: Echoed | None = None


class _Completion(msgspec.Struct, frozen=True):
    choices: list[Choice]
    prompt_logprobs: Entries | None = None


class _Cards(msgspec.Struct, frozen=True):
    data: list[Card]


@dataclass(frozen=True, slots=True)
class PromptAnswer:
    """What one answer says of the T ids of a prompt; of the first, which has no context, nothing.

    logprobs_T: NaN for the first id. texts, ranks: the server's own, None where it gives none.
    top_ids_TK, top_logprobs_TK: the K most likely tokens in the place of each id, most likely
        first; K is 0 unless they were asked for.
    """

    logprobs_T: NDArray[np.float64]
    texts: tuple[str | None, ...]
    ranks: tuple[int | None, ...]
    top_ids_TK: NDArray[np.int64]
    top_logprobs_TK: NDArray[np.float64]

    def without(self, hide: Callable[[str], str]) -> "PromptAnswer":
        """Return the answer with `hide` applied to each text."""
        return replace(self, texts=tuple(text and hide(text) for text in self.texts))


def cards_of(body: bytes, place: str) -> list[Card]:
    """Read the models that the body of `/models` lists. Raises ModelError."""
    expected = Expected(
        "a list of models", ModelError, "check the address (it usually ends in /v1)"
    )
    cards = parse_json(body, expected, _Cards, place=place).data
    for card in cards:
        for text in (card.id, card.root or "", card.owned_by or ""):
            if not text.isprintable() or len(text) > 500:
                expected.refuse(
                    place, f"a model named in characters that are no text: {text[:60]!r}"
                )
        if card.max_model_len is not None and not 1 <= card.max_model_len < 2**31:
            expected.refuse(place, f"a max_model_len of {card.max_model_len}")
    return cards


def choice_of(body: bytes, place: str) -> Choice:
    """Read the one choice in the body of a completion. Raises PromptAnswerError."""
    expected = Expected(
        "a completion", PromptAnswerError, "is it an OpenAI-compatible server, and in order?"
    )
    found = parse_json(body, expected, _Completion, place=place)
    if len(found.choices) != 1:
        expected.refuse(place, f"{len(found.choices)} choices for one prompt")
    choice = found.choices[0]
    if choice.prompt_logprobs is None:
        return Choice(found.prompt_logprobs, choice.logprobs)
    return choice


def answer_of_prompt_logprobs(choice: Choice, ids: list[int], top_k: int) -> PromptAnswer:
    """Read entries: None for the first id, then {id: {logprob, rank, decoded_token, …}, …}.

    The prompt's own id is looked up: beside it there may be likelier ones, in any order.
    Raises PromptAnswerError.
    """
    entries = choice.prompt_logprobs
    if entries is None:
        raise PromptAnswerError("it ignores prompt_logprobs")
    _check_count(len(entries), ids, "prompt_logprobs")
    if entries[0] is not None:
        raise PromptAnswerError("it gives the first id a log-probability: it has added a BOS")
    own = [Entry()]
    for position, (index, entry) in enumerate(zip(ids[1:], entries[1:], strict=True), start=1):
        found = (entry or {}).get(str(index))
        if found is None:
            raise PromptAnswerError(
                f"its prompt_logprobs do not hold the prompt's id {index} at position {position}"
            )
        own.append(_as_entry(found))
    listed = [
        {_id_of(name): _as_entry(value).logprob for name, value in (entry or {}).items()}
        for entry in (entries[1:] if top_k else [])
    ]
    return _answer(own, listed, top_k)


def answer_of_echo(choice: Choice, ids: list[int], top_k: int) -> PromptAnswer:
    """Read `token_logprobs` of the echoed prompt; those of what was generated follow.

    Raises PromptAnswerError.
    """
    echoed = choice.logprobs or Echoed()
    values, texts = echoed.token_logprobs, echoed.tokens
    if values is None or texts is None:
        raise PromptAnswerError("it ignores echo with logprobs")
    if len(values) <= NUM_GENERATED < len(ids):
        raise PromptAnswerError(
            f"it ignores echo: {len(values)} log-probabilities for {len(ids)} ids"
        )
    if len(values) != len(ids) + NUM_GENERATED:
        _check_count(len(values), ids, "echo")
    if values[0] is not None:
        raise PromptAnswerError(
            "it gives the first id a log-probability: it has added a BOS, or shifted by one"
        )
    if len(texts) < len(ids):
        _check_count(len(texts), ids, "list of tokens")
    texts = texts[: len(ids)]
    for position, (index, text) in enumerate(zip(ids, texts, strict=True)):
        if str(text).startswith(_ID_PREFIX) and text != f"{_ID_PREFIX}{index}":
            raise PromptAnswerError(f"it echoes {text} at position {position} for id {index}")
    alternatives = (echoed.top_logprobs or []) if top_k else []
    if top_k and len(alternatives) < len(ids):
        _check_count(len(alternatives), ids, "top_logprobs")
    listed = [
        {_id_of(name, _ID_PREFIX): value for name, value in (entry or {}).items()}
        for entry in alternatives[1 : len(ids)]
    ]
    own = [Entry(value, decoded_token=text) for value, text in zip(values, texts, strict=False)]
    return _answer(own, listed, top_k)


def generated_of(choice: Choice) -> dict[str, float]:
    """Return the log-probability of each text that the server might have generated first.

    Raises PromptAnswerError.
    """
    listed = (choice.logprobs or Echoed()).top_logprobs or [None]
    if listed[0] is None:
        raise PromptAnswerError("it gives no log-probabilities even of what it generates")
    return {text: value for text, value in listed[0].items() if "\ufffd" not in text}


class KnownTexts:
    """The texts that a server gave ids before: a reply to another request has others.

    `echo` names no ids, so two replies of one length can be told apart by their texts alone. The
    text of an id may depend on its neighbours at a prompt's start and inside a character.
    """

    def __init__(self) -> None:
        self._text_of: dict[int, str] = {}

    def check(self, ids: Sequence[int], texts: Sequence[str | None]) -> None:
        """Record the texts. Raises PromptAnswerError where too many differ from those before."""
        pairs = [
            (index, text)
            for index, text in zip(ids[1:], texts[1:], strict=True)
            if text and text.isascii() and not text.startswith(_ID_PREFIX)
        ]
        known = [(index, text) for index, text in pairs if index in self._text_of]
        other = [(index, text) for index, text in known if self._text_of[index] != text]
        if len(known) >= _FEWEST_COMPARED and len(other) > _MOST_DIFFERENT * len(known):
            index, text = other[0]
            raise PromptAnswerError(
                f"{len(other)} of {len(known)} ids have another text than before (id {index} is "
                f"{text!r}, and was {self._text_of[index]!r}): it is the reply to another request"
            )
        for index, text in pairs:
            self._text_of.setdefault(index, text)


def _answer(
    own: Sequence[Entry], listed: Sequence[Mapping[int, float | None]], top_k: int
) -> PromptAnswer:
    """Return the answer for each id's own entry, and the tokens listed for all but the first."""
    logprobs = [_number(entry.logprob, place) for place, entry in enumerate(own[1:], start=1)]
    for position, number in enumerate(logprobs, start=1):
        if number > _ROUNDING_NATS:
            raise PromptAnswerError(f"its log-probability at position {position} is {number:g} > 0")
    top = [_most_likely(named, top_k, position) for position, named in enumerate(listed, start=1)]
    pairs_TK2 = np.zeros((len(own), top_k, 2))
    if top_k:
        pairs_TK2[1:] = np.array(top, dtype=np.float64).reshape(-1, top_k, 2)
    return PromptAnswer(
        np.array([np.nan, *logprobs]),
        tuple(entry.decoded_token for entry in own),
        tuple(entry.rank for entry in own),
        pairs_TK2[..., 0].astype(np.int64),
        pairs_TK2[..., 1],
    )


def _id_of(name: str, mark: str = "") -> int:
    """Return the id in an alternative's name; without a mark, a number may be a digit's text."""
    number = name.removeprefix(mark)
    plain = number.isascii() and number.isdecimal() and len(number) <= _LONGEST_ID
    if (mark and number == name) or not plain:
        raise PromptAnswerError(
            f"it spells its alternatives ({name[:40]!r}), and a text does not tell which id it is "
            "of: a server is needed that names ids, as vLLM does (prompt_logprobs, or echo with "
            "return_tokens_as_token_ids)"
        )
    return int(number)


def _most_likely(
    named: Mapping[int, float | None], top_k: int, position: int
) -> list[tuple[int, float]]:
    """Return the K most likely; the prompt's own id may be listed beside them, in any order."""
    values = {index: _number(value, position) for index, value in named.items()}
    if len(values) < top_k:
        raise PromptAnswerError(
            f"it gives {len(values)} alternatives at position {position} where {top_k} were asked "
            "for"
        )
    return sorted(values.items(), key=lambda item: (-item[1], item[0]))[:top_k]


def _as_entry(item: Entry | float | None) -> Entry:
    return item if isinstance(item, Entry) else Entry(item)


def _check_count(count: int, ids: list[int], what: str) -> None:
    if count != len(ids):
        raise PromptAnswerError(
            f"its {what} has {count} entries for {len(ids)} ids: a truncated answer (a prefix "
            "cache?), or ids that were decoded and tokenised again"
        )


def _number(value: float | None, position: int) -> float:
    if value is None or abs(value) > _MOST_NATS:
        raise PromptAnswerError(f"it gives no log-probability at position {position}, but {value}")
    return float(value)
