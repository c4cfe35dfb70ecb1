"""A loaded model's head as tensors and numbers, for states that are to outlive the model.

The model's output layer is asked what it does (quantized and adapted layers multiply an identity),
and what happens to its input and its result is found out on a few hidden states. Whether the head
that is so written out gives the model's own logits is checked before it is used.

Shape suffixes: N = rows, D = hidden size, V = vocabulary.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor, nn

from perplexit.checkpoints.module_call import num_embeddings, output_layer, plain_output
from perplexit.errors import CapabilityError
from perplexit.functional.output_head import NORM_KINDS, FinalNorm, OutputHead
from perplexit.sessions.pytorch.forward import ForwardPass, LinearHead

_PROBE_SHAPE = (4, 32)
_IDENTITY_ROWS = 256
# Of the logits' spread, as root mean squares; a head that rounds its inputs is farther away.
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5}
_LOW_PRECISION_TOLERANCE = 2e-2


def written_head(model: nn.Module, forward: ForwardPass, device: torch.device) -> OutputHead:
    """Return the head of the model that `forward` runs; call it under the session's settings.

    Raises CapabilityError where it cannot be written so: it rounds its inputs while it runs, or
    does more to states and logits than a norm, a scale and a soft-cap.
    """
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(num_embeddings(model) or 2, _PROBE_SHAPE, generator=generator)
    hidden_ND = forward.rows(ids_BT.to(device), None).flatten(0, 1)
    expected_NV = forward.head(hidden_ND).clone()
    plain = forward.head.linear if isinstance(forward.head, LinearHead) else plain_output(model)
    if plain is not None:
        head = OutputHead(plain.weight.detach(), _detached(plain.bias))
        if _distance(head.logits(hidden_ND), expected_NV) <= _tolerance(hidden_ND):
            return head
    seen = _seen_at_output_layer(model, forward.head, hidden_ND)
    weight_VD, bias_V = _affine(seen.layer, seen.input_ND)
    head = _with_input(OutputHead(weight_VD, bias_V), seen, hidden_ND, model)
    head = _with_output(head, seen, expected_NV, model)
    candidates = [head]
    if weight_VD.dtype not in _TOLERANCE:  # an engine may add up in float32 what it rounds after
        wide_V = None if bias_V is None else bias_V.float()
        candidates.append(replace(head, weight_VD=weight_VD.float(), bias_V=wide_V))
    errors = [_distance(candidate.logits(hidden_ND), expected_NV) for candidate in candidates]
    best = int(np.argmin(errors))
    if not errors[best] <= _tolerance(weight_VD):
        raise _cannot(f"written out, it gives other logits (by {errors[best]:.2g} of their spread)")
    return candidates[best]


@dataclass(frozen=True)
class _Seen:
    """The model's output layer, and what went into it and came out of it."""

    layer: nn.Module
    input_ND: Tensor
    output_NV: Tensor
    before: tuple[tuple[nn.Module, Tensor], ...]  # leaf modules that ran first, their results


