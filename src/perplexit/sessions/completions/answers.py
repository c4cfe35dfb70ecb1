"""What a server's answer says of a prompt's ids, checked for length, identity and sign."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# `prompt_logprobs` names ids and is looked up; `echo` names strings and is counted.
Style = Literal["prompt_logprobs", "echo"]
STYLES: tuple[Style, ...] = ("prompt_logprobs", "echo")

NUM_GENERATED = 1  # servers disagree on what 0 means: none, or as many as fit
_ID_PREFIX = "token_id:"


class PromptAnswerError(Exception):
    """An answer that cannot be the prompt's log-probabilities; the message says why."""


@dataclass(frozen=True, slots=True)
class PromptAnswer:
    """The log-probability and the text of each prompt id, as one answer reports them.

    logprobs:     one an id; None for the first, which has no context.
    texts:        the server's text of each id, None where it gives none.
    alternatives: (id, log-probability) of the most likely tokens in the place of each id, none for
                  the first. None unless asked for.
    ranks:        the server's rank of each id, None where it gives none.
    """

    logprobs: tuple[float | None, ...]
    texts: tuple[str | None, ...]
    alternatives: tuple[tuple[tuple[int, float], ...], ...] | None = None
    ranks: tuple[int | None, ...] = ()


def answer_of_prompt_logprobs(entries: Any, ids: list[int], top_k: int) -> PromptAnswer:
    """Entries are None for the first id, then {id: {logprob, rank, decoded_token, …}, …}.

    The prompt's own id is looked up: beside it there may be likelier ones, in any order.
    Raises PromptAnswerError.
    """
    if entries is None:
        raise PromptAnswerError("it ignores prompt_logprobs")
    _check_count(len(entries), ids, "prompt_logprobs")
    if entries[0] is not None:
        raise PromptAnswerError("it gives the first id a log-probability: it has added a BOS")
    found, alternatives = [], []
    for position, (index, entry) in enumerate(zip(ids[1:], entries[1:], strict=True), start=1):
        own = (entry or {}).get(str(index), (entry or {}).get(index))
        if own is None:
            raise PromptAnswerError(
                f"its prompt_logprobs do not hold the prompt's id {index} at position {position}"
            )
        found.append(_as_record(own))
        if top_k:
            named = {
                _id_of(name): _as_record(value).get("logprob") for name, value in entry.items()
            }
            alternatives.append(_most_likely(named, top_k, position))
    return PromptAnswer(
        _checked_values((None, *(item["logprob"] for item in found))),
        (None, *(item.get("decoded_token") for item in found)),
        ((), *alternatives) if top_k else None,
        (None, *(item.get("rank") for item in found)),
    )


def answer_of_echo(logprobs: Any, ids: list[int], top_k: int) -> PromptAnswer:
    """`token_logprobs` of the echoed prompt, then of what was generated.

    Raises PromptAnswerError.
    """
    values = (logprobs or {}).get("token_logprobs")
    texts = (logprobs or {}).get("tokens")
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
    texts = [*texts, *[None] * len(ids)][: len(ids)]
    for position, (index, text) in enumerate(zip(ids, texts, strict=True)):
        if str(text).startswith(_ID_PREFIX) and text != f"{_ID_PREFIX}{index}":
            raise PromptAnswerError(f"it echoes {text} at position {position} for id {index}")
    alternatives = _echoed_alternatives(logprobs, ids, top_k) if top_k else None
    return PromptAnswer(_checked_values(tuple(values[: len(ids)])), tuple(texts), alternatives)


def _echoed_alternatives(
    logprobs: Mapping[str, Any], ids: list[int], top_k: int
) -> tuple[tuple[tuple[int, float], ...], ...]:
    entries = logprobs.get("top_logprobs") or []
    if len(entries) < len(ids):
        _check_count(len(entries), ids, "top_logprobs")
    found: list[tuple[tuple[int, float], ...]] = [()]
    for position, entry in enumerate(entries[1 : len(ids)], start=1):
        named = {_id_of(name, _ID_PREFIX): value for name, value in (entry or {}).items()}
        found.append(_most_likely(named, top_k, position))
    return tuple(found)


def _id_of(name: object, mark: str = "") -> int:
    """The id in an alternative's name. Without a mark, a bare number may be the text of a digit."""
    number = str(name).removeprefix(mark)
    if (mark and number == name) or not number.isdecimal():
        raise PromptAnswerError(
            f"it spells its alternatives ({name!r}), and a text does not tell which id it is of: "
            "a server is needed that names ids, as vLLM does (prompt_logprobs, or echo with "
            "return_tokens_as_token_ids)"
        )
    return int(number)


def _most_likely(
    named: Mapping[int, Any], top_k: int, position: int
) -> tuple[tuple[int, float], ...]:
    """The K most likely; the prompt's own id may be listed beside them, in any order."""
    for value in named.values():
        if not isinstance(value, int | float):
            raise PromptAnswerError(f"it lists {value!r} for a number at position {position}")
    if len(named) < top_k:
        raise PromptAnswerError(
            f"it gives {len(named)} alternatives at position {position} where {top_k} were asked "
            "for"
        )
    ordered = sorted(named.items(), key=lambda item: (-item[1], item[0]))[:top_k]
    return tuple((index, float(value)) for index, value in ordered)


def _as_record(item: Any) -> Mapping[str, Any]:
    return item if isinstance(item, Mapping) else {"logprob": item}


def _check_count(count: int, ids: list[int], what: str) -> None:
    if count != len(ids):
        raise PromptAnswerError(
            f"its {what} has {count} entries for {len(ids)} ids: a truncated answer (a prefix "
            "cache?), or ids that were decoded and tokenised again"
        )


def _checked_values(values: tuple[Any, ...]) -> tuple[float | None, ...]:
    for position, value in enumerate(values[1:], start=1):
        if not isinstance(value, int | float):
            raise PromptAnswerError(f"it gives no number at position {position}, but {value!r}")
        if value > 1e-4:
            raise PromptAnswerError(f"its log-probability at position {position} is {value} > 0")
    return (None, *(float(value) for value in values[1:]))
