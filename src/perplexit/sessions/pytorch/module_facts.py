"""What a loaded module says of itself: dtype, vocabulary, positions."""

from typing import Any

import torch
from torch import Tensor, nn

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


def num_embeddings(module: nn.Module) -> int | None:
    """Return the rows of the input embedding, where the module says which one that is."""
    get = getattr(module, "get_input_embeddings", None)
    try:
        embedding = get() if get is not None else None
    except (NotImplementedError, AttributeError):
        return None
    weight = getattr(embedding, "weight", None)
    return len(weight) if weight is not None else None


def plain_output(module: nn.Module) -> nn.Linear | None:
    """Return the model's output layer where it is a plain linear one with its weights in place.

    A subclass (a quantized or adapted layer, or weight) may compute something else: None.
    """
    get = getattr(module, "get_output_embeddings", None)
    layer = get() if get is not None else None
    if type(layer) is not nn.Linear or type(layer.weight) not in (nn.Parameter, Tensor):
        return None
    return None if layer.weight.device.type == "meta" else layer


def position_limit(module: nn.Module) -> int | None:
    """Return the longest window that learned positions have embeddings for; None: any."""
    limit = config_integer(module, "max_position_embeddings", "n_positions")
    if limit is None:
        return None
    get = getattr(module, "get_input_embeddings", None)
    tokens = get() if get is not None else None
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
