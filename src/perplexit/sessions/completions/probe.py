"""The known-answer probe: whether a server's prompt log-probabilities are what they must be.

Servers ignore `echo`, shift it by one, tokenise again or cut it short, and none of them says so.
What is known without the model:

1. one log-probability per id, none for the first (length, re-tokenising, an added BOS);
2. the same request twice gives the same (a prefix cache that drops positions);
3. another last id changes nothing before it, and a shorter prompt gives the same numbers
   (a log-probability depends on the ids up to its own and no further);
4. what the server *generates* after a prompt is computed another way: a likely next token, put at
   the prompt's end, must get the log-probability that it had there.

The fourth is what finds logits taken one position late: they pass all the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perplexit.errors import CapabilityError
from perplexit.sessions.completions.answers import STYLES, PromptAnswer, PromptAnswerError, Style
from perplexit.sessions.completions.client import CompletionsClient, RequestRefusedError

PROBE_LENGTH = 24
_FEWEST_IDS = 3
_SPREAD = 0.1  # nats; a bfloat16 server differs by up to 0.05 between batch shapes
_TEXTS_LENGTH = 256  # ids whose texts are learnt, to recognise what is generated
_ENOUGH_KNOWN, _KNOWN_A_POSITION = 4, 2


@dataclass(frozen=True, slots=True)
class WorkingStyle:
    """How to ask a server, with the first question that it answered right and its answer."""

    style: Style
    ids: list[int]
    answer: PromptAnswer


def working_style(client: CompletionsClient, ids: Sequence[int]) -> WorkingStyle:
    """Find the first way of asking whose answers are right for `ids` (the input's own first ids).

    Raises CapabilityError that says what is wrong with each way.
    """
    if len(ids) < _FEWEST_IDS:
        raise CapabilityError(
            f"expected a window of at least {_FEWEST_IDS} ids to check the server with, got "
            f"{len(ids)}; prepare the input with longer windows"
        )
    problems = []
    for style in STYLES:
        try:
            answer = _check(client, list(ids[:_TEXTS_LENGTH]), style)
            return WorkingStyle(style, list(ids[:PROBE_LENGTH]), answer)
        except PromptAnswerError as problem:
            problems.append(f"{style}: {problem}")
    raise CapabilityError(
        f"expected a server that returns the log-probabilities of a prompt's ids, but "
        f"{client.base_url} ({client.model}) gave a wrong answer to a known question: "
        + "; ".join(problems)
        + ". Its perplexity would be wrong; use another server (vLLM is right) or evaluate the "
        "checkpoint itself"
    )


def check_still_the_same(before: PromptAnswer, now: PromptAnswer | PromptAnswerError) -> None:
    """Hold a later answer to the probe's first question against the first one.

    A server may have been restarted with another model since. Raises PromptAnswerError.
    """
    if isinstance(now, PromptAnswerError):
        raise now
    _check_equal(before, now, len(before.logprobs_T), "asking the first question again")


def check_alternatives(
    client: CompletionsClient, ids: Sequence[int], style: Style, top_k: int
) -> PromptAnswer:
    """Return the answer for the input's first ids with `top_k` alternatives, after it was checked.

    Asking for them must change no log-probability. Raises CapabilityError where the server refuses
    so many, gives fewer, or does not name their ids.
    """
    try:
        probe = list(ids[:PROBE_LENGTH])
        answer = client.prompt_answer(probe, style, top_k=top_k)
        plain = client.prompt_answer(probe, style)
        _check_equal(plain, answer, len(probe), f"asking for {top_k} alternatives")
    except (PromptAnswerError, RequestRefusedError) as problem:
        raise CapabilityError(
            f"expected the {top_k} most likely tokens beside each of the prompt's (--top-k "
            f"{top_k}) from {client.base_url} ({client.model}), asked by {style}, but {problem}. "
            "Ask for fewer, start the server with a higher limit (vLLM: --max-logprobs), or "
            "leave --top-k out"
        ) from problem
    return answer


def _check(client: CompletionsClient, all_ids: list[int], style: Style) -> PromptAnswer:
    ids = all_ids[:PROBE_LENGTH]
    answer = client.prompt_answer(ids, style)
    _check_equal(answer, client.prompt_answer(ids, style), len(ids), "a second, identical request")
    shorter = client.prompt_answer(ids[:-1], style)
    _check_equal(answer, shorter, len(ids) - 1, "a prompt that is one id shorter")
    other_id = next((index for index in ids if index != ids[-1]), 0 if ids[-1] else 1)
    changed = client.prompt_answer([*ids[:-1], other_id], style)
    _check_equal(answer, changed, len(ids) - 1, "a prompt with another last id")
    id_of_text = _id_of_text(all_ids, client.prompt_answer(all_ids, style))
    _check_against_generation(client, ids, style, id_of_text)
    return answer


def _check_equal(answer: PromptAnswer, other: PromptAnswer, stop: int, what: str) -> None:
    ours_T, theirs_T = answer.logprobs_T[:stop], other.logprobs_T[:stop]
    wrong = np.flatnonzero(~(np.abs(ours_T - theirs_T) <= _SPREAD))[1:]  # the first id has none
    if len(wrong):
        raise PromptAnswerError(
            f"{what} changes the log-probability at position {wrong[0]} from {ours_T[wrong[0]]} to "
            f"{theirs_T[wrong[0]]}"
        )


def _check_against_generation(
    client: CompletionsClient, ids: list[int], style: Style, id_of_text: dict[str, int]
) -> None:
    """Score what the server generates as if it were the prompt: it must get the same number."""
    num_known = 0
    # From the end: the more context, the further a wrong answer is from the right one.
    for position in range(len(ids) - 1, 0, -1):
        context = ids[:position]
        generated = client.next_tokens(context)
        likely = [(text, value) for text, value in generated.items() if text in id_of_text]
        for text, known in likely[:_KNOWN_A_POSITION]:
            reported = client.prompt_answer([*context, id_of_text[text]], style).logprobs_T[-1]
            if not abs(known - reported) <= _SPREAD:
                raise PromptAnswerError(
                    f"it says {reported:.3f} for {text!r} at position {position}, but "
                    f"{known:.3f} where it generates it: shifted by one"
                )
            num_known += 1
        if num_known >= _ENOUGH_KNOWN:
            return
    if num_known == 0:
        raise PromptAnswerError(
            "nothing that it finds likely after these ids is among them, so its answers cannot be "
            "told from wrong ones; begin with a longer window"
        )


def _id_of_text(ids: list[int], answer: PromptAnswer) -> dict[str, int]:
    """Return the id of each text that stands for one id only, among `ids`."""
    found: dict[str, set[int]] = {}
    for index, text in zip(ids, answer.texts, strict=True):
        if text is not None and "\ufffd" not in text:
            found.setdefault(text, set()).add(index)
    return {text: min(indices) for text, indices in found.items() if len(indices) == 1}
