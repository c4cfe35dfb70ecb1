"""Calling a module's forward with whatever of ids, mask and cache it takes, and reading its output.

Shape suffixes: B = batch, T = ids of a row.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perplexit.errors import ModelError


@dataclass(frozen=True, slots=True)
class CachePlace:
    """Keys and values of the first `start` ids of every row, as transformers' `Cache` has them."""

    past_key_values: Any
    start: int


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

    def __call__(
        self, ids_BT: Tensor, mask_BT: Tensor | None, cache: CachePlace | None = None
    ) -> Any:
        """Return the module's output; with a cache, the ids' positions begin at its start."""
        options: dict[str, Any] = {}
        if mask_BT is not None:
            options["attention_mask"] = mask_BT
        if self._takes_use_cache:
            options["use_cache"] = cache is not None
        if cache is not None:
            options["past_key_values"] = cache.past_key_values
            if self._takes_positions:
                stop = cache.start + ids_BT.shape[1]
                options["position_ids"] = torch.arange(cache.start, stop, device=ids_BT.device)[
                    None
                ]
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
