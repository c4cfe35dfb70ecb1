"""A program with its key/value cache as inputs and outputs: past in, present out.

Shape suffixes: B = windows, T = ids fed, P = ids in the past, H = key/value heads, D = head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from perplexit.compilation.body_and_head import LogitsProgram

PAST = ("past_key_values.{}.key", "past_key_values.{}.value")
PRESENT = ("present.{}.key", "present.{}.value")


@dataclass(frozen=True)
class CacheShape:
    """The (heads, head size) of the keys, and of the values, of each layer."""

    layers: tuple[tuple[tuple[int, int], tuple[int, int]], ...]

    def names(self, pair: tuple[str, str]) -> list[str]:
        """Return the names of PAST's inputs or PRESENT's outputs, layer by layer, key first."""
        return [name.format(i) for i in range(len(self.layers)) for name in pair]

    def example(self, batch_size: int, num_ids: int, dtype: torch.dtype) -> list[Tensor]:
        """Return pasts of zeros."""
        return [
            torch.zeros(batch_size, heads, num_ids, size, dtype=dtype)
            for layer in self.layers
            for heads, size in layer
        ]


def cache_shape(model: Any) -> CacheShape | None:
    """Return the model's cache on a short probe; None where it is not keys and values."""
    try:
        with torch.inference_mode():
            output = model.base_model(
                input_ids=torch.tensor([[0, 1]]), past_key_values=DynamicCache(), use_cache=True
            )
        layers = output.past_key_values.layers
        shapes = [
            tuple((x.shape[1], x.shape[3]) for x in (layer.keys, layer.values)) for layer in layers
        ]
    except Exception:  # whatever an architecture without such a cache raises
        return None
    if any(layer.keys.shape[2] != 2 for layer in layers):
        return None
    return CacheShape(tuple(shapes)) if shapes else None  # type: ignore[arg-type]


class CachedLogitsProgram(LogitsProgram):
    """input_ids_BT, attention_mask of P + T ids, pasts_BHPD → logits_BTV and presents.

    A past of no ids makes it the plain forward pass. Sliding layers keep everything: their mask
    hides what is too far back, so that a block of any length may follow.
    """

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor, *pasts: Tensor
    ) -> tuple[Tensor, ...]:
        """Return (logits, present key and value of each layer)."""
        layers = [_holding(*pair) for pair in zip(pasts[::2], pasts[1::2], strict=True)]
        cache = Cache(layers=[*layers])
        hidden_BTD = self.body(input_ids, attention_mask, past_key_values=cache, use_cache=True)
        return self.head(hidden_BTD), *(x for layer in layers for x in (layer.keys, layer.values))


def _holding(keys: Tensor, values: Tensor) -> DynamicLayer:
    """Return a layer that grows from these keys and values."""
    layer = DynamicLayer()  # type: ignore[no-untyped-call]
    layer.keys, layer.values = keys, values
    layer.dtype, layer.device = keys.dtype, keys.device
    layer.is_initialized = True
    return layer
