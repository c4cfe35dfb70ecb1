"""The known-answer probe: whether a server's prompt log-probabilities are what they must be.

Servers ignore `echo`, shift it by one, tokenise again or cut it short, and none of them says so.
What is known without the model:

1. one log-probability an id, none for the first (length, re-tokenising, an added BOS);
2. the same request twice gives the same (a prefix cache that drops positions);
3. another last id changes nothing before it, and a shorter prompt gives the same numbers
   (a log-probability depends on the ids up to its own and no further);
4. what the server *generates* after a prompt is computed another way: where the prompt's next
   token is among the likeliest texts there, its log-probability must be that one.

The fourth is what finds logits taken one position late: they pass all the others.
"""

from collections.abc import Sequence

from perplexit.errors import CapabilityError
from perplexit.sessions.completions_client import (
    STYLES,
    CompletionsClient,
    PromptAnswer,
    PromptAnswerError,
    Style,
)

PROBE_LENGTH = 24
_FEWEST_IDS = 3
_SPREAD = 0.1  # nats; a bfloat16 server differs by up to 0.05 between batch shapes
_ENOUGH_MATCHES = 4


def working_style(client: CompletionsClient, ids: Sequence[int]) -> Style:
    """The first way of asking whose answers are right for `ids` (the input's own first ids).

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
            _check(client, list(ids[:PROBE_LENGTH]), style)
            return style
        except PromptAnswerError as problem:
            problems.append(f"{style}: {problem}")
    raise CapabilityError(
        f"expected a server that returns the log-probabilities of a prompt's ids, but "
        f"{client.base_url} ({client.model}) gave a wrong answer to a known question: "
        + "; ".join(problems)
        + ". Its perplexity would be wrong; use another server (vLLM is right) or evaluate the "
        "checkpoint itself"
    )


def _check(client: CompletionsClient, ids: list[int], style: Style) -> None:
    answer = client.prompt_answer(ids, style)
    _check_equal(answer, client.prompt_answer(ids, style), len(ids), "a second, identical request")
    shorter = client.prompt_answer(ids[:-1], style)
    _check_equal(answer, shorter, len(ids) - 1, "a prompt that is one id shorter")
    other_id = next((index for index in ids if index != ids[-1]), 0 if ids[-1] else 1)
    changed = client.prompt_answer([*ids[:-1], other_id], style)
    _check_equal(answer, changed, len(ids) - 1, "a prompt with another last id")
    _check_against_generation(client, ids, answer)


def _check_equal(answer: PromptAnswer, other: PromptAnswer, stop: int, what: str) -> None:
    for position in range(1, stop):
        ours, theirs = answer.logprobs[position], other.logprobs[position]
        if ours is None or theirs is None or not abs(ours - theirs) <= _SPREAD:
            raise PromptAnswerError(
                f"{what} changes the log-probability at position {position} from {ours} to {theirs}"
            )


def _check_against_generation(
    client: CompletionsClient, ids: list[int], answer: PromptAnswer
) -> None:
    num_matches = 0
    # From the end: the more context, the likelier is the real next token among the first few.
    for position in range(len(ids) - 1, 0, -1):
        generated = client.next_tokens(ids[:position])
        text, reported = answer.texts[position], answer.logprobs[position]
        if reported is None or not generated:
            continue
        likeliest = max(generated.values())
        known = None if text is None else generated.get(text)
        if known is not None and not abs(known - reported) <= _SPREAD:
            raise PromptAnswerError(
                f"it says {reported:.3f} for {text!r} at position {position}, but {known:.3f} "
                "where it generates it: shifted by one"
            )
        if reported > likeliest + _SPREAD:
            raise PromptAnswerError(
                f"it says {reported:.3f} for the id at position {position}, more than "
                f"{likeliest:.3f}, its own likeliest there: shifted by one"
            )
        num_matches += known is not None
        if num_matches == _ENOUGH_MATCHES:
            return
    if num_matches == 0:
        raise PromptAnswerError(
            f"none of the {len(ids) - 1} known tokens is among the likeliest that it generates, "
            "so its answers cannot be told from wrong ones"
        )
