"""Whether a model whose layers were changed still gives its own logits, up to rounding."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perplexit.checkpoints.module_call import ModuleCall, config_integer, field_of, num_embeddings

_Kept = list[tuple[dict[str, Any], str, Tensor]]


@dataclass(frozen=True)
class OwnLogits:
    """The log-probabilities of fixed random ids that a model gave before its layers were changed.

    logprobs: (rows, ids, vocabulary), computed in float32 or better.
    most:     how far, in root mean square, a changed model may be from them, in nats.
    """

    ids_BT: Tensor
    dtype: torch.dtype
    logprobs: Tensor
    most: float

    @classmethod
    def of(
        cls, model: nn.Module, shape: tuple[int, int], *, tolerance: float, most_farther: float
    ) -> "OwnLogits":
        """Run the model over (rows, ids) of this shape, or as many ids as it has positions.

        tolerance:    of the logits' spread, in float32 and float64: additions in another order.
        most_farther: in narrower dtypes, how much farther from float32 a changed model may be than
            the model in its own dtype is.
        """
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        positions = config_integer(model, "max_position_embeddings", "n_positions") or shape[1]
        rows, length = shape[0], max(1, min(shape[1], positions))
        generator = torch.Generator().manual_seed(0)
        ids_BT = torch.randint(num_embeddings(model) or 2, (rows, length), generator=generator)
        ids_BT = ids_BT.to(next(model.parameters()).device)
        own = _logits(model, ids_BT)
        if dtype in (torch.float32, torch.float64):
            spread = own - own.mean(-1, keepdim=True)
            return cls(ids_BT, dtype, own.log_softmax(-1), tolerance * _rms(spread))
        with widened(model):
            wide = _logits(model, ids_BT).log_softmax(-1)
        return cls(ids_BT, dtype, wide, most_farther * _rms(own.log_softmax(-1) - wide))

    def why_not(self, changed: nn.Module) -> str | None:
        """Return why a changed model may not replace the model; None: it may."""
        difference = _logits(changed, self.ids_BT).log_softmax(-1) - self.logprobs
        apart = _rms(difference)
        if apart <= self.most:
            return None
        largest = float(difference.abs().max())
        return (
            f"log-probabilities of {self.ids_BT.numel()} probe ids come out {apart:.3g} nats apart "
            f"in the root mean square (at most {self.most:.2g} in "
            f"{str(self.dtype).removeprefix('torch.')}) and up to {largest:.3g}"
        )


def _logits(model: nn.Module, ids_BT: Tensor) -> Tensor:
    with torch.inference_mode():
        return field_of(ModuleCall(model)(ids_BT, None), "logits").float()


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Compute in float32 inside the block from the model's weights; restore them bit for bit.

    One repeated layer is widened at a time, so that memory grows by that layer's float32 weights.
    """
    kept: dict[int, _Kept] = {}
    with ExitStack() as stack:
        for module, parts in _units(model):

            def widen(module: nn.Module, *_: Any, parts: list[nn.Module] = parts) -> None:
                if id(module) not in kept:
                    kept[id(module)] = _widen(parts)

            def restore(module: nn.Module, *_: Any) -> None:
                _restore(kept.pop(id(module), []))

            stack.callback(module.register_forward_pre_hook(widen).remove)
            stack.callback(module.register_forward_hook(restore, always_call=True).remove)
        try:
            yield
        finally:
            for tensors in kept.values():
                _restore(tensors)


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Yield (module that runs, modules widened meanwhile): list items whole, others alone."""
    if isinstance(module, nn.ModuleList):
        yield from ((item, list(item.modules())) for item in module)
        return
    if module._parameters or module._buffers:
        yield module, [module]
    for child in module.children():
        yield from _units(child)


def _widen(parts: list[nn.Module]) -> _Kept:
    """Put float32 copies in place of narrow tensors; return what was there before."""
    kept: _Kept = []
    for part in parts:
        places: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for tensors in places:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16):
                    kept.append((tensors, name, tensor))
                    wide = tensor.detach().float()
                    tensors[name] = (
                        nn.Parameter(wide, requires_grad=False)
                        if isinstance(tensor, nn.Parameter)
                        else wide
                    )
    return kept


def _restore(kept: _Kept) -> None:
    for tensors, name, tensor in kept:
        tensors[name] = tensor
