"""The identity of a measurement: everything that decides its numbers, beside its input.

Two runs of one identity over one input give the same losses, up to the rounding that threads and
batches leave. Whatever a session says of itself belongs to it, unless it is listed here as a matter
of memory, speed or place: a setting that is new is then part of the identity until somebody knows
better.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

from perplexit.fingerprints import canonical_json

_SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_PROTOCOL_PARTS = (("len", "max_length"), ("stride", "stride"), ("bos", "bos"))
MOST_NAMED = 6  # differences in one message
_SHA256 = re.compile("[0-9a-f]{64}")
# Of a session's description: where it computes by how many threads, and what memory it keeps.
_NOT_DECIDING = frozenset(
    {
        "threads",
        "keeps_freed_memory",
        "cpu_memory_arena",
        "num_clamped_targets",  # counted on a recording, which is known by its hash
        "INFERENCE_NUM_THREADS",
        "NUM_STREAMS",
    }
)


def plain_json(value: Any) -> Any:
    """Return the value as JSON: text keys, lists, and None for a number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    return value


def measurement_of(
    model: Mapping[str, Any],
    session: Mapping[str, Any],
    *,
    on_non_finite: str,
    batch_plan: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the identity of a measurement as plain JSON values, from what a run records.

    model, session: `run.json`'s entries of these names. The model's address and the adapter's
    folder are left out: weights are known by their fingerprint, wherever they lie.
    batch_plan:     which windows stand together; part of the identity only where losses depend on
                    it (see `depends_on_batch`).
    """
    adapter = model.get("adapter")
    identity: dict[str, Any] = {
        "weights": model.get("weights_fingerprint"),
        "adapter": adapter and {key: adapter.get(key) for key in ("fingerprint", "merged")},
        "on_non_finite": on_non_finite,
        **_deciding(session),
    }
    if depends_on_batch(session):
        plan = batch_plan or {}
        identity["batch"] = {key: plan.get(key) for key in ("order", "limits")}
    return dict(plain_json(identity))


def depends_on_batch(session: Mapping[str, Any]) -> bool:
    """Return whether losses depend on the batch, because activations are rounded together."""
    settings = session.get("settings")
    weights = settings.get("weights") if isinstance(settings, Mapping) else None
    return isinstance(weights, Mapping) and not weights.get("batch_invariant", True)


def measurement_fingerprint(measurement: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the canonical JSON of what `measurement_of` gives."""
    return hashlib.sha256(canonical_json(plain_json(measurement)).encode()).hexdigest()


def measurement_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return the differences of two identities, each as `name (value and value)`.

    The most important ones come first, at most MOST_NAMED of them. Hashes are cut to 12 digits.
    The list is empty where nothing differs.
    """
    ours, theirs = flat_record(first), flat_record(second)
    names = differing_names(ours, theirs)
    shown = [
        f"{name.removesuffix('.name')} ({_short(ours.get(name))} and {_short(theirs.get(name))})"
        for name in names[:MOST_NAMED]
    ]
    return [*shown, *further(names)]


def differing_names(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return the keys with different values in two flat records, an engine's own settings last.

    What follows from another one is left out: a fingerprint whose parts differ, and the counts of a
    quantization of another name.
    """
    differing = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    named = tuple(name.removesuffix("name") for name in differing if _is_quantization(name))
    kept = [n for n in differing if _is_quantization(n) or not named or not n.startswith(named)]
    parts = [name for name in kept if not name.endswith("measurement_fingerprint")]
    return sorted(parts or kept, key=lambda name: ("settings." in name, name))


def further(names: list[str]) -> list[str]:
    """Return how many names are not shown, in words; an empty list where all are."""
    left = len(names) - MOST_NAMED
    return [f"{left} further settings"] if left > 0 else []


def _is_quantization(name: str) -> bool:
    return name.endswith("quantization.name")


def flat_record(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the record's innermost values by dotted names, for messages about one value."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= flat_record(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _deciding(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries, at any depth, that can decide a loss."""
    return {
        str(key): _deciding(item) if isinstance(item, Mapping) else item
        for key, item in value.items()
        if key not in _NOT_DECIDING
    }


def _short(value: Any) -> str:
    if isinstance(value, str) and _SHA256.fullmatch(value):
        return f"{value[:12]}…"
    return repr(value)


def signature_of(run: Any) -> str:
    """Return one line that says what a run measured; parts that do not apply are left out."""
    protocol, session = run.input_spec.get("protocol", {}), run.session
    dtype = session.get("dtype")
    named = [(name, protocol.get(key)) for name, key in _PROTOCOL_PARTS]
    parts = [
        "ppl",
        f"{run.protocol}.v{protocol.get('version', 1)}",
        *(f"{name}:{value}" for name, value in named if value is not None),
        f"tok:{run.tokenizer_fingerprint[:6]}",
        f"text:{run.text_fingerprint[:6]}",
        _SHORT_DTYPES.get(str(dtype), dtype),
        (session.get("quantization") or {}).get("name"),
        f"{session.get('engine')}-{_minor(session.get('version'))}",
        f"px-{_minor(run.perplexit_version)}",
    ]
    return "|".join(str(part) for part in parts if part is not None)


def _minor(version: Any) -> str:
    """Return major and minor of a version."""
    return ".".join(str(version).split("+")[0].split(".")[:2])
