"""The inputs and outputs of an ONNX language model, recognized by their usual names.

Shape suffixes: B = windows, T = ids fed, S = ids in the cache, H = heads, D = head size.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import CapabilityError
from perplexit.program_batches import Feed

_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(double)": np.dtype(np.float64),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(bool)": np.dtype(np.bool_),
}
_LAYER_THEN_KIND = re.compile(r"(\d+)[._](?:self[._]|decoder[._]|attn[._])*(key|value)s?\b")
_KIND_THEN_LAYER = re.compile(r"(key|value)s?[._](?:values?[._])?(\d+)")
_OURS = ("target_rows", "target_ids")


@dataclass(frozen=True, slots=True)
class Port:
    """One input or output: its name, its sizes (a name where any is taken), its dtype."""

    name: str
    shape: tuple[int | str | None, ...]
    dtype: np.dtype[Any]

    def size(self, axis: int) -> int | None:
        """Return the fixed size of an axis; None where it is free."""
        value = self.shape[axis] if len(self.shape) > axis else None
        return value if isinstance(value, int) else None


@dataclass(frozen=True, slots=True)
class CachePort:
    """The keys or values of one layer: the input for the past, the output for the present."""

    past: Port
    present: str
    heads: int
    head_size: int


@dataclass(frozen=True, slots=True)
class GraphPorts:
    """The inputs and outputs of a language model; None for what it does not have.

    caches:   keys and values, layer by layer; empty where it takes whole windows alone.
    capacity: ids that a retained cache holds: past and present are of one fixed size, and the ids
              given go to their `position_ids`. None: the present is the past and what was fed.
    last_position_only: the logits are of the last id fed, as far as the shapes tell.
    """

    ids: Port
    mask: Port | None
    positions: Port | None
    use_cache_branch: str | None
    logits: Port
    caches: tuple[CachePort, ...] = ()
    capacity: int | None = None

    @property
    def batch_size(self) -> int | None:
        """Return B where it is fixed."""
        return self.ids.size(0)

    @property
    def length(self) -> int | None:
        """Return T where it is fixed."""
        return self.ids.size(1)

    @property
    def last_position_only(self) -> bool:
        """Return whether only the last id's logits come out, as far as the shapes tell."""
        return len(self.logits.shape) == 2 or (self.logits.size(1) == 1 and self.length != 1)

    @property
    def sees_whole_windows(self) -> bool:
        """Return whether one call can give the logits of every position of a window."""
        return not self.last_position_only and self.capacity is None and self.length != 1

    def whole_windows(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Return the graph's inputs for whole windows, by its own names and dtypes.

        Pasts have no ids, which makes the call a plain forward pass.
        """
        ids_BT = feed["input_ids"]
        pasts = self.empty_pasts(len(ids_BT))
        named = self.inputs(ids_BT, 0, pasts, mask_BS=feed["attention_mask"])
        return named | {name: feed[name] for name in _OURS if name in feed}

    def inputs(
        self,
        ids_BT: NDArray[np.int64],
        start: int,
        pasts: Sequence[Any],
        *,
        mask_BS: NDArray[np.int64] | None = None,
    ) -> dict[str, Any]:
        """Return the graph's inputs for ids at positions `start…`; `pasts` go in as they are.

        mask_BS: None for rows of which each has all ids up to the last of these.
        """
        stop = start + ids_BT.shape[1]
        named: dict[str, Any] = {self.ids.name: ids_BT.astype(self.ids.dtype, copy=False)}
        if self.mask is not None:
            if mask_BS is None:
                mask_BS = np.ones((len(ids_BT), self.mask.size(1) or stop), np.int64)
                mask_BS[:, stop:] = 0
            named[self.mask.name] = mask_BS.astype(self.mask.dtype, copy=False)
        if self.positions is not None:
            position_T = np.arange(start, stop, dtype=self.positions.dtype)
            named[self.positions.name] = np.broadcast_to(position_T, ids_BT.shape).copy()
        if self.use_cache_branch is not None:
            named[self.use_cache_branch] = np.array([start > 0])
        taken = zip(self.caches, pasts, strict=True)
        return named | {cache.past.name: past for cache, past in taken}

    def empty_pasts(self, num_rows: int) -> list[NDArray[Any]]:
        """Return what the caches take before a first call, each of shape (B, H, S, D)."""
        return [
            np.zeros((num_rows, c.heads, self.capacity or 0, c.head_size), c.past.dtype)
            for c in self.caches
        ]


def ports_of(session: Any, *, program: str) -> GraphPorts:
    """Return the ports of an ONNX Runtime session of a causal language model.

    Raises CapabilityError that names what is not understood.
    """
    inputs = {x.name: _port(x, program) for x in session.get_inputs()}
    outputs = {x.name: _port(x, program) for x in session.get_outputs()}
    pasts = {name: key for name in inputs if (key := _layer_and_kind(name))}
    known = {"input_ids", "attention_mask", "position_ids", "use_cache_branch", *_OURS, *pasts}
    if "input_ids" not in inputs or set(inputs) - known:
        raise CapabilityError(
            f"expected a program with input_ids and, where it has them, attention_mask, "
            f"position_ids, use_cache_branch and past_key_values.N.key / .value, but {program} "
            f"takes {', '.join(sorted(set(inputs) - known) or sorted(inputs))}; export it under "
            "these names"
        )
    presents = {key: name for name in outputs if (key := _layer_and_kind(name))}
    plain = [port for name, port in outputs.items() if name not in presents.values()]
    logits = outputs.get("logits", outputs.get("nll", plain[0] if len(plain) == 1 else None))
    if logits is None:
        raise CapabilityError(
            f"expected an output named logits, but {program} gives {', '.join(outputs)}"
        )
    missing = sorted(set(pasts.values()) - set(presents))
    if missing:
        raise CapabilityError(
            f"expected a present for each past, but {program} gives none for layer "
            f"{missing[0][0]}'s {missing[0][1]}"
        )
    caches = tuple(
        CachePort(past, presents[key], past.size(1) or 0, past.size(3) or 0)
        for past, key in ((inputs[n], pasts[n]) for n in sorted(pasts, key=lambda n: pasts[n]))
    )
    return GraphPorts(
        ids=inputs["input_ids"],
        mask=inputs.get("attention_mask"),
        positions=inputs.get("position_ids"),
        use_cache_branch="use_cache_branch" if "use_cache_branch" in inputs else None,
        logits=logits,
        caches=caches,
        capacity=_capacity(caches, outputs, inputs, program),
    )


def takes_cache(names: Sequence[str]) -> bool:
    """Return whether a program with inputs of these names is fed in blocks."""
    return any(_layer_and_kind(name) for name in names)


def _port(value: Any, program: str) -> Port:
    if value.type not in _DTYPES:
        raise CapabilityError(
            f"expected float32, float16 or integer inputs and outputs, but {value.name} of "
            f"{program} is {value.type}; export it with another dtype for its inputs and outputs"
        )
    return Port(value.name, tuple(value.shape), _DTYPES[value.type])


def _layer_and_kind(name: str) -> tuple[int, str] | None:
    """Return (layer, "key" or "value") of a cache's input or output; None for any other."""
    if not re.search(r"past|present|cache", name) or name == "use_cache_branch":
        return None
    if found := _LAYER_THEN_KIND.search(name):
        return int(found[1]), found[2]
    if found := _KIND_THEN_LAYER.search(name.replace("past_key_values", "past")):
        return int(found[2]), found[1]
    return None


def _capacity(
    caches: Sequence[CachePort], outputs: dict[str, Port], inputs: dict[str, Port], program: str
) -> int | None:
    """Return S of a retained cache; None for one that grows."""
    pasts = [cache.past for cache in caches]
    unknown = [x.name for x in pasts if not (len(x.shape) == 4 and x.size(1) and x.size(3))]
    if unknown:
        raise CapabilityError(
            f"expected caches of the shape batch, heads, ids, head size with fixed heads and head "
            f"size, but {unknown[0]} of {program} does not give them; fix them at the export"
        )
    sizes = {past.size(2) for past in pasts}
    if sizes <= {None}:
        return None
    size = sizes.pop()
    if sizes or any(outputs[cache.present].size(2) != size for cache in caches):
        raise CapabilityError(
            f"expected pasts of any length, or retained ones whose presents have the same fixed "
            f"length, but {program} takes pasts of {size} ids and gives others back"
        )
    if "position_ids" not in inputs:
        raise CapabilityError(
            f"expected position_ids among the inputs of {program}: its cache is of a fixed size, "
            "so the program needs the places of new ids"
        )
    return size
