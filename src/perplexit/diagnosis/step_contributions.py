"""What each difference contributes: one setting after another turned, and the model run again."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

from perplexit.diagnosis.input_steps import input_steps
from perplexit.diagnosis.session_steps import Model, Setting, opened, session_steps
from perplexit.errors import PerplexitError
from perplexit.evaluation import evaluate
from perplexit.inputs.token_file import TokenFile
from perplexit.metrics.likelihood import exp_or_inf
from perplexit.runs.run import Run
from perplexit.sessions.base import InferenceSession


@dataclass(frozen=True, slots=True)
class Step:
    """One change on the way from the first run to the second, everything else held still.

    nats: how much the mean nll per token changed (above 0: worse); the steps' sum is the whole
    difference. Where the tokenizer changed, tokens are other tokens, and bits per byte tell more.
    """

    aspects: tuple[str, ...]
    nats: float
    perplexity_before: float
    perplexity_after: float
    bits_per_byte_before: float | None
    bits_per_byte_after: float | None
    num_tokens_before: int
    num_tokens_after: int


class Measured(NamedTuple):
    """What a step needs of a run."""

    mean_nll: float
    bits_per_byte: float | None
    num_tokens: int


class _Place(NamedTuple):
    """A point on the way: what was turned to come here, and the measurement's conditions."""

    aspects: tuple[str, ...]
    tokens: TokenFile | None
    setting: Setting


def measured(run: Run) -> Measured | None:
    """Return the run's mean nll; None where it has none."""
    if run.nll_sum is None or not run.num_tokens:
        return None
    return Measured(run.nll_sum / run.num_tokens, run.bits_per_byte, run.num_tokens)


def steps_between(
    first: Run,
    second: Run,
    *,
    inputs: tuple[TokenFile | None, TokenFile | None],
    aspects: Sequence[str],
    models: Sequence[Model] = (),
) -> tuple[list[Step], list[str]]:
    """Return (the steps from the first run to the second, why some could not be told apart).

    The ends are the runs' own figures, so the steps always add up to the whole difference. A place
    that cannot be measured (its model is not at hand, or does not take these ids) is left out, and
    its change goes into the next step.
    """
    start, end = measured(first), measured(second)
    if start is None or end is None:
        return [], ["a run has no finite loss to explain"]
    places, reasons = _places(first, second, inputs, aspects, models)
    steps: list[Step] = []
    before = start
    turned: tuple[str, ...] = ()
    with ExitStack() as stack:
        session: InferenceSession | None = None
        setting: Setting | None = None
        for number, place in enumerate(places):
            turned += place.aspects
            after: Measured | None = end
            if number < len(places) - 1:
                after = None
                try:
                    if session is None or setting != place.setting:
                        stack.close()
                        session = None
                        session = stack.enter_context(opened(place.setting, models))
                        setting = place.setting
                    if place.tokens is None:
                        reasons.append(f"{' and '.join(turned)} cannot be turned alone")
                    else:
                        after = measured(evaluate(session, place.tokens, on_non_finite="count"))
                except PerplexitError as error:
                    reasons.append(f"{' and '.join(turned)} not measured alone: {error}")
            if after is not None:
                steps.append(_step(turned, before, after))
                before, turned = after, ()
    return steps, reasons


def _places(
    first: Run,
    second: Run,
    inputs: tuple[TokenFile | None, TokenFile | None],
    aspects: Sequence[str],
    models: Sequence[Model],
) -> tuple[list[_Place], list[str]]:
    """Return the way: the input changes first; the session, if only the second model is at hand."""
    reasons = []
    ours, theirs = Setting.of(first), Setting.of(second)
    sessions = session_steps(first, second, aspects)
    on_session = {aspect for step in sessions for aspect in step.aspects}
    on_input = tuple(dict.fromkeys(aspect for aspect in aspects if aspect not in on_session))
    changes: list[tuple[tuple[str, ...], TokenFile | None]] = []
    if inputs[0] is not None and inputs[1] is not None:
        changes = [(s.aspects, s.tokens) for s in input_steps(inputs[0], inputs[1], on_input)]
    elif on_input:
        changes = [(on_input, inputs[1])]
        reasons.append("an input is not at hand (name both with --input), so its settings are one")
    if changes and sessions and not _at_hand(ours, models):
        turns = [_Place(step.aspects, inputs[0], step.setting) for step in sessions]
        return turns + [_Place(a, tokens, theirs) for a, tokens in changes], reasons
    places = [_Place(a, tokens, ours) for a, tokens in changes]
    return places + [_Place(s.aspects, inputs[1], s.setting) for s in sessions], reasons


def _at_hand(setting: Setting, models: Sequence[Model]) -> bool:
    try:
        with opened(setting, models):
            return True
    except PerplexitError:
        return False


def _step(aspects: tuple[str, ...], before: Measured, after: Measured) -> Step:
    return Step(
        aspects=tuple(dict.fromkeys(aspects)),
        nats=after.mean_nll - before.mean_nll,
        perplexity_before=exp_or_inf(before.mean_nll),
        perplexity_after=exp_or_inf(after.mean_nll),
        bits_per_byte_before=before.bits_per_byte,
        bits_per_byte_after=after.bits_per_byte,
        num_tokens_before=before.num_tokens,
        num_tokens_after=after.num_tokens,
    )
