"""Rotary embeddings whose frequencies depend on a window's length, fixed at that length.

LongRoPE takes other frequencies for windows longer than the model was first trained on. Dynamic
NTK takes others for every length, and keeps those of the longest window that it has seen.
Both judge by the largest position of a call, and so by the batch, its padding, or the part of a
window that a cache is fed. What a call sees here is the length of the whole window.

Such modules are found by what they compute, not by name.
Shape suffixes: B = windows, T = ids of a window.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from perplexit.errors import ModelError

_FAR = 2**24  # a position beyond every length that a model is made for
_CHANGING = ("dynamic", "longrope")  # what transformers calls the two kinds that it has


class LengthDependentRope:
    """The modules of a model that turn positions by another angle in windows of another length."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._keys: dict[int, bytes] = {}

    @classmethod
    def of(cls, model: nn.Module) -> "LengthDependentRope | None":
        """Return those of a model, or None where no length changes an angle.

        Raises ModelError for a module of a kind that depends on length, but cannot be held.
        """
        found = [module for module in model.modules() if _depends_on_length(module)]
        return cls(found) if found else None

    @property
    def kinds(self) -> str:
        """Return the kinds of the modules, as a config names them."""
        return ", ".join(sorted({kind for m in self._modules for kind in _kinds(m)}))

    def key(self, length: int) -> bytes:
        """Return a mark of a window's length: windows with equal marks have equal frequencies."""
        length = max(2, length)  # a window of one id has no target
        if length not in self._keys:
            with self.held_at(length):
                self._keys[length] = b"".join(_angles(module, 1) for module in self._modules)
        return self._keys[length]

    def border(self, longest: int) -> int | None:
        """Return the largest length up to which keys are equal; None where all are to `longest`."""
        first = self.key(2)
        if self.key(longest) == first:
            return None
        low, high = 2, longest  # the last that is equal, the first known to differ
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.key(middle) == first else (low, middle)
        return low

    def settle(self) -> None:
        """Keep dynamic NTK at its first frequencies, for a program of windows below the border."""
        for module in self._modules:
            _forget(module)
            if getattr(module, "rope_type", None) == "dynamic":
                module.rope_type = "default"  # type: ignore[assignment]

    @contextmanager
    def held_at(self, length: int) -> Iterator[None]:
        """Hold the angles at a window of `length` ids in every call inside the block."""
        with ExitStack() as stack:
            for module in self._modules:
                lengthened = _Lengthened(module, length)
                before = module.register_forward_pre_hook(lengthened, with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(module.register_forward_hook(_shortened).remove)
            yield


def held_at(rope: LengthDependentRope | None, length: int) -> AbstractContextManager[None]:
    """Return `rope.held_at(length)`; do nothing for a model whose angles never change."""
    return nullcontext() if rope is None else rope.held_at(length)


class _Lengthened:
    """Puts the window's last position behind those of a call, and forgets earlier windows."""

    def __init__(self, module: nn.Module, length: int) -> None:
        self._place = list(inspect.signature(module.forward).parameters).index("position_ids")
        self._last = length - 1

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        _forget(module)
        given = list(args)
        place: Any = "position_ids" if "position_ids" in kwargs else self._place
        arguments: Any = kwargs if "position_ids" in kwargs else given
        inside = arguments[place].clamp(max=self._last)  # what lies beyond is padding
        arguments[place] = torch.nn.functional.pad(inside, (0, 1), value=self._last)
        return tuple(given), kwargs


def _shortened(module: nn.Module, _: object, output: Any) -> Any:
    """Return what a module gave, without the position that was added."""
    if isinstance(output, Tensor):
        return output[..., :-1, :]
    if isinstance(output, tuple):
        return tuple(_shortened(module, _, each) for each in output)
    raise ModelError(
        f"expected angles as tensors from {type(module).__name__}, whose RoPE depends on the "
        f"window's length, got {type(output).__name__}; this model cannot be scored exactly"
    )


def _forget(module: nn.Module) -> None:
    """Put back what transformers' dynamic NTK had before it saw a window."""
    first = getattr(module, "original_max_seq_len", None)
    longest = {n: v for n, v in vars(module).items() if n.endswith("max_seq_len_cached")}
    if first is None or all(length == first for length in longest.values()):
        return
    for name in longest:
        setattr(module, name, first)
    for name, value in {**vars(module), **module._buffers}.items():
        if name.endswith("original_inv_freq"):
            prefix = name.removesuffix("original_inv_freq")
            module.register_buffer(f"{prefix}inv_freq", value.clone(), persistent=False)


def _depends_on_length(module: nn.Module) -> bool:
    is_rotary = hasattr(module, "rope_type") or "rotary" in type(module).__name__.lower()
    if not is_rotary or "position_ids" not in inspect.signature(module.forward).parameters:
        return False
    rope = LengthDependentRope([module])
    try:
        return rope.key(2) != rope.key(_FAR)
    except Exception as error:  # whatever a module of unknown arguments raises
        if not any(kind in name for kind in _CHANGING for name in _kinds(module)):
            return False
        raise ModelError(
            f"expected a rotary embedding that can be asked for its angles, but "
            f"{type(module).__name__} (rope_type {', '.join(_kinds(module))}), whose angles depend "
            f"on the window's length, fails ({type(error).__name__}: {str(error)[:200]}); this "
            "model cannot be scored exactly"
        ) from error


def _kinds(module: nn.Module) -> list[str]:
    rope_type = getattr(module, "rope_type", None)
    kinds = rope_type.values() if isinstance(rope_type, Mapping) else [rope_type]
    return sorted({str(kind) for kind in kinds if kind is not None})


@torch.no_grad()
def _angles(module: nn.Module, position: int) -> bytes:
    """Return the bytes of all that a module gives for one position."""
    buffer = next((b for b in module.buffers() if b.device.type != "meta"), None)
    positions_BT = torch.full((1, 1), position, device=None if buffer is None else buffer.device)
    states = torch.zeros(1, 1, 8, device=positions_BT.device)
    takes_layer = "layer_type" in inspect.signature(module.forward).parameters
    rope_type = getattr(module, "rope_type", None)
    layers = list(rope_type) if takes_layer and isinstance(rope_type, Mapping) else [None]
    found = []
    for layer in layers:
        options = {} if layer is None else {"layer_type": layer}
        output = module(states, position_ids=positions_BT, **options)
        for each in output if isinstance(output, tuple) else (output,):
            real = torch.view_as_real(each) if each.is_complex() else each
            found.append(real.detach().float().cpu().numpy().tobytes())
    return b"".join(found)
