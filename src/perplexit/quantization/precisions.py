"""Precision names: one canonical spelling each, and which library makes it on which engine.

The one table of what can be quantized where: the engines, `--help` and the error messages read it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from perplexit.errors import QuantizationError, UnknownPrecisionError, UsageError

DTYPE_NAMES = {
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
    """Return `float32`, `bfloat16` or `float16` for any usual name (`fp32`, `torch.bfloat16`, …).

    Raises UsageError for a name that is none of them.
    """
    spelling = str(name).strip().lower().removeprefix("torch.")
    try:
        return DTYPE_NAMES[spelling]
    except KeyError:
        known = ", ".join(sorted(DTYPE_NAMES))
        raise UsageError(f"expected a dtype, one of {known}; got {name!r}") from None


@dataclass(frozen=True, slots=True)
class WeightBlocks:
    """Weights of `bits` bits; `block_size` along the summed axis share one scale (0: a row).

    For ONNX symmetric: no zero point, the scale alone maps integers back. For GGUF the format is
    the type's own.
    """

    bits: int
    block_size: int = 32


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one engine gets one precision: the library that makes it, and the weights' format.

    on_loading: `eval --quantization` makes it; otherwise `compile --quantization` alone does.
    """

    precision: str
    engine: str
    library: str
    weights: WeightBlocks
    on_loading: bool = False


_PRECISION_SYNONYMS = {
    "8bit": "int8",
    "8-bit": "int8",
    "4bit": "int4",
    "4-bit": "int4",
    "llm.int8": "llm-int8",
    "llm.int8()": "llm-int8",
    "llm_int8": "llm-int8",
    "mxfp6_e2m3": "mxfp6",
    "mxfp8_e4m3": "mxfp8",
    "mxfp4_e2m1": "mxfp4",
}


def _pytorch(precision: str, library: str, bits: int, block_size: int = 32) -> Recipe:
    return Recipe(precision, "pytorch", library, WeightBlocks(bits, block_size), on_loading=True)


def _llamacpp(
    precision: str, bits: int, block_size: int = 32, library: str = "llama.cpp"
) -> Recipe:
    return Recipe(precision, "gguf", library, WeightBlocks(bits, block_size), on_loading=True)


_RECIPES = {
    (recipe.engine, recipe.precision): recipe
    for recipe in (
        _pytorch("nf4", "bitsandbytes", 4, 64),
        _pytorch("fp4", "bitsandbytes", 4, 64),
        _pytorch("llm-int8", "bitsandbytes", 8, 0),
        _pytorch("int8", "torchao", 8, 0),
        _pytorch("int4", "torchao", 4),
        _pytorch("8da4w", "torchao", 4),
        _pytorch("mxfp4", "torchao", 4),
        _pytorch("mxfp8", "torchao", 8),
        _pytorch("mxfp8_e5m2", "torchao", 8),
        _pytorch("mxfp6", "perplexit", 6),
        _pytorch("mxfp6_e3m2", "perplexit", 6),
        _pytorch("mxint8", "perplexit", 8),
        _pytorch("q4f16_0", "perplexit", 4),
        _pytorch("q4f16_2", "perplexit", 4),
        Recipe("int8", "onnx", "onnxruntime MatMulNBits", WeightBlocks(bits=8)),
        Recipe("int4", "onnx", "onnxruntime MatMulNBits", WeightBlocks(bits=4)),
        Recipe("int8", "openvino", "nncf", WeightBlocks(bits=8, block_size=0)),
        Recipe("int4", "openvino", "nncf", WeightBlocks(bits=4)),
        Recipe("q4f16_0", "tvm", "perplexit", WeightBlocks(bits=4)),
        Recipe("q4f16_2", "tvm", "perplexit", WeightBlocks(bits=4)),
        _llamacpp("q8_0", 8, library="gguf"),
        _llamacpp("q6_k", 6, 256),
        _llamacpp("q5_k_m", 5, 256),
        _llamacpp("q5_k_s", 5, 256),
        _llamacpp("q5_1", 5, library="gguf"),
        _llamacpp("q5_0", 5, library="gguf"),
        _llamacpp("q4_k_m", 4, 256),
        _llamacpp("q4_k_s", 4, 256),
        _llamacpp("q4_1", 4, library="gguf"),
        _llamacpp("q4_0", 4, library="gguf"),
        _llamacpp("iq4_nl", 4),
        _llamacpp("iq4_xs", 4, 256),
        Recipe("mxfp4", "gguf", "gguf", WeightBlocks(bits=4)),
        _llamacpp("q3_k_l", 3, 256),
        _llamacpp("q3_k_m", 3, 256),
        _llamacpp("q3_k_s", 3, 256),
        _llamacpp("q2_k", 2, 256),
    )
}


def canonical_precision(name: str) -> str:
    """Return the precision's canonical name (`8bit` → `int8`); unknown names in lower case."""
    spelling = name.strip().lower()
    return _PRECISION_SYNONYMS.get(spelling, spelling)


def known_precisions(engine: str, *, on_loading: bool = False) -> tuple[str, ...]:
    """Return the precisions that can be made for `engine`, in the table's order.

    on_loading: those alone that `eval --quantization` makes.
    """
    return tuple(
        precision
        for (home, precision), recipe in _RECIPES.items()
        if home == engine and (recipe.on_loading or not on_loading)
    )


def precisions_by_engine() -> str:
    """Return what `eval --quantization` takes on each engine, and what `compile` must have made."""
    engines = dict.fromkeys(engine for engine, _ in _RECIPES)
    loading = {e: known_precisions(e, on_loading=True) for e in engines}
    parts = [f"{engine}: {_listed(names)}" for engine, names in loading.items() if names]
    parts += [
        f"{engine} (made by compile): {_listed(known_precisions(engine))}"
        for engine, names in loading.items()
        if not names
    ]
    return "; ".join(parts)


def require_known_precision(name: str) -> None:
    """Do nothing for a precision that some engine has, with or without `:head`.

    Raises UnknownPrecisionError that lists what each engine has.
    """
    base = canonical_precision(name.partition(":")[0])
    if all(known != base for _, known in _RECIPES) and base not in DTYPE_NAMES:
        raise UnknownPrecisionError(
            f"expected the name of a precision ({precisions_by_engine()}), got {name!r}"
        )


def recipe_for(precision: str, *, engine: str) -> Recipe:
    """Return how `precision` is made on `engine`, and by which library.

    Raises QuantizationError that lists the engine's precisions, and the engines that do have it.
    """
    name = canonical_precision(precision)
    try:
        return _RECIPES[engine, name]
    except KeyError:
        elsewhere = sorted(home for home, known in _RECIPES if known == name)
        hint = f", which {_listed(elsewhere)} can make" if elsewhere else ""
        raise (QuantizationError if elsewhere else UnknownPrecisionError)(
            f"expected a precision that the engine {engine!r} can make: "
            f"{_listed(known_precisions(engine))}; got {precision!r}{hint}"
        ) from None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none in this version"