def _seen_at_output_layer(
    model: nn.Module, head: Callable[[Tensor], Tensor], hidden_ND: Tensor
) -> _Seen:
    layer = output_layer(model)
    if layer is None:
        raise _cannot("the model does not say which layer makes its logits")
    caught: list[tuple[Tensor, Tensor]] = []
    before: list[tuple[nn.Module, Tensor]] = []

    def at_layer(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        caught.append((inputs[0].detach(), output.detach()))

    def at_leaf(module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and not caught:
            before.append((module, output.detach()))

    inside = set(layer.modules())
    leaves = [m for m in model.modules() if not list(m.children()) and m not in inside]
    with ExitStack() as stack:
        stack.callback(layer.register_forward_hook(at_layer).remove)
        for leaf in leaves:
            stack.callback(leaf.register_forward_hook(at_leaf).remove)
        head(hidden_ND)
    if len(caught) != 1:
        raise _cannot(f"its output layer runs {len(caught)} times")
    given, made = (tensor.reshape(len(hidden_ND), -1) for tensor in caught[0])
    return _Seen(layer, given, made, tuple(before))


def _affine(layer: nn.Module, like_ND: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the layer's matrix and bias: its own, or what it makes of an identity."""
    if type(layer) is nn.Linear and type(layer.weight) is nn.Parameter:
        return layer.weight.detach(), _detached(layer.bias)
    size = like_ND.shape[1]
    zero_V = layer(like_ND.new_zeros(1, size))[0].clone()
    bias_V = zero_V if bool(zero_V.any()) else None
    columns = []
    for start in range(0, size, _IDENTITY_ROWS):
        stop = min(start + _IDENTITY_ROWS, size)
        rows_ID = like_ND.new_zeros(stop - start, size)
        rows_ID[torch.arange(stop - start), torch.arange(start, stop)] = 1
        part_IV = layer(rows_ID)
        columns.append((part_IV - zero_V if bias_V is not None else part_IV).t())
    return torch.cat(columns, dim=1).contiguous(), bias_V


def _with_input(head: OutputHead, seen: _Seen, hidden_ND: Tensor, model: nn.Module) -> OutputHead:
    """Return the head with what happens to states before the output layer."""
    if torch.equal(seen.input_ND, hidden_ND):
        return head
    factor = _constant_ratio(hidden_ND, seen.input_ND)
    if factor is not None:
        return replace(head, input_scale=_known_number(model, factor))
    for module, output in seen.before:
        norm = _norm_of(module, hidden_ND, seen.input_ND)
        if norm is not None and output.numel() == seen.input_ND.numel():
            return replace(head, norm=norm)
    raise _cannot("more than a norm or a scale lies between its states and its output layer")


def _norm_of(module: nn.Module, hidden_ND: Tensor, expected_ND: Tensor) -> FinalNorm | None:
    """Return the module as a norm, where it is one: weights as they are, or plus 1."""
    weight_D: Any = getattr(module, "weight", None)
    if not isinstance(weight_D, Tensor) or weight_D.shape != hidden_ND.shape[1:]:
        return None
    eps = next(
        (float(getattr(module, x)) for x in ("eps", "variance_epsilon") if hasattr(module, x)), 1e-6
    )
    bias_D = _detached(getattr(module, "bias", None))
    for weight in (weight_D.detach(), 1.0 + weight_D.detach().float()):
        for kind in NORM_KINDS:
            norm = FinalNorm(kind, weight, bias_D, eps)
            if _distance(norm(hidden_ND), expected_ND) <= _tolerance(hidden_ND):
                return norm
    return None


def _with_output(
    head: OutputHead, seen: _Seen, expected_NV: Tensor, model: nn.Module
) -> OutputHead:
    """Return the head with what follows the output layer: nothing, a scale, a soft-cap."""
    if torch.equal(seen.output_NV, expected_NV):
        return head
    factor = _constant_ratio(seen.output_NV, expected_NV)
    if factor is not None:
        return replace(head, scale=_known_number(model, factor))
    made_M = seen.output_NV.double().flatten().cpu().numpy()
    got_M = expected_NV.double().flatten().cpu().numpy()
    largest = float(np.abs(got_M).max())
    small_M = np.argsort(np.abs(made_M))[: max(8, len(made_M) // 50)]
    start = float(np.median(got_M[small_M] / made_M[small_M]))

    def residuals(values: Any) -> Any:
        return values[1] * np.tanh(values[0] * made_M / values[1]) - got_M

    fit = least_squares(residuals, (start, 1.5 * largest), xtol=1e-15, ftol=1e-15, gtol=1e-15)
    scale, soft_cap = (float(value) for value in fit.x)
    return replace(head, scale=_known_number(model, scale), soft_cap=_known_number(model, soft_cap))


def _constant_ratio(before: Tensor, after: Tensor) -> float | None:
    """Return the number that all of `before` was multiplied with, where there is one."""
    wide, made = before.double(), after.double()
    factor = float((wide * made).sum() / wide.square().sum())
    distance = float((wide * factor - made).norm() / made.norm())
    return factor if distance <= (1e-6 if before.dtype == torch.float32 else 4e-3) else None


def _known_number(model: nn.Module, value: float) -> float:
    """Return the configuration's number (or 1 over it) nearest to a measured one, else that."""
    config = getattr(model, "config", None)
    settings = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    known = [float(x) for x in settings.values() if isinstance(x, int | float) and x]
    for number in (1.0, *known, *(1 / x for x in known)):
        if abs(number - value) <= 1e-5 * abs(value):
            return number
    return value


def _distance(got: Tensor, expected: Tensor) -> float:
    """Return the root mean square of the difference, relative to the spread of what is expected."""
    wide = expected.double()
    spread = float((wide - wide.mean(-1, keepdim=True)).square().mean().sqrt())
    return float((got.double() - wide).square().mean().sqrt()) / (spread or 1.0)


def _tolerance(like: Tensor) -> float:
    return _TOLERANCE.get(like.dtype, _LOW_PRECISION_TOLERANCE)


def _detached(tensor: Any) -> Tensor | None:
    return tensor.detach() if isinstance(tensor, Tensor) else None


def _cannot(reason: str) -> CapabilityError:
    return CapabilityError(
        f"expected a head that can be kept beside the states, but {reason}; compare two models in "
        "one process instead: eval CANDIDATE --reference MODEL"
    )
