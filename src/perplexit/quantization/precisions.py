"""Precision names: one canonical spelling each, and which library makes it on which engine."""

from collections.abc import Iterable
from dataclasses import dataclass

from perplexit.errors import QuantizationError, UsageError

_DTYPE_SYNONYMS = {
    "float32": "float32",
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
}


def canonical_dtype(name: str) -> str:
    """`float32`, `bfloat16` or `float16`, for any usual spelling (`fp32`, `torch.bfloat16`, …).

    Raises UsageError for a name that is none of them.
    """
    spelling = str(name).strip().lower().removeprefix("torch.")
    try:
        return _DTYPE_SYNONYMS[spelling]
    except KeyError:
        known = ", ".join(sorted(_DTYPE_SYNONYMS))
        raise UsageError(f"expected a dtype, one of {known}; got {name!r}") from None


@dataclass(frozen=True, slots=True)
class WeightBlocks:
    """Weights as integers of `bits` bits, `block_size` along the summed axis sharing one scale.

    For ONNX symmetric: no zero point, the scale alone maps integers back. For GGUF the format is
    the type's own. Activations are left alone.
    """

    bits: int
    block_size: int = 32


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one engine gets one precision: the library that makes it, and the weights' format."""

    precision: str
    engine: str
    library: str
    weights: WeightBlocks


_PRECISION_SYNONYMS = {
    "8bit": "int8",
    "8-bit": "int8",
    "4bit": "int4",
    "4-bit": "int4",
}

_RECIPES = {
    (recipe.engine, recipe.precision): recipe
    for recipe in (
        Recipe("int8", "onnx", "onnxruntime MatMulNBits", WeightBlocks(bits=8)),
        Recipe("int4", "onnx", "onnxruntime MatMulNBits", WeightBlocks(bits=4)),
        Recipe("q8_0", "gguf", "gguf", WeightBlocks(bits=8)),
        Recipe("q6_k", "gguf", "llama.cpp", WeightBlocks(bits=6, block_size=256)),
        Recipe("q5_k_m", "gguf", "llama.cpp", WeightBlocks(bits=5, block_size=256)),
        Recipe("q5_k_s", "gguf", "llama.cpp", WeightBlocks(bits=5, block_size=256)),
        Recipe("q5_1", "gguf", "gguf", WeightBlocks(bits=5)),
        Recipe("q5_0", "gguf", "gguf", WeightBlocks(bits=5)),
        Recipe("q4_k_m", "gguf", "llama.cpp", WeightBlocks(bits=4, block_size=256)),
        Recipe("q4_k_s", "gguf", "llama.cpp", WeightBlocks(bits=4, block_size=256)),
        Recipe("q4_1", "gguf", "gguf", WeightBlocks(bits=4)),
        Recipe("q4_0", "gguf", "gguf", WeightBlocks(bits=4)),
        Recipe("mxfp4", "gguf", "gguf", WeightBlocks(bits=4)),
        Recipe("q3_k_m", "gguf", "llama.cpp", WeightBlocks(bits=3, block_size=256)),
        Recipe("q2_k", "gguf", "llama.cpp", WeightBlocks(bits=2, block_size=256)),
    )
}


def canonical_precision(name: str) -> str:
    """The precision's canonical name (`8bit` → `int8`); unknown names pass, in lower case."""
    spelling = name.strip().lower()
    return _PRECISION_SYNONYMS.get(spelling, spelling)


def known_precisions(engine: str) -> tuple[str, ...]:
    """The precisions that can be made for `engine`, in the table's order."""
    return tuple(precision for home, precision in _RECIPES if home == engine)


def recipe_for(precision: str, *, engine: str) -> Recipe:
    """Who makes `precision` on `engine`, and how.

    Raises QuantizationError that lists the engine's precisions, and the engines that do have it.
    """
    name = canonical_precision(precision)
    try:
        return _RECIPES[engine, name]
    except KeyError:
        elsewhere = sorted(home for home, known in _RECIPES if known == name)
        hint = f", which {_listed(elsewhere)} can make" if elsewhere else ""
        raise QuantizationError(
            f"expected a precision that the engine {engine!r} can make: "
            f"{_listed(known_precisions(engine))}; got {precision!r}{hint}"
        ) from None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none in this version"
