"""GGUF's description of rotary positions → transformers' `rope_parameters`.

Formulas: llama.cpp `ggml_rope_yarn_corr_dims`, `llama_model_loader` defaults; transformers
`modeling_rope_utils`. Both divide each frequency by a factor; only the spelling differs.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import ModelError

_NEAR = 1e-6  # relative; the divisors are stored as float32
_LLAMA3_LENGTH = 8192
_PREFIX = "rope.scaling."


def rope_parameters(
    given: Mapping[str, Any],
    divisors: Mapping[str, NDArray[np.float64]],
    *,
    theta: float,
    head_dim: int,
    max_length: int,
) -> dict[str, Any]:
    """Return the scaling as transformers writes it, {} where the file asks for none.

    given:     `rope.scaling.*` without that prefix, and the old `rope.scale_linear` as `factor`.
    divisors: the tensors rope_freqs, rope_factors_short and rope_factors_long that there are.
    Raises ModelError by the field's name for what transformers cannot be given.
    """
    factor = float(given.get("factor") or 1.0)
    # llama.cpp takes a missing type for "linear", and linear without a factor for none.
    kind = str(given.get("type") or "linear")
    if kind == "linear" and factor == 1.0:
        kind = "none"
    read = {"type", "factor", "finetuned", "original_context_length"}
    length = int(given.get("original_context_length") or max_length)
    found: dict[str, Any]
    if "rope_factors_long" in divisors or "rope_factors_short" in divisors:
        read |= {"attn_factor"}
        found = _by_length(given, divisors, length)
    elif kind == "yarn":
        read |= {"attn_factor", "yarn_beta_fast", "yarn_beta_slow"}
        found = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": length,
            "beta_fast": float(given.get("yarn_beta_fast") or 32.0),
            "beta_slow": float(given.get("yarn_beta_slow") or 1.0),
            "attention_factor": float(given.get("attn_factor") or 1.0)
            * (0.1 * math.log(factor) + 1.0),
        }
    elif kind == "linear":
        found = {"rope_type": "linear", "factor": factor}
    elif kind in ("none", "longrope"):
        found = {}
    else:
        raise ModelError(f"{_PREFIX}type {kind!r} is not one of none, linear, yarn and longrope")
    neutral = (None, 0, 1, 1.0, False, -1)
    unread = [key for key, value in given.items() if key not in read and value not in neutral]
    if unread:
        raise ModelError(f"{_PREFIX}{unread[0]} has no place in transformers' {kind} positions")
    if "rope_freqs" not in divisors:
        return found
    if found:
        raise ModelError(f"rope_freqs.weight together with {_PREFIX}type {kind}")
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return _divided(divisors["rope_freqs"], frequencies, length=length, max_length=max_length)


def _by_length(
    given: Mapping[str, Any], divisors: Mapping[str, NDArray[np.float64]], length: int
) -> dict[str, Any]:
    missing = {"rope_factors_long", "rope_factors_short"} - set(divisors)
    if missing:
        raise ModelError(f"{sorted(missing)[0]}.weight is not there, its twin is")
    return {
        "rope_type": "longrope",
        "short_factor": divisors["rope_factors_short"].tolist(),
        "long_factor": divisors["rope_factors_long"].tolist(),
        "original_max_position_embeddings": length,
        "attention_factor": float(given.get("attn_factor") or 1.0),
    }


def _divided(
    divisors: NDArray[np.float64],
    frequencies: NDArray[np.float64],
    *,
    length: int,
    max_length: int,
) -> dict[str, Any]:
    """Return frequencies divided one by one: as Llama 3's blend where it is one, else as a list."""
    if len(divisors) != len(frequencies):
        raise ModelError(
            f"rope_freqs.weight has {len(divisors)} entries for {len(frequencies)} frequencies"
        )
    if np.allclose(divisors, 1.0, rtol=_NEAR, atol=0):
        return {}
    trained = length if length < max_length else _LLAMA3_LENGTH
    blend = _llama3(divisors, frequencies, trained)
    if blend is not None:
        return blend
    # The same divisors at every length: longrope's arithmetic without its dependence on length.
    return {
        "rope_type": "longrope",
        "short_factor": divisors.tolist(),
        "long_factor": divisors.tolist(),
        "original_max_position_embeddings": max_length,
        "attention_factor": 1.0,
    }


def llama3_divisors(
    frequencies: NDArray[np.float64], *, length: int, factor: float, low: float, high: float
) -> NDArray[np.float64]:
    """Return what Llama 3 divides each frequency by: 1 up to `factor`, by its wavelength.

    Wavelengths below `length / high` keep their frequency, those above `length / low` have it
    divided by `factor`, with a linear blend between (transformers' type "llama3").
    """
    turns = length * frequencies / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1 / ((1 - kept) / factor + kept))


def _llama3(
    divisors: NDArray[np.float64], frequencies: NDArray[np.float64], length: int
) -> dict[str, Any] | None:
    """Return the parameters whose blend gives these divisors; None where none do.

    Only where the blend begins and ends shows in the divisors, so the trained length is given.
    """
    factor = float(divisors.max())
    kept = (1 / divisors - 1 / factor) / (1 - 1 / factor) if factor > 1 else np.zeros(0)
    ends = _ends_of_blend(kept, frequencies) if len(kept) else None
    if ends is None:
        return None
    low, high = (length * end / (2 * math.pi) for end in ends)
    for digits in (2, 4, 15):  # 1 and 4 rather than 1.00000003 and 3.9999998
        chosen = round(low, digits), round(high, digits)
        if not 0 < chosen[0] < chosen[1]:
            continue
        again = llama3_divisors(
            frequencies, length=length, factor=factor, low=chosen[0], high=chosen[1]
        )
        if np.allclose(again, divisors, rtol=_NEAR, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": chosen[0],
                "high_freq_factor": chosen[1],
                "original_max_position_embeddings": length,
            }
    return None


def _ends_of_blend(
    kept: NDArray[np.float64], frequencies: NDArray[np.float64]
) -> Sequence[float] | None:
    """Return the frequencies of which nothing and everything is kept: the blend's two ends."""
    between = np.flatnonzero((kept > _NEAR) & (kept < 1 - _NEAR))
    if len(between) > 1:
        slope, offset = np.polyfit(frequencies[between], kept[between], 1)
        return (-offset / slope, (1 - offset) / slope) if slope > 0 else None
    none, whole = frequencies[kept <= _NEAR], frequencies[kept >= 1 - _NEAR]
    lower = float(none.max()) if len(none) else float(frequencies.min()) / 2
    upper = float(whole.min()) if len(whole) else float(frequencies.max()) * 2
    if not len(between):
        return lower, upper
    at, part = float(frequencies[between[0]]), float(kept[between[0]])
    end = lower + (at - lower) / part
    return (lower, end) if end <= upper else ((at - part * upper) / (1 - part), upper)
