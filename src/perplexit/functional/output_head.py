"""A language model's head written out: tensors and a few numbers that make logits of states.

    logits = cap · tanh(scale · (norm(input_scale · h) · Wᵀ + b) / cap)

Shape suffixes: N = rows, D = hidden size, V = vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NormKind = Literal["rms", "layer"]
NORM_KINDS: tuple[NormKind, ...] = ("rms", "layer")


@dataclass(frozen=True)
class FinalNorm:
    """The norm between the states and the head, where the states lie before it.

    kind: "rms" divides by the root mean square, "layer" by the standard deviation about the mean.
    """

    kind: NormKind
    weight_D: Tensor
    bias_D: Tensor | None
    eps: float

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """Return the normalised states, computed in float32 or better."""
        wide_ND = hidden_ND.to(torch.promote_types(hidden_ND.dtype, torch.float32))
        if self.kind == "layer":
            wide_ND = wide_ND - wide_ND.mean(-1, keepdim=True)
        wide_ND = wide_ND * torch.rsqrt(wide_ND.square().mean(-1, keepdim=True) + self.eps)
        wide_ND = wide_ND * self.weight_D.to(wide_ND)
        if self.bias_D is not None:
            wide_ND = wide_ND + self.bias_D.to(wide_ND)
        return wide_ND.to(hidden_ND)


@dataclass(frozen=True)
class OutputHead:
    """What makes logits of hidden states; `weight_VD`'s dtype is what they are computed in."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    norm: FinalNorm | None = None
    input_scale: float = 1.0
    scale: float = 1.0
    soft_cap: float | None = None

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Return the logits of hidden states, (N, V), in the weight's dtype."""
        hidden_ND = hidden_ND.to(self.weight_VD)
        if self.input_scale != 1.0:
            hidden_ND = hidden_ND * self.input_scale
        if self.norm is not None:
            hidden_ND = self.norm(hidden_ND)
        logits_NV = torch.nn.functional.linear(hidden_ND, self.weight_VD, self.bias_V)
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.soft_cap is not None:
            logits_NV = torch.tanh(logits_NV / self.soft_cap) * self.soft_cap
        return logits_NV

    def logits_of(self, hidden_ND: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map float32 states to float32 logits, as a session's `logits_of` does."""
        with torch.inference_mode():
            hidden = torch.from_numpy(np.ascontiguousarray(hidden_ND))
            logits_NV: NDArray[np.float32] = self.logits(hidden).float().cpu().numpy()
        return logits_NV

    def on(self, device: torch.device) -> "OutputHead":
        """Return the head with its tensors on a device."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return OutputHead.of(tensors, self.numbers())

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a file keeps of it, beside `numbers`."""
        found: dict[str, Tensor | None] = {"weight": self.weight_VD, "bias": self.bias_V}
        if self.norm is not None:
            found |= {"norm.weight": self.norm.weight_D, "norm.bias": self.norm.bias_D}
        kept = {name: tensor for name, tensor in found.items() if tensor is not None}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in kept.items()}

    def numbers(self) -> dict[str, Any]:
        """Return scales, soft-cap and the kind of the norm, as plain JSON values."""
        norm = self.norm and {"kind": self.norm.kind, "eps": self.norm.eps}
        names = ("input_scale", "scale", "soft_cap")
        return {**{name: getattr(self, name) for name in names}, "norm": norm}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> "OutputHead":
        """Return the head that `tensors` and `numbers` describe.

        Raises KeyError, TypeError or ValueError where they are of something else.
        """
        weight_VD, bias_V = tensors["weight"], tensors.get("bias")
        if weight_VD.ndim != 2 or (bias_V is not None and bias_V.shape != weight_VD.shape[:1]):
            raise ValueError(f"a weight of shape {tuple(weight_VD.shape)}")
        norm = None
        if numbers["norm"] is not None:
            kind: NormKind = "layer" if numbers["norm"]["kind"] == "layer" else "rms"
            weight_D, bias_D = tensors["norm.weight"], tensors.get("norm.bias")
            norm = FinalNorm(kind, weight_D, bias_D, float(numbers["norm"]["eps"]))
        soft_cap = numbers["soft_cap"]
        return cls(
            weight_VD,
            bias_V,
            norm,
            input_scale=float(numbers["input_scale"]),
            scale=float(numbers["scale"]),
            soft_cap=None if soft_cap is None else float(soft_cap),
        )
