"""From one run's session to another's, a setting at a time, with the sessions that are at hand."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from perplexit.errors import CapabilityError, ModelError, PerplexitError, QuantizationError
from perplexit.runs.run import Run
from perplexit.sessions.base import InferenceSession
from perplexit.sessions.registry import load_session

Model = InferenceSession | str | Path

SESSION_ASPECTS = (
    "weights",
    "dtype",
    "quantization",
    "engine",
    "engine version",
    "settings",
    "device",
    "threads",
    "batch size",
    "perplexit version",
)


@dataclass(frozen=True, slots=True)
class Setting:
    """How a session is opened, and what it must turn out to be."""

    address: str
    engine: str
    weights_fingerprint: str
    dtype: str | None
    quantization: str | None
    device: str | None
    threads: int | None

    @classmethod
    def of(cls, run: Run) -> "Setting":
        """Return the setting of a run."""
        quantization = run.session.get("quantization") or {}
        return cls(
            address=str(run.model.get("address")),
            engine=str(run.session.get("engine")),
            weights_fingerprint=str(run.model.get("weights_fingerprint")),
            dtype=run.session.get("dtype"),
            quantization=quantization.get("name"),
            device=run.session.get("device"),
            threads=run.threads,
        )


@dataclass(frozen=True, slots=True)
class SessionStep:
    """The aspects that are turned, and the setting after it."""

    aspects: tuple[str, ...]
    setting: Setting


def session_steps(first: Run, second: Run, aspects: Sequence[str]) -> list[SessionStep]:
    """Return steps from the first run's session to the second's; empty where they do not differ.

    The precision is turned on the first run's engine and weights, and engine and weights last.
    """
    named = [aspect for aspect in SESSION_ASPECTS if aspect in aspects]
    if not named:
        return []
    setting, goal = Setting.of(first), Setting.of(second)
    steps = []
    changes: dict[str, dict[str, Any]] = {
        "dtype": {"dtype": goal.dtype},
        "quantization": {"quantization": goal.quantization},
    }
    for aspect, change in changes.items():
        if aspect in named and aspect != named[-1]:
            setting = replace(setting, **change)
            steps.append(SessionStep((aspect,), setting))
    if "weights" in named and setting.engine == goal.engine and len(named) > len(steps) + 1:
        setting = replace(
            setting, address=goal.address, weights_fingerprint=goal.weights_fingerprint
        )
        steps.append(SessionStep(("weights",), setting))
    told = {aspect for step in steps for aspect in step.aspects}
    return [*steps, SessionStep(tuple(a for a in named if a not in told), goal)]


@contextmanager
def opened(setting: Setting, models: Sequence[Model]) -> Iterator[InferenceSession]:
    """Return the session that a setting describes, from `models` or from its own address.

    An open session among `models` stays open. Raises ModelError where none has these weights under
    these conditions, or what loading raised.
    """
    reasons = []
    for model in (*models, setting.address):
        if not isinstance(model, str | Path):
            why = _mismatch(model, setting)
            if why is None:
                yield model
                return
            reasons.append(why)
            continue
        try:
            session = _loaded(model, setting)
        except PerplexitError as error:
            reasons.append(str(error))
            continue
        try:
            why = _mismatch(session, setting)
            if why is None:
                yield session
                return
            reasons.append(why)
        finally:
            session.close()
    raise ModelError(f"the model {setting.address} is not at hand: " + "; ".join(reasons))


def _loaded(address: str | Path, setting: Setting) -> InferenceSession:
    """Return the session, with the options that its engine has."""
    options = {
        "device": setting.device,
        "threads": setting.threads,
        "dtype": setting.dtype,
        "quantization": setting.quantization,
    }
    while True:
        try:
            return load_session(address, **options)  # type: ignore[arg-type]
        except (CapabilityError, QuantizationError):
            if not options:
                raise
            options.popitem()  # a program has its precision inside; what came out is checked


def _mismatch(session: InferenceSession, setting: Setting) -> str | None:
    """Return why a session is not the one that is wanted; None where it is."""
    description = asdict(session.description)
    found = {
        "weights": session.model.weights_fingerprint,
        "engine": description["engine"],
        "dtype": description["dtype"],
        "quantization": (description.get("quantization") or {}).get("name"),
    }
    wanted = {
        "weights": setting.weights_fingerprint,
        "engine": setting.engine,
        "dtype": setting.dtype,
        "quantization": setting.quantization,
    }
    for name, value in wanted.items():
        if found[name] != value:
            return f"{session.model.address} has {name} {found[name]!r}, not {value!r}"
    return None
