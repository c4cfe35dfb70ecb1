"""Whether a model with its adapter merged still gives what it gave with the adapter beside it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perplexit.checkpoints.widened import widened

_PROBE_SHAPE = (2, 48)
# Of the logits' spread, as root mean squares, in float32 and float64: the weights' own rounding.
_TOLERANCE = 1e-4
# Narrow weights are rounded once more by a merge. The result may be this much farther from
# float32 than the same model in the same dtype with the adapter beside it.
_MOST_FARTHER = 2.0


@dataclass(frozen=True)
class Unmerged:
    """Log-probabilities of a probe with the adapter beside the layers: the merge's measure.

    own:  (rows, ids, vocabulary), in the model's dtype; wide: computed in float32.
    most: how far, in root mean square, the merged model may be from `wide`, in nats.
    """

    ids: Tensor
    dtype: torch.dtype
    wide: Tensor
    most: float

    @classmethod
    def of(cls, model: nn.Module) -> "Unmerged":
        """Return what the adapted model gives."""
        ids = _probe_ids(model)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        own = _logits(model, ids)
        if dtype in (torch.float32, torch.float64):
            spread = own - own.mean(-1, keepdim=True)
            return cls(ids, dtype, own.log_softmax(-1), _TOLERANCE * _rms(spread))
        with widened(model):
            wide = _logits(model, ids).log_softmax(-1)
        return cls(ids, dtype, wide, _MOST_FARTHER * _rms(own.log_softmax(-1) - wide))

    def why_not(self, merged: nn.Module) -> str | None:
        """Return why a merged model may not replace the adapted one; None: it may."""
        difference = _logits(merged, self.ids).log_softmax(-1) - self.wide
        apart = _rms(difference)
        if apart <= self.most:
            return None
        largest = float(difference.abs().max())
        return (
            f"log-probabilities of {self.ids.numel()} probe ids come out {apart:.3g} nats apart in "
            f"the root mean square (at most {self.most:.2g} in "
            f"{str(self.dtype).removeprefix('torch.')}) and up to {largest:.3g}"
        )


def _probe_ids(model: nn.Module) -> Tensor:
    config: Any = model.config
    text = config.get_text_config()
    rows, length = _PROBE_SHAPE
    positions = getattr(text, "max_position_embeddings", None)
    if isinstance(positions, int):
        length = max(1, min(length, positions))
    ids = torch.randint(
        int(text.vocab_size), (rows, length), generator=torch.Generator().manual_seed(0)
    )
    return ids.to(next(model.parameters()).device)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())
