"""Where a checkpoint's layers go, and which attention they run: what is decided at loading."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perplexit.checkpoints.module_call import Past, input_embedding, output_layer
from perplexit.errors import CapabilityError, MissingPackageError, UsageError
from perplexit.sessions.pytorch.device_choice import chosen_device
from perplexit.sessions.pytorch.forward import ForwardPass, WrappedForward
from perplexit.untrusted_files import Expected, read_json

_MAP = Expected(
    "module names and devices in JSON",
    UsageError,
    "for a map that is made for you use the device auto",
)
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
DeviceMap = Mapping[str, str | int]


@dataclass(frozen=True)
class LoadingOptions:
    """What was asked for of a model's loading, by the names of EngineOptions.

    device:          a name; "auto" spreads layers over all accelerators, then the host, then disk.
    device_map:      module → device ("cpu", "cuda:1", 1, "disk"), or a JSON file that holds one.
    attention:       one of ATTENTIONS; None leaves the choice to transformers (sdpa where it can).
    tensor_parallel: processes that each hold a part of every layer; None: no such split.
    quantization:    a precision's name. adapter: a PEFT adapter's folder, merged where asked for.
    """

    device: str | None
    device_map: DeviceMap | str | Path | None
    attention: str | None
    tensor_parallel: int | None
    quantization: str | None
    adapter: str | Path | None
    merge_adapter: bool

    @property
    def spread(self) -> bool:
        """Return whether layers may be on several devices."""
        return self.device == "auto" or self.device_map is not None

    @property
    def changes_placement(self) -> bool:
        """Return whether anything but a plain device was asked for."""
        return self.spread or self.attention is not None or self.tensor_parallel is not None

    @property
    def changes_weights(self) -> bool:
        """Return whether a quantization or an adapter was asked for."""
        return self.quantization is not None or self.adapter is not None

    def for_transformers(self, dtype: str) -> dict[str, Any]:
        """Return `load_checkpoint`'s options beside the dtype, checked before anything is read.

        Raises UsageError, CapabilityError and MissingPackageError, each by the option's name.
        """
        options: dict[str, Any] = {}
        if self.attention is not None:
            device = None if self.spread else chosen_device(self.device)
            check_attention(self.attention, dtype, device)
            options["attn_implementation"] = self.attention
        if self.device_map is not None:
            if self.device is not None:
                raise UsageError(
                    f"expected a device or a device map, got both (device {self.device!r}); "
                    "the map says where each layer goes"
                )
            options["device_map"] = read_device_map(self.device_map)
        elif self.device == "auto":
            options["device_map"] = "auto"
        if self.tensor_parallel is not None and self.spread:
            raise UsageError(
                "expected either tensor parallelism (a part of every layer in each process) or "
                "layers spread over devices, got both; leave one out"
            )
        return options


def check_attention(name: str, dtype: str, device: torch.device | None) -> None:
    """Raise where that attention cannot run: an unknown name, no package, no CUDA, float32.

    device: None where layers are spread over several.
    """
    if name not in ATTENTIONS:
        raise UsageError(f"expected an attention of {', '.join(ATTENTIONS)}, got {name!r}")
    if name != "flash_attention_2":
        return
    on_cuda = device.type == "cuda" if device is not None else torch.cuda.is_available()
    if not on_cuda:
        raise CapabilityError(
            f"flash_attention_2 runs on CUDA alone, got the device {device or 'auto'}; use sdpa, "
            "which takes a flash kernel by itself where there is one"
        )
    if find_spec("flash_attn") is None:
        raise MissingPackageError(
            "flash_attention_2 needs the package flash_attn: pip install flash-attn, or use sdpa"
        )
    if dtype not in ("bfloat16", "float16"):
        raise UsageError(
            f"flash_attention_2 computes in bfloat16 or float16, got {dtype}; choose one of them, "
            "or use sdpa"
        )


def read_device_map(given: DeviceMap | str | Path) -> dict[str, str | int]:
    """Return the map, read where it is a JSON file; UsageError where it is no such map."""
    content: Any = given
    if isinstance(given, str | Path):
        content = read_json(given, _MAP, dict[str, Any])
    good = isinstance(content, Mapping) and content
    if not good or not all(isinstance(x, str | int) for x in content.values()):
        raise UsageError(
            'expected a device map such as {"model.embed_tokens": "cuda:0", "model.layers.0": '
            f'"cuda:0", "model.layers.1": "disk", …}}, got {str(content)[:80]!r}'
        )
    return {str(name): place for name, place in content.items()}


def head_device(module: nn.Module) -> torch.device:
    """Return where the logits come out of a module whose layers may be spread over devices."""
    return _computing_device(output_layer(module), module)


def embedding_device(module: nn.Module) -> torch.device:
    """Return where ids are looked up in a module whose layers may be spread over devices."""
    return _computing_device(input_embedding(module), module)


def _computing_device(part: nn.Module | None, module: nn.Module) -> torch.device:
    hook = getattr(part, "_hf_hook", None)  # accelerate's: it fetches weights that are elsewhere
    if hook is not None and hook.execution_device is not None:
        place = hook.execution_device
        return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    tensors = (*(part or module).parameters(), *module.parameters())
    return next((x.device for x in tensors if x.device.type != "meta"), torch.device("cpu"))


class GatheredForward(WrappedForward):
    """A forward pass over spread layers, fed where they begin; all of it comes back to one device.

    start: where the ids are looked up; device: the session's own.
    """

    def __init__(self, inner: ForwardPass, start: torch.device, device: torch.device) -> None:
        super().__init__(inner)
        self._start, self._device = start, device

    def rows(self, ids_BT: Tensor, mask_BT: Tensor | None, past: Past | None = None) -> Tensor:
        """Return the inner rows, on the session's device."""
        mask_BT = None if mask_BT is None else mask_BT.to(self._start)
        return self._inner.rows(ids_BT.to(self._start), mask_BT, past).to(self._device)

    def head(self, rows_NX: Tensor) -> Tensor:
        """Return the inner logits, on the session's device."""
        return self._inner.head(rows_NX).to(self._device)


def places_of(module: nn.Module, device: torch.device) -> dict[str, int]:
    """Count how many of the spread modules are on each device, by its name."""
    places: dict[str, int] = {}
    for place in (getattr(module, "hf_device_map", None) or {"": device}).values():
        name = f"cuda:{place}" if isinstance(place, int) else str(place)
        places[name] = places.get(name, 0) + 1
    return places


def devices_of(module: nn.Module, device: torch.device) -> list[torch.device]:
    """Return the devices on which a module computes; `device` where its layers are not spread."""
    names = [name for name in places_of(module, device) if name != "disk"]
    found = {torch.device(name) for name in names}
    accelerators = {x for x in found if x.type != "cpu"}  # what is on the host is fetched by one
    return sorted(accelerators or {device}, key=str)
