"""What each difference contributes: one setting after another turned, and the model run again."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from perplexit.diagnosis.input_steps import input_steps
from perplexit.errors import CapabilityError, ModelError, PerplexitError, QuantizationError
from perplexit.evaluation import evaluate
from perplexit.inputs.token_file import TokenFile
from perplexit.metrics.likelihood import exp_or_inf
from perplexit.runs.run import Run
from perplexit.sessions.base import InferenceSession, OpenSession
from perplexit.sessions.registry import load_session

Model = InferenceSession | str | Path
Inputs = tuple[TokenFile | None, TokenFile | None]  # of the first and of the second run

SESSION_ASPECTS = (
    *("weights", "dtype", "quantization", "engine", "engine version"),
    *("settings", "device", "threads", "batch size", "perplexit version"),
)


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


@dataclass(frozen=True, slots=True)
class Setting:
    """How a session is opened, and what it must turn out to be."""

    address: str
    weights: str  # their fingerprint
    engine: str
    dtype: str | None
    quantization: str | None
    device: str | None
    threads: int | None

    @classmethod
    def of(
        cls, model: Mapping[str, Any], session: Mapping[str, Any], threads: int | None = None
    ) -> "Setting":
        """Return the setting that a run's record, or a session, describes."""
        return cls(
            address=str(model.get("address")),
            weights=str(model.get("weights_fingerprint")),
            engine=str(session.get("engine")),
            dtype=session.get("dtype"),
            quantization=(session.get("quantization") or {}).get("name"),
            device=session.get("device"),
            threads=threads,
        )


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
    first: Run, second: Run, *, inputs: Inputs, aspects: Sequence[str], models: Sequence[Model] = ()
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
        session: InferenceSession
        setting: Setting | None = None
        for number, place in enumerate(places):
            turned += place.aspects
            after = end if number == len(places) - 1 else None
            if after is None:
                try:
                    if setting != place.setting:
                        setting = None
                        stack.close()
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
    first: Run, second: Run, inputs: Inputs, aspects: Sequence[str], models: Sequence[Model]
) -> tuple[list[_Place], list[str]]:
    """Return the way: the input changes first; the session, if only the second model is at hand."""
    reasons = []
    ours, theirs = (Setting.of(run.model, run.session, run.threads) for run in (first, second))
    sessions = session_changes(ours, theirs, aspects)
    on_session = {aspect for turned, _ in sessions for aspect in turned}
    on_input = tuple(dict.fromkeys(aspect for aspect in aspects if aspect not in on_session))
    changes: list[tuple[tuple[str, ...], TokenFile | None]] = []
    if inputs[0] is not None and inputs[1] is not None:
        changes = [*input_steps(inputs[0], inputs[1], on_input)]
    elif on_input:
        changes = [(on_input, inputs[1])]
        reasons.append("an input is not at hand (name both with --input), so its settings are one")
    if changes and sessions and not _at_hand(ours, models):
        turns = [_Place(turned, inputs[0], setting) for turned, setting in sessions]
        return turns + [_Place(*change, theirs) for change in changes], reasons
    places = [_Place(*change, ours) for change in changes]
    return places + [_Place(turned, inputs[1], setting) for turned, setting in sessions], reasons


def session_changes(
    setting: Setting, goal: Setting, aspects: Sequence[str]
) -> list[tuple[tuple[str, ...], Setting]]:
    """Return the changes from one session to another: (the aspects turned, the setting after it).

    The precision is turned on the first run's engine and weights, and engine and weights last.
    Empty where no aspect is one of a session.
    """
    named = [aspect for aspect in SESSION_ASPECTS if aspect in aspects]
    if not named:
        return []
    steps: list[tuple[tuple[str, ...], Setting]] = []
    for aspect in ("dtype", "quantization"):
        if aspect in named[:-1]:
            setting = replace(setting, **{aspect: getattr(goal, aspect)})
            steps.append(((aspect,), setting))
    if "weights" in named and setting.engine == goal.engine and len(named) > len(steps) + 1:
        setting = replace(setting, address=goal.address, weights=goal.weights)
        steps.append((("weights",), setting))
    told = {aspect for turned, _ in steps for aspect in turned}
    return [*steps, (tuple(a for a in named if a not in told), goal)]


def _at_hand(setting: Setting, models: Sequence[Model]) -> bool:
    try:
        with opened(setting, models):
            return True
    except PerplexitError:
        return False


@contextmanager
def opened(setting: Setting, models: Sequence[Model]) -> Iterator[InferenceSession]:
    """Return the session that a setting describes, from `models` or from its own address.

    An open session among `models` stays open. Raises ModelError where none has these weights under
    these conditions, or what loading raised.
    """
    reasons = []
    for model in (*models, setting.address):
        with ExitStack() as stack:
            session: InferenceSession
            try:
                if isinstance(model, str | Path):
                    session = stack.enter_context(_loaded(model, setting))
                else:
                    session = model
            except PerplexitError as error:
                reasons.append(str(error))
                continue
            why = _mismatch(session, setting)
            if why is None:
                yield session
                return
            reasons.append(why)
    raise ModelError(f"the model {setting.address} is not at hand: " + "; ".join(reasons))


def _loaded(address: str | Path, setting: Setting) -> OpenSession:
    """Return the session, with the options that its engine has."""
    names = ["device", "threads", "dtype", "quantization"]
    while True:
        try:
            return load_session(address, **{name: getattr(setting, name) for name in names})
        except (CapabilityError, QuantizationError):
            if not names:
                raise
            names.pop()  # a program has its precision inside; what came out is checked


def _mismatch(session: InferenceSession, setting: Setting) -> str | None:
    """Return why a session is not the one that is wanted; None where it is."""
    found = Setting.of(asdict(session.model), asdict(session.description))
    for name in ("weights", "engine", "dtype", "quantization"):
        ours, wanted = getattr(found, name), getattr(setting, name)
        if ours != wanted:
            return f"{session.model.address} has {name} {ours!r}, not {wanted!r}"
    return None


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
