"""What an evaluation is asked for, checked before a model is loaded, and resuming of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from perplexit.declared_options import check_numbers
from perplexit.errors import ResumeError, UsageError
from perplexit.quantization.precisions import canonical_dtype, canonical_precision
from perplexit.runs.measurement import MOST_NAMED, differing_names, flat_record, further, plain_json
from perplexit.runs.run import Run
from perplexit.sessions.options import DECLARED, EngineOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The parameters of `evaluate`, except for model, input, folder and progress.

    options: those of ScoringOptions that differ from their defaults.
    loads_model: whether a model is loaded; an open session has settings of its own.
    """

    batch_size: int | Literal["auto"]
    top_k: int
    confidence: float
    on_non_finite: str
    saves_reference: bool
    has_reference: bool
    options: Mapping[str, Any]
    loads_model: bool

    @property
    def engine_options(self) -> EngineOptions:
        """Return the options that a model is loaded with."""
        own = EngineOptions.__annotations__
        return cast(EngineOptions, {n: x for n, x in self.options.items() if n in own})

    def option(self, name: str) -> Any:
        """Return an option of ScoringOptions; its default where it was left out."""
        return self.options.get(name, DECLARED[name].default)

    def check(self) -> None:
        """Raise UsageError for a value that is out of range, or that another one rules out."""
        sizes = {name: self.options.get(name) for name in ("prompt_len", "decode_chunk")}
        check_numbers(batch_size=self.batch_size, top_k=self.top_k)
        if self.batch_size != "auto" and not isinstance(self.batch_size, int):
            raise UsageError(f"batch_size must be 'auto' or at least 1, got {self.batch_size!r}")
        if not 0 < self.confidence < 1:
            raise UsageError(
                f"confidence must lie between 0 and 1, got {self.confidence}; 0.95 is usual"
            )
        if self.on_non_finite not in ("error", "count"):
            raise UsageError(
                f"on_non_finite must be 'error' or 'count', got {self.on_non_finite!r}"
            )
        mode = self.option("mode")
        if mode not in ("full", "cached"):
            raise UsageError(f"mode must be 'full' or 'cached', got {mode!r}")
        for name, value in sizes.items():
            if value is not None and mode == "full":
                raise UsageError(
                    f"{name} is a setting of prefill and decode, but the mode is 'full', which has "
                    "neither; ask for mode 'cached', or leave it out"
                )


def check_asked_conditions(recorded: Run, asked: Request, input_fingerprint: str) -> None:
    """Raise ResumeError where what is asked for cannot be what `recorded` was begun under.

    It spares the loading of a model. `check_same_conditions` asks again with everything that the
    loaded model says.
    """
    session, mode = recorded.session, asked.option("mode")
    quantization = (session.get("quantization") or {}).get("name")
    pairs: dict[str, tuple[Any, Any]] = {
        "input_fingerprint": (recorded.input_fingerprint, input_fingerprint),
        "top_k": (recorded.top_k, asked.top_k),
        "on_non_finite": (recorded.on_non_finite, asked.on_non_finite),
        "confidence": (recorded.confidence, asked.confidence),
        "mode": (session.get("mode", "full"), mode),
        "save_reference": (recorded.saved_reference is not None, asked.saves_reference),
        "reference": (recorded.reference is not None, asked.has_reference),
    }
    for name in ("prompt_len", "decode_chunk"):
        wanted_size = asked.option(name) or 1
        pairs[name] = (session.get(name), wanted_size if mode == "cached" else None)
    # An open session has its own settings; other engines may spell the same settings otherwise.
    if asked.loads_model and session.get("engine") == "pytorch":
        dtype = canonical_dtype(asked.options.get("dtype", "float32"))
        pairs["dtype"] = (session.get("dtype"), dtype)
        base, _, reach = asked.options.get("quantization", "").partition(":")
        wanted = ":".join(filter(None, (canonical_precision(base), reach))) or None
        pairs["quantization"] = (quantization, wanted)
    before, after = ({name: pair[side] for name, pair in pairs.items()} for side in (0, 1))
    _refuse(recorded, before, after, asked.batch_size)


def check_same_conditions(recorded: Run, wanted: Run, batch_size: int | str) -> None:
    """Raise ResumeError where going on with `recorded` would mix two measurements.

    Everything that can change a figure must be equal: input, weights, engine and its settings,
    precision, device, threads, what is recorded a token. An explicit batch size must be the
    recorded one; "auto" takes whatever was recorded.
    """
    before, after = _recorded_and_wanted(recorded, wanted)
    _refuse(recorded, before, after, batch_size)


def _refuse(
    recorded: Run, before: Mapping[str, Any], after: Mapping[str, Any], batch_size: int | str
) -> None:
    """Raise ResumeError that names what differs between recorded conditions and those wanted."""
    names = differing_names(before, after)
    differences = [
        f"{name}: recorded {_shown(before.get(name))}, now {_shown(after.get(name))}"
        for name in names[:MOST_NAMED]
    ] + further(names)
    planned = recorded.batch_plan.get("batch_size")
    if batch_size not in ("auto", planned):
        differences.append(f"batch_size: recorded {_shown(planned)}, now {_shown(batch_size)}")
    if differences:
        raise ResumeError(
            f"expected the conditions that the run {recorded.folder} was begun under, but "
            + "; ".join(differences)
            + ". Name another folder with --run, or repeat the recorded settings"
        )


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not set" if value is None else str(value)


def _recorded_and_wanted(recorded: Run, wanted: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return all that must be equal, of both, by dotted names."""
    first, second = _conditions(recorded), _conditions(wanted)
    for name in ("reference", "saved_reference"):
        ours, theirs = getattr(recorded, name), getattr(wanted, name)
        if ours is None or theirs is None:  # with and without one differ in that alone
            first[name], second[name] = (x and x.get("kind", "kept") for x in (ours, theirs))
        else:
            first |= _flat(name, ours)
            second |= _flat(name, theirs)
    return first, second


def _conditions(run: Run) -> dict[str, Any]:
    names = ["input_fingerprint", "threads", "top_k", "on_non_finite", "confidence"]
    names += ["perplexit_version"]
    return {
        **{name: getattr(run, name) for name in names},
        "adapter": _adapter(run.model),
        "model weights": run.model.get("weights_fingerprint"),
        **_flat("", run.session),
    }


def _adapter(model: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what an adapter does to the figures; where its folder lies does nothing."""
    adapter = model.get("adapter")
    return adapter and {"fingerprint": adapter["fingerprint"], "merged": adapter["merged"]}


def _flat(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record by dotted names, without what is measured while a run goes on."""
    measured = ("self_kl_mean", "self_kl_max", "proof", "head_file")
    lasting = {key: value for key, value in record.items() if key not in measured}
    return flat_record(plain_json(lasting), f"{name}." if name else "")
