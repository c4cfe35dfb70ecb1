"""A loaded PyTorch model in another precision, and the count of what was really done to it."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn

from perplexit.errors import QuantizationError, UsageError, needing
from perplexit.program_record import ProgramQuantization
from perplexit.quantization.matrices import (
    Matrix,
    head_is_tied,
    large_matrices,
    matrices_of,
    untie_head,
)
from perplexit.quantization.precisions import Recipe, canonical_precision, recipe_for

_ENGINE = "pytorch"
_WITH_HEAD = ":head"
_HOMES = {
    "bitsandbytes": "perplexit.quantization.bitsandbytes_weights",
    "torchao": "perplexit.quantization.torchao_weights",
    "perplexit": "perplexit.quantization.matrices",
}
_WHOLE_MODEL = ("q4f16_0",)  # MLC-LLM quantizes embedding and head too; its q4f16_2 does not
_ACTIVATIONS = {
    "llm-int8": "int8 a token, outlier columns of the batch in float16",
    "8da4w": "int8 a token",
}


@dataclass(frozen=True, slots=True)
class PytorchRecipe:
    """What `--quantization` asked for: the table's recipe, and how far it reaches."""

    recipe: Recipe
    name: str
    head: bool
    embeddings: bool

    @property
    def dynamic_activations(self) -> str | None:
        """Return how activations are rounded while the model runs; None: they are left alone."""
        return _ACTIVATIONS.get(self.recipe.precision)

    @property
    def keeps_plain_weights(self) -> bool:
        """Return whether the weights stay ordinary tensors, which can be saved and loaded again."""
        return self.recipe.library == "perplexit" or self.recipe.precision.startswith("mx")


@dataclass(frozen=True, slots=True)
class PytorchQuantization(ProgramQuantization):
    """What a quantization did, counted on the loaded model.

    num_bytes: as the format packs the matrices. settings: also what happens to activations and to
    a tied head. head: whether the output layer is another one than the checkpoint's.
    """

    head: bool = False


def pytorch_recipe(name: str) -> PytorchRecipe:
    """Return the recipe of a name such as `nf4` or `int4:head`; the latter quantizes the head too.

    Raises QuantizationError that lists the names, UsageError for another suffix.
    """
    base, colon, reach = name.strip().lower().rpartition(":")
    if not colon:
        base, reach = reach, ""
    recipe = recipe_for(base, engine=_ENGINE)
    whole = recipe.precision in _WHOLE_MODEL
    if colon and (reach != "head" or whole):
        has = "quantizes the head and the embedding already" if whole else "knows `:head` alone"
        raise UsageError(
            f"expected {base} or {base}:head, got {name!r}; {canonical_precision(base)} {has}"
        )
    full_name = recipe.precision + (_WITH_HEAD if colon else "")
    return PytorchRecipe(recipe, full_name, head=whole or bool(colon), embeddings=whole)


def quantize_model(model: nn.Module, wanted: PytorchRecipe) -> PytorchQuantization:
    """Quantize the model in place and count. Raises QuantizationError, MissingPackageError."""
    quantize = _library(wanted.recipe)
    num_parameters = sum(p.numel() for p in model.parameters())
    tied = head_is_tied(model)
    if tied and wanted.head and not wanted.embeddings:
        untie_head(model)
    matrices = matrices_of(model, head=wanted.head, embeddings=wanted.embeddings)
    before = dict(model.named_parameters(remove_duplicate=False))
    shapes = {matrix.name: tuple(matrix.inputs_last.shape) for matrix in matrices}
    num_bytes = quantize(model, matrices, wanted.recipe.precision)
    if not num_bytes:
        raise QuantizationError(
            f"expected to quantize {len(matrices)} matrices to {wanted.name}, but none has inputs "
            f"in whole groups of {wanted.recipe.weights.block_size} (such as "
            f"{next(iter(shapes.values()))}); its figures would be full-precision ones"
        )
    left = _left_alone(before, num_bytes)
    total = sum(num_bytes.values()) + sum(p.numel() * p.element_size() for p in left.values())
    if not wanted.keeps_plain_weights:
        _refuse_saving(model, wanted)
    return PytorchQuantization(
        name=wanted.name,
        library=wanted.recipe.library,
        num_modules=len(num_bytes),
        num_bytes=sum(num_bytes.values()),
        effective_bits=8 * total / num_parameters,
        unquantized=large_matrices(left, num_parameters),
        settings=_settings(wanted, tied),
        head=wanted.head,
    )


def _library(recipe: Recipe) -> Callable[[nn.Module, list[Matrix], str], dict[str, int]]:
    """Import the recipe's library, through the one lazy door to the packages that quantize."""
    install = "pip install 'perplexit[quantization]'"
    with needing(f"the precision {recipe.precision}", install, recipe.library):
        module = import_module(_HOMES[recipe.library])
    quantize: Callable[[nn.Module, list[Matrix], str], dict[str, int]] = module.quantize_matrices
    return quantize


def _left_alone(before: dict[str, nn.Parameter], num_bytes: dict[str, int]) -> dict[str, Tensor]:
    """Return the parameters that were not quantized, each once, under its first name."""
    quantized = {id(before[f"{name}.weight"]) for name in num_bytes}
    left: dict[int, tuple[str, Tensor]] = {}
    for name, parameter in before.items():
        if id(parameter) not in quantized:
            left.setdefault(id(parameter), (name, parameter))
    return dict(left.values())


def _settings(wanted: PytorchRecipe, tied: bool) -> dict[str, Any]:
    library = wanted.recipe.library
    settings: dict[str, Any] = {
        "bits": wanted.recipe.weights.bits,
        "block_size": wanted.recipe.weights.block_size or "row",
        "activations": wanted.dynamic_activations or "as the session's dtype",
        "batch_invariant": wanted.dynamic_activations is None,
        "arithmetic": "weights dequantized on loading" if wanted.keeps_plain_weights else library,
    }
    if library != "perplexit":
        settings[library] = version(library)
    if tied:
        settings["tied_head"] = (
            "quantized with its embedding"
            if wanted.embeddings
            else "a quantized copy; the embedding is as it was"
            if wanted.head
            else "left with its embedding"
        )
    return settings


def _refuse_saving(model: nn.Module, wanted: PytorchRecipe) -> None:
    """Make saving an error: packed weights under the checkpoint's own names load as others."""

    def save_pretrained(*_: Any, **__: Any) -> None:
        raise QuantizationError(
            f"a model in {wanted.name} holds {wanted.recipe.library}'s packed weights, which a "
            "plain checkpoint cannot carry; save the checkpoint before it is quantized"
        )

    any_model: Any = model
    any_model.save_pretrained = save_pretrained
