"""Whether a run can be continued: every condition that can change a figure must be equal."""

from collections.abc import Mapping
from typing import Any

from perplexit.errors import ResumeError
from perplexit.evaluation.request import Request
from perplexit.quantization.precisions import canonical_dtype, canonical_precision
from perplexit.runs.measurement import (
    MOST_NAMED,
    differing_names,
    flat_record,
    further,
    plain_json,
)
from perplexit.runs.run import Run


def check_asked_conditions(recorded: Run, asked: Request, input_fingerprint: str) -> None:
    """Raise ResumeError where what is asked for cannot be what `recorded` was begun under.

    It spares the loading of a model. `check_same_conditions` asks again with everything that the
    loaded model says.
    """
    session, cached = recorded.session, asked.mode == "cached"
    quantization = (session.get("quantization") or {}).get("name")
    pairs: dict[str, tuple[Any, Any]] = {
        "input_fingerprint": (recorded.input_fingerprint, input_fingerprint),
        "top_k": (recorded.top_k, asked.top_k),
        "on_non_finite": (recorded.on_non_finite, asked.on_non_finite),
        "confidence": (recorded.confidence, asked.confidence),
        "mode": (session.get("mode", "full"), asked.mode),
        "prompt_len": (session.get("prompt_len"), asked.prompt_len if cached else None),
        "decode_chunk": (
            session.get("decode_chunk"),
            asked.decode_chunk if cached else None,
        ),
        "save_reference": (recorded.saved_reference is not None, asked.saves_reference),
        "reference": (recorded.reference is not None, asked.has_reference),
    }
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
    """All that must be equal, of both, by dotted names."""
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
    """What an adapter does to the figures; where its folder lies does nothing."""
    adapter = model.get("adapter")
    return adapter and {"fingerprint": adapter["fingerprint"], "merged": adapter["merged"]}


def _flat(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """The record by dotted names, without what is measured while a run goes on."""
    measured = ("self_kl_mean", "self_kl_max", "proof", "head_file")
    lasting = {key: value for key, value in record.items() if key not in measured}
    return flat_record(plain_json(lasting), f"{name}." if name else "")
