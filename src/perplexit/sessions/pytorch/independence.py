"""Whether a window's results are its own: whatever its batch, its padding and the ids after it.

Most models say so by construction, and some do not: a router with a capacity over a whole batch, an
index that breaks ties by length, a hash drawn anew for each call. What a model does is tried.
Shape suffixes: B = windows, T = ids of a window, X = what the forward pass gives a position.
"""

from typing import Any

import torch
from torch import Tensor

from perplexit.checkpoints.length_dependent_rope import LengthDependentRope, held_at
from perplexit.errors import ModelError

_IDS = 24  # of a row: more than a tiny index or window holds, and quick
# Of the largest value. Rounding in another order stays below; a nll must be right within 1e-4.
_TOLERANCE = {torch.float32: 2e-4, torch.float64: 2e-4}
_TOLERANCE_16_BITS = 0.2
NOT_REPEATABLE = (
    "expected a model that gives the same for the same ids, but its predictions change from call "
    "to call (something in it is drawn at random, or it remembers earlier calls); its perplexity "
    "is no fixed number, so it is not scored"
)


def depends_on_others(
    forward: Any,
    id_limit: int,
    *,
    longest: int | None,
    device: torch.device,
    rope: LengthDependentRope | None,
) -> bool:
    """Return whether rows change with what else is in the batch, with padding, or with length.

    forward: a ForwardPass; longest: the model's positions, None for any.
    Raises ModelError where the same call gives something else the second time.
    """
    length = min(_IDS, longest or _IDS)
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(id_limit, (2, length), generator=generator).to(device)
    part = max(1, 2 * length // 3)
    with held_at(rope, length):
        first_BTX = forward.rows(ids_BT[:1], None)
        again_BTX = forward.rows(ids_BT[:1], None)
        if not _equal(first_BTX, again_BTX):
            raise ModelError(NOT_REPEATABLE)
        both_BTX = forward.rows(ids_BT, None)
        short_BTX = forward.rows(ids_BT[:1, :part], None)
        changes = [(first_BTX, both_BTX[:1]), (first_BTX[:, :part], short_BTX)]
        if forward.takes_mask:
            mask_BT = torch.ones_like(ids_BT)
            mask_BT[0, part:] = 0
            padded_BTX = forward.rows(ids_BT, mask_BT)
            changes.append((first_BTX[:, :part], padded_BTX[:1, :part]))
    return not all(_equal(one, other) for one, other in changes)


def _equal(expected: Tensor, got: Tensor) -> bool:
    """Return whether both are equal up to rounding in another order; NaN equals NaN."""
    if expected.shape != got.shape:
        return False
    tolerance = _TOLERANCE.get(expected.dtype, _TOLERANCE_16_BITS)
    scale = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max()) or 1.0
    return torch.allclose(
        expected, got.to(expected), rtol=0, atol=tolerance * scale, equal_nan=True
    )
