"""The conditions of a measurement: whether a model fits an input, and whether two runs match."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from perplexit.errors import ResumeError, VocabularyError
from perplexit.inputs.token_file import TokenFile
from perplexit.quantization.precisions import canonical_dtype, canonical_precision
from perplexit.runs.identity import (
    MOST_NAMED,
    depends_on_batch,
    differing_names,
    flat_record,
    further,
    plain_json,
)
from perplexit.runs.run import Run
from perplexit.sessions.base import InferenceSession

UNKNOWN_VOCABULARY = 2**31 - 1  # what a session says that takes any id


def check_fits(session: InferenceSession, tokens: TokenFile) -> list[str]:
    """Warnings about an input that the model can take but was not made for.

    Raises VocabularyError where the input holds ids that the model has no row for.
    """
    vocab_size = session.model.vocab_size
    prefix_id = int(tokens.windows.prefix_id.max(initial=-1))
    largest_id = max(int(tokens.token_ids.max(initial=-1)), prefix_id)
    if largest_id >= vocab_size:
        raise VocabularyError(
            f"expected token ids below the model's vocabulary of {vocab_size}, got "
            f"{largest_id} in the input; prepare the input with this model's own "
            f"tokenizer ({session.model.address})"
        )
    warnings = []
    longest = int(tokens.fed_lengths().max(initial=0))
    limit = session.model.max_length
    if limit is not None and longest > limit:
        warnings.append(
            f"windows of up to {longest} ids, but the model was made for {limit}: losses beyond "
            f"that position tell about extrapolation; prepare with --max-length {limit}"
        )
    known = vocab_size < UNKNOWN_VOCABULARY
    if known and tokens.vocab_size and tokens.vocab_size < vocab_size:
        warnings.append(
            f"the model has {vocab_size} vocabulary rows and the tokenizer {tokens.vocab_size}: "
            "the rows without a token keep their share of the probability"
        )
    described = asdict(session.description)
    if depends_on_batch(described):
        rounding = described["settings"]["weights"].get("activations", "over the whole batch")
        warnings.append(
            f"activations are rounded while the model runs ({rounding}): losses "
            "depend a little on what stands beside a window in its batch; compare runs of one "
            "batch size"
        )
    return warnings


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What an evaluation is asked for, known before its model is loaded; None where not said."""

    input_fingerprint: str
    top_k: int
    on_non_finite: str
    confidence: float
    batch_size: int | str
    mode: str
    prompt_len: int | None
    decode_chunk: int | None
    dtype: str | None
    quantization: str | None
    saves_reference: bool
    has_reference: bool
    loads_model: bool


def check_asked_conditions(recorded: Run, asked: Asked) -> None:
    """Raise ResumeError where what is asked for cannot be what `recorded` was begun under.

    It spares the loading of a model. `check_same_conditions` asks again with everything that the
    loaded model says.
    """
    session, cached = recorded.session, asked.mode == "cached"
    quantization = (session.get("quantization") or {}).get("name")
    pairs: dict[str, tuple[Any, Any]] = {
        "input_fingerprint": (recorded.input_fingerprint, asked.input_fingerprint),
        "top_k": (recorded.top_k, asked.top_k),
        "on_non_finite": (recorded.on_non_finite, asked.on_non_finite),
        "confidence": (recorded.confidence, asked.confidence),
        "mode": (session.get("mode", "full"), asked.mode),
        "prompt_len": (session.get("prompt_len"), (asked.prompt_len or 1) if cached else None),
        "decode_chunk": (
            session.get("decode_chunk"),
            (asked.decode_chunk or 1) if cached else None,
        ),
        "save_reference": (recorded.saved_reference is not None, asked.saves_reference),
        "reference": (recorded.reference is not None, asked.has_reference),
    }
    # An open session has its own settings; other engines may spell the same settings otherwise.
    if asked.loads_model and session.get("engine") == "pytorch":
        dtype = canonical_dtype(asked.dtype or "float32")
        pairs["dtype"] = (session.get("dtype"), dtype)
        base, _, reach = (asked.quantization or "").partition(":")
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
