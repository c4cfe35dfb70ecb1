"""Calling a module's forward with whatever of ids, mask and cache it takes, and reading its output.

Shape suffixes: B = batch, T = ids of a row.
"""

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perplexit.errors import ModelError


@dataclass(frozen=True, slots=True)
class Past:
    """Keys and values of the first `num_ids` ids of every row, in transformers' `Cache`."""

    past_key_values: Any
    num_ids: int


class ModuleCall:
    """Calls a module with ids and, where its forward has a place for them, a mask and a cache."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        parameters = inspect.signature(module.forward).parameters
        self._named_ids = "input_ids" in parameters
        any_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.takes_mask = any_keyword or "attention_mask" in parameters
        self._takes_positions = "position_ids" in parameters
        self._takes_use_cache = any_keyword or "use_cache" in parameters
        self.takes_cache = self._takes_use_cache and "past_key_values" in parameters

    def __call__(self, ids_BT: Tensor, mask_BT: Tensor | None, past: Past | None = None) -> Any:
        """Return the module's output; the ids' positions begin where the past ends."""
        options: dict[str, Any] = {}
        if mask_BT is not None:
            options["attention_mask"] = mask_BT
        if self._takes_use_cache:
            options["use_cache"] = past is not None
        if past is not None:
            options["past_key_values"] = past.past_key_values
            if self._takes_positions:
                positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device) + past.num_ids
                options["position_ids"] = positions_T[None]
        if self._named_ids:
            return self._module(input_ids=ids_BT, **options)
        return self._module(ids_BT, **options)


def field_of(output: Any, name: str) -> Tensor:
    """Return `output.name`, `output[name]`, the first of a tuple, or a bare tensor."""
    if isinstance(output, Tensor):
        return output
    value = getattr(output, name, None)
    if value is None and isinstance(output, dict):
        value = output.get(name)
    if value is None and isinstance(output, tuple) and output:
        value = output[0]
    if not isinstance(value, Tensor):
        raise ModelError(
            f"expected a forward that gives .{name}, a tuple or a tensor, "
            f"got {type(output).__name__}"
        )
    return value


# Of torchao's weights: what is to be done to the activations that they are multiplied with.
_ACTIVATION_SETTINGS = ("activation_quantization", "act_quant_kwargs", "input_quant_func")


def dtype_name(module: nn.Module) -> str:
    """Return the dtype of the module's floating-point parameters; the widest where they differ."""
    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()}
    widest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps ** -1, default=torch.float32)
    return str(widest).removeprefix("torch.")


def rounded_activations(module: nn.Module) -> str | None:
    """Say how layers of a module round activations while it runs; None: none does.

    Known: bitsandbytes' Linear8bitLt, torch.ao's dynamic layers, torchao's tensors that carry
    settings for activations.
    """
    for layer in module.modules():
        kind, weight = type(layer), getattr(layer, "weight", None)
        if kind.__name__ == "Linear8bitLt":
            return "int8 a token, outlier columns of the batch in float16"
        if kind.__module__.startswith(("torch.ao.nn.quantized.dynamic", "torch.ao.nn.qat.dynamic")):
            return "8 bits, one scale for all of a batch (torch.ao)"
        told = (getattr(weight, name, None) for name in _ACTIVATION_SETTINGS)
        if any(value is not None for value in told):
            return f"as {type(weight).__name__} says (torchao)"
    return None


def output_layer(module: nn.Module) -> Any | None:
    """Return the layer that makes the logits, where the module says which one that is."""
    return _layer(module, "get_output_embeddings")


def input_embedding(module: nn.Module) -> Any | None:
    """Return the layer that looks ids up, where the module says which one that is."""
    return _layer(module, "get_input_embeddings")


def _layer(module: nn.Module, method: str) -> Any | None:
    get = getattr(module, method, None)
    try:
        return get() if get is not None else None
    except (NotImplementedError, AttributeError):
        return None


def twin_with(model: Any, path: str, replacement: nn.Module) -> Any:
    """Return a shallow copy that shares all with `model` but the submodule at `path`."""
    name, _, rest = path.partition(".")
    twin = copy.copy(model)
    if "_old_forward" in twin.__dict__:  # accelerate's, which is bound to the model itself
        del twin.__dict__["forward"]
    inner = twin_with(model.get_submodule(name), rest, replacement) if rest else replacement
    twin._modules = {**model._modules, name: inner}
    return twin


def without_layers(model: Any, path: str) -> Any:
    """Return the model's own forward over given hidden states, `inputs_embeds`.

    A stub returns them in place of the layers at `path`: whatever the model does after its layers
    (a soft-cap, a scale, a bias) is done here too.
    """
    return twin_with(model, path, _Stub())


class _Stub(nn.Module):
    """Returns its `inputs_embeds` as if they were the last layer's hidden states."""

    def forward(self, *args: object, **kwargs: Any) -> "_StubOutput":
        return _StubOutput((kwargs["inputs_embeds"],))


class _StubOutput(tuple[Tensor]):
    """An output whose first item is the hidden state; no cache, no attentions, no router."""

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None


def num_embeddings(module: nn.Module) -> int | None:
    """Return the rows of the input embedding, where the module says which one that is."""
    weight = getattr(input_embedding(module), "weight", None)
    return len(weight) if weight is not None else None


def plain_output(module: nn.Module) -> nn.Linear | None:
    """Return the model's output layer where it is a plain linear one with its weights in place.

    A subclass (a quantized or adapted layer, or weight) may compute something else: None.
    """
    layer = output_layer(module)
    if type(layer) is not nn.Linear or type(layer.weight) not in (nn.Parameter, Tensor):
        return None
    return None if layer.weight.device.type == "meta" else layer


def position_limit(module: nn.Module) -> int | None:
    """Return the longest window that learned positions have embeddings for; None: any."""
    limit = config_integer(module, "max_position_embeddings", "n_positions")
    if limit is None:
        return None
    tokens = input_embedding(module)
    for embedding in module.modules():
        if not isinstance(embedding, nn.Embedding) or embedding is tokens:
            continue
        if limit <= embedding.num_embeddings <= limit + 2:  # OPT counts its positions from 2
            first = 0 if embedding.padding_idx is None else embedding.padding_idx + 1
            return min(limit, embedding.num_embeddings - first)  # RoBERTa from its padding id on
    return None


def activation_bytes_per_id(module: nn.Module, window_length: int, num_logits: int) -> int:
    """Estimate generously how many bytes one id of a batch takes beside the weights.

    num_logits: logits kept for every position; 0 where they are made in chunks.
    """
    hidden = config_integer(module, "hidden_size", "n_embd") or 1024
    inner = config_integer(module, "intermediate_size", "n_inner") or 4 * hidden
    elements = 10 * hidden + 3 * inner + 3 * num_logits
    if getattr(getattr(module, "config", None), "_attn_implementation", "") == "eager":
        heads = config_integer(module, "num_attention_heads", "n_head") or 1
        elements += 3 * heads * window_length
    return 4 * elements


def config_integer(module: nn.Module, *names: str) -> int | None:
    """Return the first of a configuration's integers of these names that is set."""
    config: Any = getattr(module, "config", None)
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None
