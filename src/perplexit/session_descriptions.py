"""What a session says of its model and of itself, and what a run records of both."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class AdapterDescription:
    """A PEFT adapter on the model: its method (LORA, …), and whether it was merged."""

    path: str
    kind: str
    fingerprint: str
    merged: bool
    base: str | None = None  # the model it was trained on, as it says


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """The loaded model; `weights_fingerprint` is of weights, configuration and adapter."""

    address: str
    architecture: str
    num_parameters: int
    weights_fingerprint: str
    vocab_size: int
    max_length: int | None = None  # longest window the model was made for; None: unknown
    adapter: AdapterDescription | None = None


@dataclass(frozen=True, slots=True)
class QuantizationDescription:
    """What a quantization really did, counted on the model.

    num_bytes:      of the quantized tensors, scales included.
    effective_bits: bits of all weights / the checkpoint's parameters.
    unquantized:    the large tensors that were left as they were, by the checkpoint's names.
    """

    name: str
    library: str
    num_modules: int
    num_bytes: int
    effective_bits: float
    unquantized: tuple[str, ...] = ()

    @classmethod
    def of(cls, found: "QuantizationDescription | None") -> "QuantizationDescription | None":
        """Return the description in a record that may say more; None where nothing was done."""
        names = [each.name for each in fields(cls)]
        return found and cls(**{name: getattr(found, name) for name in names})


@dataclass(frozen=True, slots=True)
class SessionDescription:
    """The conditions of a measurement, as they are in effect (not as they were asked for)."""

    engine: str
    version: str
    dtype: str
    device: str
    quantization: QuantizationDescription | None = None
    threads: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  # engine's own effective settings
    mode: str = "full"  # windows whole; "cached": prefill, then decode
    prompt_len: int | None = None  # ids of the prefill
    decode_chunk: int | None = None  # ids per call of the decode
